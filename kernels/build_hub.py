"""Write the kernel package in the layout of Hugging Face's kernel Hub.

    python kernels/build_hub.py [--output FOLDER] [--repo-id OWNER/NAME]

    build.toml, flake.nix, CARD.md     for the Hub's kernel-builder
    torch-ext/fastdino_kernels/        the sources, without _ops.py, which the builder generates
    build/torch-{cuda,rocm,cpu}/       the variants that `kernels.get_kernel` loads

The kernels are compiled when they are first used, so the variants differ only in the name under
which their operators are registered. That name contains a hash of the sources: a copy from the Hub,
an older copy and an installed package can be used in one process.

Format: https://huggingface.co/docs/kernels/kernel-requirements
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels/fastdino_kernels"
NAME = PACKAGE.name
HUB_NAME = NAME.replace("_", "-")
BACKENDS = ("cuda", "rocm", "cpu")
VERSION = 0  # the Hub reserves 0 for kernels whose interface may still change
LICENSE = "apache-2.0"  # the Hub's identifier
GENERATED = "_ops.py"  # written by the builder, with the variant's namespace

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""
FLAKE = """\
{
  description = "Kernels for DINO self-supervised pretraining";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
# The builder fills in the fields in double braces when it uploads.
CARD = """\
---
library_name: kernels
license: {license}
---

# {name}

{summary}

```python
from kernels import get_kernel

kernels = get_kernel("{{{{ repo_id }}}}", version={{{{ version }}}}, trust_remote_code=True)
loss, teacher_sum = kernels.dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04)
```

On CUDA and ROCm tensors the kernels are compiled by Triton; on other devices the same functions run
in vectorised PyTorch.

## Functions and classes

{names}
"""
OPS = '''\
"""Namespace of the operators of this build variant."""

import torch

_NAME = "{id}"
ops = getattr(torch.ops, _NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the qualified name of an operator, as torch.library expects it."""
    return f"{{_NAME}}::{{op_name}}"
'''
# Older versions of `kernels` import build/<variant>/<name> instead of build/<variant>.
FORWARD = '''\
"""The package one folder up, for versions of `kernels` that import this folder."""

import importlib.util
import sys
from pathlib import Path

_ID = "{id}"
if _ID not in sys.modules:
    _init = Path(__file__).parent.parent / "__init__.py"
    _spec = importlib.util.spec_from_file_location(_ID, _init)
    sys.modules[_ID] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_ID])
globals().update(vars(sys.modules[_ID]))
'''


def sources() -> dict[str, bytes]:
    """Map the relative path of each source file to its content."""
    files = [*sorted(PACKAGE.rglob("*.py")), PACKAGE / "py.typed"]
    return {file.relative_to(PACKAGE).as_posix(): file.read_bytes() for file in files}


def fingerprint(files: dict[str, bytes]) -> str:
    """Return seven hexadecimal digits that identify the sources."""
    total = hashlib.sha256()
    for path, content in files.items():
        total.update(f"{path}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:7]


def write_variant(folder: Path, backend: str, files: dict[str, bytes]) -> None:
    """Write one build variant with its metadata.json."""
    identifier = f"_{NAME}_{backend}_{fingerprint(files)}"
    own = {
        GENERATED: OPS.format(id=identifier).encode(),
        f"{NAME}/__init__.py": FORWARD.format(id=identifier).encode(),
    }
    content = {**files, **own}
    _write(folder, content)
    metadata = {
        "name": HUB_NAME,
        "id": identifier,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: _digest(content[path]) for path in sorted(content)},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def write_hub(folder: Path, repo_id: str) -> None:
    """Write the whole repository into a folder; replaces what an earlier run wrote there."""
    files = sources()
    for name in ("build", "torch-ext"):
        shutil.rmtree(folder / name, ignore_errors=True)
    inits = ast.parse(files["__init__.py"])
    summary = (ast.get_docstring(inits) or "").splitlines()[0]
    text = {
        "build.toml": BUILD_TOML.format(
            name=HUB_NAME,
            version=VERSION,
            license=LICENSE,
            backends=", ".join(f'"{backend}"' for backend in BACKENDS),
            repo_id=repo_id,
        ),
        "flake.nix": FLAKE,
        "CARD.md": CARD.format(
            name=HUB_NAME,
            license=LICENSE,
            summary=summary,
            names="\n".join(f"- `{name}`" for name in public_names(inits)),
        ),
    }
    _write(folder, {name: content.encode() for name, content in text.items()})
    shutil.copy(ROOT / "LICENSE", folder)
    _write(folder / "torch-ext" / NAME, {p: c for p, c in files.items() if p != GENERATED})
    for backend in BACKENDS:
        write_variant(folder / "build" / f"torch-{backend}", backend, files)


def public_names(module: ast.Module) -> list[str]:
    """Return the names in a module's __all__, which must be a list of constants."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError("expected an assignment to __all__ in __init__.py, got none")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs/hub")
    parser.add_argument("--repo-id", default=f"fastdino/{HUB_NAME}")
    options = parser.parse_args(arguments)
    write_hub(options.output, options.repo_id)
    print(f"Written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

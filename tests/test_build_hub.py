"""kernels/build_hub.py: the kernel package in the layout of Hugging Face's kernel Hub."""

from __future__ import annotations

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
from kernels._rust import Build, Digest, DigestAlgorithm, DigestValidationError, Metadata

ROOT = Path(__file__).parent.parent
HUB = runpy.run_path(str(ROOT / "kernels/build_hub.py"))
BACKENDS = ("cuda", "rocm", "cpu")
REPO = "fastdino/fastdino-kernels"

# Each way of loading a copy, which is at sys.argv[1].
LOADS = {
    "get_local_kernel": "kernels = get_local_kernel(Path(sys.argv[1]), backend=None)",
    "get_local_kernel of a backend": "kernels = get_local_kernel(Path(sys.argv[1]), backend='cpu')",
    "get_kernel with LOCAL_KERNELS": f"kernels = get_kernel({REPO!r}, version=0)",
    "the inner folder, as older loaders do": (
        "sys.path.insert(0, sys.argv[1] + '/build/torch-cpu')\n"
        "kept = {name: sys.modules.pop(name) for name in list(sys.modules)\n"
        "        if name.split('.')[0] == 'fastdino_kernels'}\n"
        "kernels = __import__('fastdino_kernels')\n"
        "assert 'dino_loss' in kernels.__all__"
    ),
}

# Each load in a fork of a process with the installed package, so that they share the imports.
# Prints the traceback of each that fails.
COMPARE = """
import json
import os
import sys
import traceback
from pathlib import Path

import fastdino_kernels as installed
import torch
import torch._dynamo
from kernels import get_kernel, get_local_kernel


def compare(kernels):
    assert kernels is not installed and kernels.__file__.startswith(sys.argv[1]), kernels.__file__
    student = torch.randn(4, 3, 17, generator=torch.Generator().manual_seed(0))
    losses = []
    for module in (installed, kernels):
        leaf = student.clone().requires_grad_()
        loss, total = module.dino_loss(
            leaf, student[:2], torch.zeros(17), student_temp=0.1, teacher_temp=0.04
        )
        loss.backward()
        losses.append((loss.detach(), total, leaf.grad))
    assert all(map(torch.equal, *losses))
    compiled = torch.compile(kernels.soft_cross_entropy, fullgraph=True, backend="aot_eager")
    probs = student.softmax(-1)
    expected = kernels.soft_cross_entropy(student, probs, student_temp=0.1)
    assert torch.allclose(compiled(student, probs, student_temp=0.1), expected)


def outcome(load):
    try:
        exec(load, globals())
        compare(kernels)
    except BaseException:
        return traceback.format_exc()
    return "equal"


outcomes = {}
for name, load in json.loads(sys.argv[2]).items():
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, outcome(load).encode()[:60000])
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        outcomes[name] = pipe.read()
    os.wait()
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    HUB["write_hub"](folder, REPO)
    return folder


@pytest.fixture(scope="module")
def outcomes(repository: Path) -> dict[str, str]:
    """The outcome of each of LOADS."""
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    variables = {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"{REPO}={repository}"}
    result = subprocess.run(
        [sys.executable, "-c", COMPARE, str(repository), json.dumps(LOADS)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("load", LOADS)
def test_a_copy_computes_the_same_next_to_the_installed_package(
    outcomes: dict[str, str], load: str
) -> None:
    assert outcomes[load] == "equal"


def test_the_builder_accepts_build_toml(repository: Path) -> None:
    general = Build.open(repository).general
    assert {str(backend).lower() for backend in general.backends} == set(BACKENDS)
    assert (repository / "flake.nix").is_file()
    assert "`dino_loss`" in (repository / "CARD.md").read_text(encoding="utf-8")
    package = repository / "torch-ext/fastdino_kernels"
    assert not (package / "_ops.py").exists()  # the builder writes it
    assert (package / "dino_loss.py").is_file()


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_describes_the_variant(repository: Path, backend: str) -> None:
    variant = repository / f"build/torch-{backend}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.id.isidentifier()
    assert metadata.name.python_name == "fastdino_kernels"
    assert str(metadata.backend.backend_type).lower() == backend
    actual = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    metadata.digest.validate(actual)


def test_a_changed_file_fails_the_digest_and_changes_the_name(tmp_path: Path) -> None:
    files = {**HUB["sources"](), "checks.py": b"changed"}
    HUB["write_variant"](tmp_path, "cpu", files)
    metadata = Metadata.read_from_file(tmp_path / "metadata.json")
    assert not metadata.id.endswith(HUB["fingerprint"](HUB["sources"]()))
    (tmp_path / "checks.py").write_text("changed again", encoding="utf-8")
    with pytest.raises(DigestValidationError, match=r"checks\.py"):
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, tmp_path))


def test_a_second_build_leaves_no_old_file(repository: Path) -> None:
    old = repository / "build/torch-cpu/removed_module.py"
    old.write_text("", encoding="utf-8")
    HUB["write_hub"](repository, REPO)
    assert not old.exists()


def test_the_sources_import_themselves_relatively() -> None:
    for path, content in HUB["sources"]().items():
        for node in ast.walk(ast.parse(content)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert not any(name.startswith("fastdino") for name in names), path


def test_the_sources_run_on_python_3_9() -> None:
    vermin = pytest.importorskip("vermin", reason="vermin is not installed")
    config = vermin.Config()
    config.add_exclusion("long")  # Tensor.long, taken for the number type of Python 2
    for path, content in HUB["sources"]().items():
        if path.endswith(".py"):
            minimum = vermin.visit(content.decode(), config).minimum_versions()
            assert (minimum[1] or (3, 0)) <= (3, 9), path

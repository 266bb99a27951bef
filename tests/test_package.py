"""The layout of the two packages: import direction, module names, and the built distributions."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from email import message_from_string
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Import direction, top to bottom: a module imports only from its own row and the rows below.
# A name covers the module and everything in it. Every module must belong to a row.
ROWS = (
    ("fastdino.__main__", "fastdino.cli", "fastdino.demo", "fastdino.submit"),
    (
        "fastdino.bench", "fastdino.crop_comparison", "fastdino.evals", "fastdino.export",
        "fastdino.info", "fastdino.training",
    ),
    ("fastdino.cpu_speed", "fastdino.runtime"),
    ("fastdino.data", "fastdino.models"),
    ("fastdino.augmentation",),
    (
        "fastdino.checkpoint", "fastdino.config", "fastdino.distributed", "fastdino.epoch_log",
        "fastdino.files", "fastdino.host_memory", "fastdino.liveness", "fastdino.numpy_pickles",
        "fastdino.optimizer_state", "fastdino.rendezvous", "fastdino.requeue", "fastdino.signals",
    ),
    (
        "fastdino.batch_split", "fastdino.environment", "fastdino.errors", "fastdino.file_names",
        "fastdino.launch", "fastdino.terminal", "fastdino.waiting",
    ),
    ("fastdino_kernels",),
)  # fmt: skip
# fastdino/__init__.py re-exports the public names lazily, so it belongs to no row.
FACADE = "fastdino"

# Packages that users of the kernels need not have.
ABSENT = (
    "PIL", "fastdino", "matplotlib", "numba", "numpy", "nvidia.dali", "tensorboard", "timm",
    "torchvision", "tqdm", "xformers",
)  # fmt: skip
HIDE = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))  # an import of None fails, find_spec gives None
sys.path.insert(0, {str(ROOT / "kernels")!r})
"""


def modules_of(folder: Path) -> dict[str, Path]:
    """Map the dotted name of every module of the package in `folder` to its file."""
    files = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


FASTDINO = modules_of(ROOT / "fastdino")
KERNELS = modules_of(ROOT / "kernels/fastdino_kernels")
MODULES = FASTDINO | KERNELS


@cache
def imports(module: str) -> set[str]:
    """Dotted names that a module imports anywhere; `from a import b` gives a.b.

    Includes imports in functions and under TYPE_CHECKING, and import_module("constant").
    """
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            names.update(f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
    return names


def own_module(name: str) -> str | None:
    """Return the module of this repository that a dotted name is, or is defined in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def import_graph() -> dict[str, set[str]]:
    """Map each module to the modules of this repository that it imports.

    `import a.b.c` also runs a and a.b, unless the importer is inside them.
    """
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module in MODULES:
        for name in imports(module):
            target = own_module(name)
            while target and target != FACADE:
                if not within(module, target):
                    graph[module].add(target)
                target = target.rpartition(".")[0]
    return graph


def folder_graph(graph: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """Merge the modules of each folder and file directly in a package into one node."""
    depth = package.count(".") + 2
    merged: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        if within(module, package) and module != package:
            child = ".".join(module.split(".")[:depth])
            siblings = {".".join(t.split(".")[:depth]) for t in targets if within(t, package)}
            merged[child] |= siblings - {child, package}
    return merged


def importers(package: str) -> set[str]:
    """Return the modules of this repository that import a package or something in it."""
    return {module for module in MODULES if any(within(name, package) for name in imports(module))}


def row_of(module: str) -> int | None:
    """Return the row a module belongs to."""
    rows = (i for i, names in enumerate(ROWS) if any(within(module, name) for name in names))
    return next(rows, None)


def test_import_graph_includes_every_kind_of_import(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__", "lazy", "typed", "named", "relative", "inner/__init__", "inner/leaf"):
        (package / f"{name}.py").touch()
    (package / "user.py").write_text("""
from typing import TYPE_CHECKING
from . import relative
if TYPE_CHECKING:
    from package.typed import Type
def function():
    import package.lazy
    importlib.import_module("package.named")
    from package.inner.leaf import value
""")
    monkeypatch.setattr(sys.modules[__name__], "MODULES", modules_of(package))
    names = {"relative", "typed", "lazy", "named", "inner", "inner.leaf"}
    assert import_graph()["package.user"] == {f"package.{name}" for name in names}


def test_rows_hold_every_module_and_only_modules_that_exist():
    assert {module for module in MODULES if row_of(module) is None} == {FACADE}
    assert {name for names in ROWS for name in names} <= set(MODULES)


def test_modules_import_from_their_own_row_or_below():
    upward = [
        f"{module} -> {target}"
        for module, targets in import_graph().items()
        for target in targets
        if module != FACADE and row_of(module) > row_of(target)
    ]
    assert not upward


def test_no_circle_of_modules_or_of_folders():
    graph = import_graph()
    packages = {module.rpartition(".")[0] for module in MODULES} & set(MODULES)
    for nodes in (graph, *(folder_graph(graph, package) for package in packages)):
        TopologicalSorter(nodes).prepare()  # raises CycleError with the nodes of a circle


def test_modules_import_only_the_version_from_the_root_package():
    names = {name for module in FASTDINO for name in imports(module) if own_module(name) == FACADE}
    assert names <= {"fastdino", "fastdino.__version__"}


def test_no_module_name_occurs_twice():
    modules: dict[str, list[str]] = defaultdict(list)
    for folder in ("benchmarks", "fastdino", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            modules[file.stem].append(str(file.relative_to(ROOT)))
    del modules["__init__"]
    assert not [files for files in modules.values() if len(files) > 1]


def test_kernels_import_only_torch_triton_and_the_standard_library():
    allowed = {"fastdino_kernels", "torch", "triton"} | sys.stdlib_module_names
    foreign = [
        f"{module} -> {name}"
        for module in KERNELS
        for name in imports(module)
        if name.partition(".")[0] not in allowed
    ]
    assert not foreign


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("benchmarks", set()),
        ("tests", set()),
        ("fastdino.cli", {"fastdino.__main__", "fastdino.demo"}),
        ("av", {"fastdino.evals.video_io"}),
        ("numba", {"fastdino.augmentation.cpu_kernels"}),
        ("nvidia.dali", {"fastdino.augmentation.dali", "fastdino.data.dali_decoding"}),
        ("xformers", {"fastdino.models.attention"}),
    ],
)
def test_package_is_imported_only_by(package, modules):
    assert importers(package) == modules


def test_kernels_folder_is_not_a_package():
    # An installed top-level `kernels` would shadow Hugging Face's package of that name.
    assert not (ROOT / "kernels/__init__.py").exists()


def run_without(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process that cannot import the packages in ABSENT."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE + code],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )


def test_kernels_run_with_torch_alone(tmp_path):
    code = """
import torch
from fastdino_kernels import dino_loss

student = torch.randn(3, 2, 5, requires_grad=True)
loss, _ = dino_loss(
    student, torch.randn(2, 2, 5), torch.zeros(5), student_temp=0.1, teacher_temp=0.04
)
loss.backward()
assert student.grad.abs().sum() > 0
print("ran")
"""
    result = run_without(code, tmp_path)
    assert (result.returncode, result.stdout) == (0, "ran\n"), result.stderr


@pytest.mark.parametrize("name", ["fastdino", "nvidia.dali", "numpy"])
def test_hidden_packages_cannot_be_imported(name, tmp_path):
    result = run_without(f"import {name}", tmp_path)
    assert result.returncode == 1
    assert f"ModuleNotFoundError: import of {name} halted" in result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with an sdist and the wheel built from it, made from a copy of the repository."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    for name in ("benchmarks", "fastdino", "kernels", "tests"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, tree)
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture
def sdist(built) -> set[str]:
    """The files of the sdist, relative to its top folder."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture
def wheel(built) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


def files_of(folder: Path) -> set[str]:
    """Return the modules and py.typed of the package in `folder`, relative to its parent."""
    files = [*modules_of(folder).values(), folder / "py.typed"]
    return {file.relative_to(folder.parent).as_posix() for file in files}


def test_wheel_contains_exactly_the_two_packages(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_of(ROOT / "fastdino") | files_of(ROOT / "kernels/fastdino_kernels")


def test_sdist_contains_both_packages_but_no_tests_or_benchmarks(sdist):
    kernels = {f"kernels/{path}" for path in files_of(ROOT / "kernels/fastdino_kernels")}
    others = {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert files_of(ROOT / "fastdino") | kernels | others <= sdist
    assert not {name for name in sdist if name.startswith(("tests", "benchmarks"))}


def test_metadata_has_license_readme_requirements_and_entry_point(wheel):
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_string(wheel.read(info).decode())
    required = {r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert {requirement.split(">=")[0] for requirement in required} == {"torch", "triton"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert info.replace("METADATA", "licenses/LICENSE") in wheel.namelist()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.strip() in wheel.read(info).decode()
    entry_points = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "fastdino = fastdino.__main__:run" in entry_points

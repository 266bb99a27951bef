"""What is installed and what imports what: the two packages, apart and one way."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Top to bottom: a module may import, itself or through others, what stands in its own row or
# below. Modules that stand in no row are free, as far as they close no circle.
ROWS = (
    ("fastdino.__main__", "fastdino.demo"),
    ("fastdino.cli",),
    (
        "fastdino.bench", "fastdino.crop_comparison", "fastdino.evals", "fastdino.export",
        "fastdino.info",
    ),
    ("fastdino.training.loop",),
    ("fastdino.training.logging", "fastdino.models.weights"),
    ("fastdino.training.trainer",),
    ("fastdino.data", "fastdino.models.backbones", "fastdino.training.optimizers"),
    ("fastdino.checkpoint", "fastdino.config", "fastdino.distributed", "fastdino.environment"),
    ("fastdino.errors",),
    ("fastdino_kernels",),
)  # fmt: skip

# What a caller of the kernels need not have.
ABSENT = (
    "PIL", "fastdino", "matplotlib", "numba", "numpy", "nvidia.dali", "tensorboard", "timm",
    "torchvision", "tqdm", "xformers",
)  # fmt: skip
# Finders that pass over a name, not one that raises: torch asks for some with find_spec.
HIDE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if any((name + ".").startswith(absent + ".") for absent in {ABSENT}):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
sys.path.insert(0, {str(ROOT / "kernels")!r})
"""


def modules_of(folder: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package in `folder`."""
    files = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


FASTDINO = modules_of(ROOT / "fastdino")
KERNELS = modules_of(ROOT / "kernels/fastdino_kernels")
MODULES = FASTDINO | KERNELS


def statements(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """Every node that runs, or at module level runs on import; none that is for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if not into_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield child
        yield from statements(child, into_functions=into_functions)


def imported_by(node: ast.AST, module: str, file: Path) -> list[str]:
    """The dotted names that one statement, or a call of import_module, imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        above = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*above, *filter(None, [node.module])])
        return [f"{source}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def imports(module: str, *, into_functions: bool = True) -> set[str]:
    """Dotted names that a module imports; of `from a import b`, a.b."""
    file = MODULES[module]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = statements(tree, into_functions=into_functions)
    return {name for node in nodes for name in imported_by(node, module, file)}


def own_module(name: str) -> str | None:
    """The module of ours that a dotted name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def import_graph(*, into_functions: bool) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, with the packages that those make run."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        graph[module] = set()
        for name in imports(module, into_functions=into_functions):
            target = own_module(name)
            if target is None:
                continue
            graph[module].add(target)
            # `import a.b.c` runs a and a.b first, but for those in which the importer itself is.
            while target := target.rpartition(".")[0]:
                if not f"{module}.".startswith(f"{target}."):
                    graph[module].add(target)
        graph[module].discard(module)
    return graph


def reachable(graph: dict[str, set[str]], module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def importers(package: str) -> set[str]:
    """Modules of ours that import a package or something in it."""
    return {module for module in MODULES if any(within(name, package) for name in imports(module))}


def row(module: str) -> int | None:
    for i, names in enumerate(ROWS):
        if any(within(module, name) for name in names):
            return i
    return None


def test_the_graph_sees_imports():
    graph = import_graph(into_functions=False)
    assert "fastdino.training.trainer" in graph["fastdino.training.loop"]
    assert "fastdino.data" in graph["fastdino.training.loop"]
    assert "fastdino_kernels" in graph["fastdino.training.trainer"]
    assert "fastdino_kernels.reference" in graph["fastdino_kernels.clip"]  # a relative import
    assert "fastdino.data.loader_dali" in import_graph(into_functions=True)["fastdino.data.loader"]


def test_no_module_imports_itself_through_others():
    graph = import_graph(into_functions=False)
    circles = {module for module in graph if module in reachable(graph, module)}
    assert not circles


@pytest.mark.parametrize("into_functions", [False, True])
def test_imports_run_one_way(into_functions):
    graph = import_graph(into_functions=into_functions)
    upward = [
        f"{module} -> {other}"
        for module in graph
        for other in reachable(graph, module)
        if None not in (place := (row(module), row(other))) and place[0] > place[1]
    ]
    assert not upward


def test_rows_name_modules_that_exist():
    assert {name for names in ROWS for name in names} <= set(MODULES)


def test_only_main_and_demo_import_the_command_line():
    assert importers("fastdino.cli") <= {"fastdino.__main__", "fastdino.demo"}


def test_kernels_import_torch_triton_and_the_standard_library_alone():
    allowed = {"fastdino_kernels", "torch", "triton"} | sys.stdlib_module_names
    foreign = [
        f"{module} -> {name}"
        for module in KERNELS
        for name in imports(module)
        if name.partition(".")[0] not in allowed
    ]
    assert not foreign


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("av", {"fastdino.evals.video_io"}),
        ("numba", {"fastdino.augmentation.cpu_kernels"}),
        ("nvidia.dali", {"fastdino.data.dali_decoding", "fastdino.data.loader_dali"}),
        ("xformers", {"fastdino.models.attention"}),
    ],
)
def test_few_modules_import(package, homes):
    assert importers(package) == homes


def test_the_folder_kernels_is_not_a_package():
    # An installed top-level `kernels` would shadow the package of that name.
    assert not (ROOT / "kernels/__init__.py").exists()


def run_without(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that cannot import what ABSENT names."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE + code],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )


def test_kernels_run_where_there_is_nothing_but_torch(tmp_path):
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
def test_what_is_hidden_cannot_be_imported(name, tmp_path):
    result = run_without(f"import {name}", tmp_path)
    assert result.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with an sdist and the wheel made from it; built from a copy of the tree."""
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
    """Paths in the sdist, below its one folder."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture
def wheel(built) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


def paths(folder: Path) -> set[str]:
    """Every module and marker of the package in `folder`, relative to what the folder is in."""
    files = [*folder.rglob("*.py"), folder / "py.typed"]
    return {file.relative_to(folder.parent).as_posix() for file in files}


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == paths(ROOT / "fastdino") | paths(ROOT / "kernels/fastdino_kernels")


def test_the_sdist_holds_both_packages_and_what_builds_them(sdist):
    kernels = {f"kernels/{path}" for path in paths(ROOT / "kernels/fastdino_kernels")}
    others = {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert paths(ROOT / "fastdino") | kernels | others <= sdist


def test_the_sdist_holds_neither_tests_nor_benchmarks(sdist):
    assert not {name for name in sdist if name.startswith(("tests", "benchmarks"))}


def test_the_metadata_tells_licence_description_and_what_is_needed(wheel):
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_string(wheel.read(info).decode())
    needed = {r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert {requirement.split(">=")[0] for requirement in needed} == {"torch", "triton"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert info.replace("METADATA", "licenses/LICENSE") in wheel.namelist()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.strip() in wheel.read(info).decode()
    entry_points = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "fastdino = fastdino.cli:main" in entry_points

"""Run other repositories' own tests of their losses with the lines of kernels/README.md replaced.

    python -m tests.original_suites [--checkouts FOLDER] [REPOSITORY ...]

FOLDER has checkouts in folders with the names of the repositories; an environment variable, such as
LIGHTLY_TRAIN, names another folder for one. A checkout is copied, never changed. The interpreter
must have the repositories' requirements. Repositories without a checkout are skipped.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "kernels/README.md"
HEADER = "| repository | file | before | after |"
# These repositories have no tests of losses. Their lines are looked up, and our own tests compare
# with their code (tests/originals.py).
COMPARED = ("dino", "dinov2", "ibot", "capi")
SCRIPT = "your script"  # in the guide: no file of the repository


@dataclass(frozen=True)
class Line:
    """A row of the guide's table: a line of a repository's file and its replacement."""

    repository: str
    file: str
    before: str
    after: str


@dataclass(frozen=True)
class Suite:
    """The tests of one repository, and the lines that they need beyond those of the guide."""

    repository: str
    tests: tuple[str, ...]
    lines: tuple[tuple[str, str, str], ...] = ()  # (file, before, after)
    source: str = "."  # folder to import from
    select: str = ""  # pytest's -k


@dataclass(frozen=True)
class Result:
    """Numbers of tests, and the names of those that failed."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    log: str


LIGHTLY = "from fastdino_kernels.compat.lightly import"
STABLE = "from fastdino_kernels.compat.stable_pretraining import"
SUITES = (
    Suite(
        "lightly",
        (
            "tests/loss/test_dino_loss.py",
            "tests/loss/test_ibot_loss.py",
            "tests/loss/test_ibot_plusplus_loss.py",
            "tests/loss/test_koleo_loss.py",
            "tests/models/modules/test_center.py",
        ),
        (
            ("tests/loss/test_dino_loss.py", "from lightly.loss import", LIGHTLY),
            ("tests/loss/test_ibot_loss.py", "from lightly.loss.ibot_loss import", LIGHTLY),
            (
                "tests/loss/test_ibot_plusplus_loss.py",
                "from lightly.loss.ibot_loss import",
                LIGHTLY,
            ),
            ("tests/loss/test_koleo_loss.py", "from lightly.loss.koleo_loss import", LIGHTLY),
            (
                "tests/models/modules/test_center.py",
                "from lightly.models.modules.center import",
                LIGHTLY,
            ),
        ),
    ),
    Suite(
        "lightly-train",
        ("tests/_methods/dino", "tests/_methods/dinov2"),
        (
            (
                "tests/_methods/dinov2/test_dinov2_loss.py",
                "from lightly_train._methods.dinov2.dinov2_loss import",
                "from fastdino_kernels.compat.lightly_train import",
            ),
        ),
        source="src",
    ),
    Suite(
        "solo-learn",
        ("tests/losses/test_dino.py", "tests/methods/test_dino.py"),
        (
            (
                "tests/losses/test_dino.py",
                "from solo.losses import",
                "from fastdino_kernels.compat.solo_learn import",
            ),
        ),
    ),
    Suite(
        "stable-pretraining",
        (
            "stable_pretraining/tests/unit/test_ibot_patch_loss.py",
            "stable_pretraining/tests/unit/test_methods_smoke.py",
            "stable_pretraining/tests/unit/test_forward_functions.py",
        ),
        (
            (
                "stable_pretraining/tests/unit/test_ibot_patch_loss.py",
                "from stable_pretraining.losses.dino import",
                STABLE,
            ),
        ),
        select="dino or ibot or msn",
    ),
)


def guide_lines(text: str) -> list[Line]:
    """Return the rows of the guide's table of lines to replace."""
    _, found, rest = text.partition(f"{HEADER}\n")
    if not found:
        raise ValueError(f"expected a table with the header {HEADER!r} in the guide, found none")
    rows = rest.partition("\n\n")[0].splitlines()[1:]
    return [Line(*(_cell(cell) for cell in re.split(r"(?<!\\)\|", row)[1:-1])) for row in rows]


def _cell(text: str) -> str:
    text = text.strip()
    return text[1:-1] if text.startswith("`") and text.endswith("`") else text


def checkout_of(repository: str, folder: Path | None) -> Path | None:
    """Return the checkout that a variable or the folder of checkouts has, or None."""
    named = os.environ.get(variable_of(repository))
    path = Path(named) if named else folder / repository if folder else None
    return path if path and path.is_dir() else None


def variable_of(repository: str) -> str:
    """Return the environment variable that names a repository's checkout."""
    return repository.upper().replace("-", "_")


def replace_line(tree: Path, file: str, before: str, after: str) -> None:
    """Replace every occurrence of a line in a file of a copied checkout.

    Raises: ValueError: the file does not exist, or does not have the line.
    """
    text = read_with_line(tree, file, before)
    (tree / file).write_text(text.replace(before, after), encoding="utf-8")


def read_with_line(tree: Path, file: str, line: str) -> str:
    """Return the text of a file of a checkout; raise ValueError unless it has the line."""
    path = tree / file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if line not in text:
        raise ValueError(f"expected the line {line!r} in {file}, found none")
    return text


def run_suite(suite: Suite, checkout: Path, lines: Sequence[Line]) -> Result:
    """Run a suite in a copy of a checkout, with its lines and those of the guide replaced."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "checkout"
        shutil.copytree(checkout, tree, ignore=shutil.ignore_patterns(".git"), symlinks=True)
        for line in lines:
            if line.repository == suite.repository:
                replace_line(tree, line.file, line.before, line.after)
        for file, before, after in suite.lines:
            replace_line(tree, file, before, after)
        options = ["-k", suite.select] if suite.select else []
        paths = [tree / suite.source, ROOT / "kernels"]
        return run_pytest([*suite.tests, *options], tree, paths, Path(folder) / "report.xml")


def run_pytest(arguments: Sequence[str], tree: Path, paths: Sequence[Path], report: Path) -> Result:
    """Run pytest in a folder, with folders to import from, and read its report."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "XFORMERS_DISABLED": "1",  # its attention needs a GPU
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    done = subprocess.run(
        [*command, *arguments],
        cwd=tree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return read_report(report, done.stdout)


def read_report(report: Path, log: str) -> Result:
    """Read pytest's report; a run that wrote none, or ran no test, counts as failed."""
    cases = ElementTree.parse(report).findall(".//testcase") if report.exists() else []
    failed, skipped = [], 0
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
    passed = len(cases) - len(failed) - skipped
    if passed + len(failed) == 0:
        failed.append("no test ran")
    return Result(passed, skipped, tuple(failed), log)


def run_comparisons(checkouts: dict[str, Path], lines: Sequence[Line]) -> Result:
    """Look up the guide's lines, and run those of our tests that compare with the checkouts."""
    for line in lines:
        if line.repository in checkouts:
            read_with_line(checkouts[line.repository], line.file, line.before)
    files = [
        str(file)
        for file in sorted((ROOT / "tests").glob("test_*.py"))
        if "from tests.originals import" in file.read_text(encoding="utf-8")
    ]
    for repository, path in checkouts.items():
        os.environ[variable_of(repository)] = str(path.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return run_pytest(files, ROOT, [ROOT, ROOT / "kernels"], Path(folder) / "report.xml")


def run_and_show(name: str, run: Callable[[], Result]) -> Result:
    """Run a suite and print its result; a line that a checkout does not have is a failure."""
    try:
        result = run()
    except ValueError as error:
        result = Result(0, 0, (str(error),), "")
    show(name, result)
    return result


def show(repository: str, result: Result) -> None:
    """Print one line with the numbers, and the failures."""
    numbers = f"{result.passed} passed, {len(result.failed)} failed, {result.skipped} skipped"
    print(f"{repository}: {numbers}", flush=True)
    for name in result.failed:
        print(f"    {name}")
    if result.failed:
        print("\n".join(f"    {line}" for line in result.log.splitlines()[-20:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites of all checkouts; 1 if a test failed or there is no checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [suite.repository for suite in SUITES] + list(COMPARED)
    parser.add_argument("--checkouts", type=Path, help="folder with the checkouts")
    parser.add_argument("repositories", nargs="*", metavar="REPOSITORY", help=", ".join(names))
    options = parser.parse_args(arguments)
    chosen = options.repositories or names
    if unknown := set(chosen) - set(names):
        parser.error(f"expected repositories of {', '.join(names)}, got {', '.join(unknown)}")
    results: list[Result] = []
    found = {name: checkout_of(name, options.checkouts) for name in chosen}
    for name, path in found.items():
        if path is None:
            print(f"{name}: skipped, no checkout (set {variable_of(name)} or --checkouts)")
    lines = [row for row in guide_lines(GUIDE.read_text(encoding="utf-8")) if row.file != SCRIPT]
    for suite in SUITES:
        if path := found.get(suite.repository):
            run = functools.partial(run_suite, suite, path, lines)
            results.append(run_and_show(suite.repository, run))
    if compared := {name: path for name in COMPARED if (path := found.get(name))}:
        run = functools.partial(run_comparisons, compared, lines)
        results.append(run_and_show(", ".join(compared), run))
    return int(not results or any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())

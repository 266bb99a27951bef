"""Run the tests of mutants in copies of the repository, one forked process per mutant.

A worker imports the slow libraries once and forks per mutant, so a mutant costs the time of its
tests. The project itself is imported in the fork, from the copy with the mutated file.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.mutants.mutant import ROOT, Mutant

LIBRARIES = (
    "torch", "torchvision", "timm", "triton", "numba", "matplotlib.pyplot", "hypothesis",
    "PIL.Image", "torch.utils.tensorboard", "torch.distributed.checkpoint",
)  # fmt: skip
# Plugins of pytest that these tests do not use; together they take longer than most tests.
UNUSED_PLUGINS = ("anyio", "hydra_pytest", "platformdirs", "xdist", "xdist.looponfail")
# Tests that take this many times as long as without a mutant, and this many seconds more, hang.
TIME_FACTOR, TIME_EXTRA = 4.0, 30.0
CRASHED = "the process died"


@dataclass(frozen=True)
class Outcome:
    """The result of a mutant's tests.

    killed_by: the first test that fails, "" for a survivor. Without a verdict of a test, what ended
        the tests instead: "time limit", "the process died", "collection fails" or a file.
    """

    key: str
    killed_by: str
    seconds: float

    def state(self, mutant: Mutant) -> str:
        """Return "killed", "crash", "survived", or "no verdict" if the tests ended without one.

        A slow mutant reaches the time limit without being noticed, for example if it only compiles
        more often, and a crash without an explanation may be the machine's: neither is a kill.
        """
        if not self.killed_by:
            return "survived"
        if "::" in self.killed_by:
            return "killed"
        return "crash" if mutant.crash and self.killed_by == CRASHED else "no verdict"


class Journal:
    """Outcomes in a file of JSON lines, so that an interrupted run continues."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def outcomes(self) -> dict[str, Outcome]:
        """Return the outcomes by key."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        rows = [Outcome(**json.loads(line)) for line in lines]
        return {row.key: row for row in rows}

    def add(self, outcome: Outcome) -> None:
        """Append an outcome; one write, so workers do not mix their lines."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def run(mutants: Sequence[Mutant], journal: Journal, jobs: int) -> None:
    """Run the mutants that the journal lacks, in `jobs` processes.

    Raises: RuntimeError if the tests fail without a mutant.
    """
    known = journal.outcomes()
    # Mutants of one file follow each other: most have the same tests, which are timed once.
    missing = sorted((m for m in mutants if m.key() not in known), key=lambda m: m.selection())
    jobs = max(1, min(jobs, len(missing)))
    size = -(-len(missing) // jobs)
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(missing[i * size : (i + 1) * size], journal))
        for i in range(jobs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("a worker failed: its message is above")


def _work(mutants: Sequence[Mutant], journal: Journal) -> None:
    with _copy_of_repository() as copy:
        _import_libraries()
        seconds: dict[tuple[str, ...], float] = {}
        for mutant in mutants:
            tests = mutant.selection()
            if tests not in seconds:
                failed, seconds[tests] = _run_tests(copy, tests, limit=1800)
                if failed:
                    raise SystemExit(f"{' '.join(tests)} fails without a mutant: {failed}")
            limit = TIME_FACTOR * seconds[tests] + TIME_EXTRA
            with _mutated(copy, mutant):
                killed_by, took = _run_tests(copy, tests, limit)
            outcome = Outcome(mutant.key(), killed_by, round(took, 1))
            journal.add(outcome)
            print(f"{outcome.state(mutant):10} {took:5.0f} s  {mutant.file}: {mutant.became!r}  "
                  f"{killed_by}", flush=True)  # fmt: skip


@contextlib.contextmanager
def _copy_of_repository() -> Iterator[Path]:
    """Copy what git tracks or would add to a temporary folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="fastdino-mutants-") as folder:
        for name in filter(None, listed.split("\0")):
            source, target = ROOT / name, Path(folder) / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield Path(folder)


@contextlib.contextmanager
def _mutated(copy: Path, mutant: Mutant) -> Iterator[None]:
    path = copy / mutant.file
    original = path.read_bytes()
    path.write_text(mutant.source(copy), encoding="utf-8")
    try:
        yield
    finally:
        path.write_bytes(original)


def _import_libraries() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as in conftest.py, before triton is imported
    # Bytecode is matched by time and size, which a mutant may share with the original.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # pytest collects garbage several times, and would visit and copy all of this


def _run_tests(copy: Path, tests: Sequence[str], limit: float) -> tuple[str, float]:
    """Run tests in a forked process; return the first failure ("" if none) and the seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "failure"
        child = os.fork()
        if child == 0:
            try:
                _run_pytest(copy, tests, report)
            finally:
                os._exit(1)  # never return into the worker's code
        ended = _wait(child, limit)
        failure = report.read_text(encoding="utf-8") if report.exists() else CRASHED
    return failure if ended else "time limit", time.monotonic() - started


def _wait(child: int, limit: float) -> bool:
    """Wait for a child; at the limit, kill it with all processes that it started."""
    end = time.monotonic() + limit
    ended = False
    while not ended and time.monotonic() < end:
        ended = os.waitpid(child, os.WNOHANG)[0] == child
        time.sleep(0 if ended else 0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    return ended


def _run_pytest(copy: Path, tests: Sequence[str], report: Path) -> None:
    """Write the first failure to `report`; changes the process, which must end afterwards."""
    os.setsid()
    os.chdir(copy)
    path = [str(copy), str(copy / "kernels")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    sys.path[:0] = path
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "fastdino")]:
        del sys.modules[name]  # the runner itself comes from the original
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    failure = _Failure()
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    options += [word for name in UNUSED_PLUGINS for word in ("-p", f"no:{name}")]
    # The libraries were imported before pytest could rewrite their assertions.
    options += ["-W", "ignore::pytest.PytestWarning"]
    # NumPy warns about the arithmetic of Triton's interpreter: a value has to fail, no warning.
    options += ["-W", "ignore::RuntimeWarning"]
    status = pytest.main([*options, *tests], plugins=[failure])
    known = {pytest.ExitCode.OK: "", pytest.ExitCode.NO_TESTS_COLLECTED: "no test was collected"}
    report.write_text(failure.test or known.get(pytest.ExitCode(status), "collection fails"))


class _Failure:
    """A plugin of pytest that keeps the first failing test."""

    test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

"""Run commands with a time limit each; one that fails or hangs does not stop the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE = 5.0  # seconds after SIGINT, to write partial results


@dataclass(frozen=True)
class Task:
    """A command and its time limit in seconds."""

    name: str
    command: Sequence[str]
    timeout: float


@dataclass(frozen=True)
class Result:
    """Output of a task; `problem` is empty if it succeeded."""

    name: str
    seconds: float
    problem: str
    output: str

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1].strip("= ") if lines else ""


def run_task(task: Task, grace: float = GRACE) -> Result:
    """Run a task; at its time limit interrupt it, then kill it and its children."""
    start = time.perf_counter()
    # The output goes to a file: a grandchild could keep a pipe open. A session of its own allows
    # to kill the whole process group.
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_variables(),
            start_new_session=True,
            preexec_fn=_accept_interrupts,
        )
        problem = _wait(process, task.timeout, grace)
        output.seek(0)
        return Result(task.name, time.perf_counter() - start, problem, output.read())


def _accept_interrupts() -> None:
    """Undo the ignored SIGINT of commands that a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], timeout: float, grace: float) -> str:
    """Wait for the process and kill its group; returns the problem or ""."""
    try:
        code = process.wait(timeout)
        problem = f"exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {timeout:.0f} s"
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return problem


def _variables() -> dict[str, str]:
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

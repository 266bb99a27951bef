"""Run commands with a time limit each; one that fails or hangs does not stop the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE = 5.0  # seconds after SIGINT, to write partial results
# Marks a task's processes, so that those which leave its process group are found. They inherit it.
MARK = "FASTDINO_TASK"


@dataclass(frozen=True)
class Task:
    """A command that may take `seconds`, killing included."""

    name: str
    command: Sequence[str]
    seconds: float


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
    """Run a task; `grace` seconds before its limit interrupt it, then kill all its processes."""
    start = time.perf_counter()
    mark = uuid.uuid4().hex
    # The output goes to a file: a grandchild could keep a pipe open. A session of its own allows
    # to interrupt the whole process group.
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                task.command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_variables() | {MARK: mark},
                start_new_session=True,
                preexec_fn=_accept_interrupts,
            )
        except OSError as error:
            return Result(task.name, 0.0, f"not started: {error}", "")
        problem = _wait(process, max(task.seconds - grace, 0.0), grace)
        if not _kill(process, mark):
            problem = f"{problem}; its process could not be killed".removeprefix("; ")
        output.seek(0)
        return Result(task.name, time.perf_counter() - start, problem, output.read())


def run_tasks(tasks: Sequence[Task], grace: float = GRACE) -> list[Result]:
    """Run tasks at the same time."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(lambda task: run_task(task, grace), tasks))


def _accept_interrupts() -> None:
    """Undo the ignored SIGINT of commands that a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], timeout: float, grace: float) -> str:
    """Wait for the process, interrupting it at the end; returns the problem or ""."""
    try:
        code = process.wait(timeout)
        return f"exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(grace)
        return f"stopped after {timeout:.0f} s"


def _kill(process: subprocess.Popen[bytes], mark: str) -> bool:
    """Kill the task's processes; returns False if its first one does not end.

    A process that waits inside the GPU's driver may ignore SIGKILL.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for _ in range(10):  # one that is being killed may have started another
        marked = list(marked_processes(mark))
        if not marked:
            break
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        return False
    return True


def marked_processes(mark: str) -> Iterator[int]:
    """Yield the processes with this mark in their environment; none without /proc."""
    wanted = f"{MARK}={mark}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in environment.read_bytes().split(b"\0"):
                yield int(environment.parent.name)


def _variables() -> dict[str, str]:
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

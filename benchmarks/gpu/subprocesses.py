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
    """Run one task; see run_tasks."""
    return run_tasks([task], grace)[0]


def run_tasks(tasks: Sequence[Task], grace: float = GRACE) -> list[Result]:
    """Run tasks at the same time.

    `grace` seconds before its limit a task is interrupted. When it has ended, or at its limit, all
    its processes are killed. An interrupt of the caller kills all tasks, too.
    """
    running = [_Running(task, grace) for task in tasks]
    try:
        while [one for one in running if not one.has_ended()]:
            time.sleep(0.05)
    finally:
        results = [one.finish("interrupted") for one in running]
    return results


class _Running:
    """A started task."""

    def __init__(self, task: Task, grace: float) -> None:
        self.task, self.grace = task, grace
        self.start, self.interrupted = time.perf_counter(), False
        self.mark = uuid.uuid4().hex
        self.result: Result | None = None  # None: it runs
        # A file, because a grandchild could keep a pipe open.
        self.output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.process = subprocess.Popen(
                task.command,
                cwd=ROOT,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                env=_variables() | {MARK: self.mark},
                start_new_session=True,  # allows to interrupt the whole process group
                preexec_fn=_accept_interrupts,
            )
        except OSError as error:
            self.finish(f"not started: {error}")

    def has_ended(self) -> bool:
        """Interrupt and kill the task in time; return True if it has ended."""
        if self.result is not None or self.process is None:
            return True
        elapsed, limit = time.perf_counter() - self.start, self.task.seconds - self.grace
        code = self.process.poll()
        if self.interrupted and (code is not None or elapsed >= self.task.seconds):
            self.finish(f"stopped after {max(limit, 0):.0f} s")
        elif code is not None:
            self.finish(f"exit status {code}" if code else "")
        elif elapsed >= limit and not self.interrupted:
            self.interrupted = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGINT)
        return self.result is not None

    def finish(self, problem: str) -> Result:
        """Kill what is left of the task and return its result, which stays the same."""
        if self.result is None:
            if self.process is not None and not _kill(self.process, self.mark):
                problem = f"{problem}; its process could not be killed".removeprefix("; ")
            with self.output:
                self.output.seek(0)
                seconds = time.perf_counter() - self.start
                self.result = Result(self.task.name, seconds, problem, self.output.read())
        return self.result


def _accept_interrupts() -> None:
    """Undo the ignored SIGINT of commands that a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _kill(process: subprocess.Popen[bytes], mark: str) -> bool:
    """Kill the task's processes; return False if its first one does not end.

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

"""Runs commands, each in a time of its own: one that fails or hangs stops none of the others."""

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
GRACE = 5.0  # seconds after SIGINT, to write down what there is


@dataclass(frozen=True)
class Part:
    """A command, and the seconds that it may take."""

    name: str
    command: Sequence[str]
    timeout: float


@dataclass(frozen=True)
class Result:
    """What came of a part; `problem` is empty where it went well."""

    name: str
    seconds: float
    problem: str
    output: str

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1].strip("= ") if lines else ""


def run_part(part: Part, grace: float = GRACE) -> Result:
    """Run one part; at the end of its time interrupt it, then kill it and all that it started."""
    start = time.perf_counter()
    # Output to a file, not to a pipe, which a grandchild could hold open; a session of its own, so
    # that the whole group can be ended.
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_variables(),
            start_new_session=True,
            preexec_fn=_take_interrupts,
        )
        problem = _wait(process, part.timeout, grace)
        output.seek(0)
        return Result(part.name, time.perf_counter() - start, problem, output.read())


def _take_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], timeout: float, grace: float) -> str:
    """What went wrong, or ""; nothing of the process's group is left."""
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

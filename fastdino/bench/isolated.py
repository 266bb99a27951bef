"""A callable in a process of its own: its threads, its memory and its hanging stay there.

Competitors need that. Workers that are forked beside another one's threads can wait for ever for
locks which those held; here each process is made by a server that has no threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

# Imported once, by the server: its children then start in no time.
_PRELOADED = ["fastdino.bench.arms", "fastdino.bench.rivals"]
_GRACE = 10.0  # seconds that a process gets to end by itself


class WorkerError(Exception):
    """What went wrong in a process, in a phrase; `missing` where a package is not installed."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


class Isolated:
    """Calls `make()` in a new process, then what that returns for each call().

    Args:
        make: picklable. What it returns takes one picklable argument; its close(), if it has one,
            ends it.
        processors: the process and its children are kept to so many of them, where the system can.
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]], *, processors: int) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        # Not a daemon: those may have no children.
        self._process = context.Process(target=_serve, args=(theirs, make, processors))
        self._process.start()
        theirs.close()

    def wait_until_made(self, timeout: float) -> None:
        """Raises WorkerError where make() raised, or took longer than `timeout` seconds."""
        self._answer(timeout)

    def call(self, argument: Any, timeout: float) -> Any:
        """The result; raises WorkerError, after which the process is gone, as wait_until_made."""
        try:
            self._pipe.send(argument)
        except OSError:
            self.kill()
            raise WorkerError("its process has ended") from None
        return self._answer(timeout)

    def _answer(self, timeout: float) -> Any:
        try:
            if not self._pipe.poll(timeout):
                self.kill()
                raise WorkerError(f"no answer within {timeout:.0f} s")
            good, value = self._pipe.recv()
        except (EOFError, OSError):
            self.kill()
            raise WorkerError("its process died") from None
        if not good:
            self.kill()
            reason, missing = value
            raise WorkerError(reason, missing=missing)
        return value

    def close(self) -> None:
        """Ends the process and its children: by itself, or by force where that takes too long."""
        if not self._pipe.closed:
            try:
                self._pipe.send(None)
                self._process.join(_GRACE)
            except OSError:
                pass
        self.kill()

    def kill(self) -> None:
        """Ends the process and its children at once."""
        if self._pipe.closed:
            return
        pid = self._process.pid
        assert pid is not None
        try:
            # Its group, which lives on as long as any child does.
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _context() -> SpawnContext | ForkServerContext:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _serve(
    pipe: Connection[Any, Any], make: Callable[[], Callable[[Any], Any]], processors: int
) -> None:
    os.setsid()  # A group of its own, for kill(), and a session, for session_cpu_seconds().
    if sys.platform == "linux":
        # As long as a process has no threads its workers can be forked, in no time.
        multiprocessing.set_start_method("fork", force=True)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
    function: Callable[[Any], Any] | None = None
    try:
        function = make()
        pipe.send((True, None))
        while (argument := pipe.recv()) is not None:
            pipe.send((True, function(argument)))
    except (EOFError, BrokenPipeError):  # whoever asked is gone
        pass
    except Exception as error:  # Of whatever is compared: told in its row, the others go on.
        pipe.send((False, (_reason(error), isinstance(error, ModuleNotFoundError))))
    finally:
        close = getattr(function, "close", None)
        if close is not None:
            close()


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.split('.')[0]} is not installed"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def session_cpu_seconds() -> float | None:
    """CPU seconds so far of all processes of this one's session; None where there is no /proc.

    In steps of a clock tick (10 ms) a process. Those that have ended count if this one waited for
    them.
    """
    if sys.platform != "linux":
        return None
    session, ticks = os.getsid(0), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything: state, ppid, pgrp, session, ...
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    ended = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") + ended.children_user + ended.children_system

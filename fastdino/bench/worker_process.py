"""A callable that runs in a process of its own, with its threads and memory.

Forking workers next to another baseline's threads can deadlock on locks which those threads hold.
On Linux the processes therefore come from a fork server that has no threads.
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

# Imported once by the fork server, so that processes start fast.
_PRELOADED = ["fastdino.bench.baselines.loaders"]
_GRACE = 10.0  # seconds to exit after close()


class WorkerError(Exception):
    """Reason of a worker's failure; `missing`: a package is not installed."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


class WorkerProcess:
    """Run `make()` in a new process, then call its result for each call().

    Args:
        make: picklable. Its result takes one picklable argument; close() is called at the end if
            the result has it.
        processors: number of processors for the process and its children, where the system
            supports affinity.
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]], *, processors: int) -> None:
        context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
        if sys.platform == "linux":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOADED)
        self._pipe, theirs = context.Pipe()
        # Not a daemon: daemons may not have children.
        self._process = context.Process(target=_serve, args=(theirs, make, processors))
        self._process.start()
        theirs.close()

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for make(); raises WorkerError if it raised or took longer than `timeout`."""
        self._answer(timeout)

    def call(self, argument: Any, timeout: float) -> Any:
        """Return the result of one call; raises WorkerError after killing the process."""
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
        """End the process and its children; kill them if they do not exit in time."""
        if not self._pipe.closed:
            try:
                self._pipe.send(None)
                self._process.join(_GRACE)
            except OSError:
                pass
        self.kill()

    def kill(self) -> None:
        """Kill the process and its children."""
        if self._pipe.closed:
            return
        pid = self._process.pid
        assert pid is not None
        try:
            os.killpg(pid, signal.SIGKILL)  # the process group includes the children
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(
    pipe: Connection[Any, Any], make: Callable[[], Callable[[Any], Any]], processors: int
) -> None:
    os.setsid()  # a process group for kill(), and a session for session_cpu_seconds()
    if sys.platform == "linux":
        # Forking is safe and fast as long as this process has no threads.
        multiprocessing.set_start_method("fork", force=True)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
    function: Callable[[Any], Any] | None = None
    try:
        function = make()
        pipe.send((True, None))
        while (argument := pipe.recv()) is not None:
            pipe.send((True, function(argument)))
    except (EOFError, BrokenPipeError):  # the parent has exited
        pass
    except Exception as error:  # third-party code may raise anything
        pipe.send((False, (failure_reason(error), isinstance(error, ModuleNotFoundError))))
    finally:
        close = getattr(function, "close", None)
        if close is not None:
            close()


def failure_reason(error: Exception) -> str:
    """Return one line that describes an exception."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.split('.')[0]} is not installed"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def session_cpu_seconds() -> float | None:
    """Return the CPU seconds so far of all processes in this session; None without /proc.

    The resolution is a clock tick (10 ms) per process. Ended processes count once they have been
    waited for.
    """
    if sys.platform != "linux":
        return None
    session, ticks = os.getsid(0), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Fields after the name, which may contain anything: state, ppid, pgrp, session, ...
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    ended = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") + ended.children_user + ended.children_system

"""Writing a checkpoint in a thread while the training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from fastdino.training.allocator import is_out_of_memory
from fastdino.training.host_copy import HostCopy
from fastdino.waiting import DaemonExecutor

Write = Callable[[dict[str, Any]], None]
WAITS = "the training waits for each save, as with --saveckp_in_background false"


class CheckpointWriter:
    """Writes one state at a time in a thread, from a copy in host memory.

    Args: warn: prints a warning.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._host = HostCopy()
        self._thread: DaemonExecutor | None = None
        self._running: Future[None] | None = None
        self._last: Callable[[], None] | None = None  # repeats the last write
        self._error: Exception | None = None
        self._copied: dict[str, Any] | None = None  # for the next `start`
        self._is_direct = False  # a copy does not fit into the memory

    def copy(self, state: dict[str, Any]) -> bool:
        """Copy `state` for the next `start`; return False without memory for it, now or before.

        The last write must be finished.
        """
        assert self._running is None
        self._last = None  # it refers to the former copy
        if self._is_direct:
            return False
        try:
            self._copied = self._host.copy(state)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._is_direct = True
            self._warn(f"no host memory for a copy of the checkpoint ({error}): {WAITS}")
        return not self._is_direct

    def write_directly(self) -> None:
        """Make no copies from now on; forget the last one."""
        self._copied, self._is_direct = None, True
        self._host.clear()

    def start(self, state: dict[str, Any], write: Write, again: Write) -> None:
        """Start write(copy) in the thread, with the copy of `state` made by `copy`, else made now.

        Without memory for the copy, write(state) is called directly, from then on.

        Args: again: how `repeat` writes again.
        """
        if self._copied is None and not self.copy(state):
            write(state)
            return
        copied, self._copied = self._copied, None
        assert copied is not None
        self._thread = self._thread or DaemonExecutor(1)
        self._last = lambda: again(copied)
        self._running = self._thread.submit(self._run, copied, write)

    def _run(self, copied: dict[str, Any], write: Write) -> None:
        try:
            self._host.wait()
            write(copied)
        except Exception as error:
            self._error = error
            self._warn(f"{error}; the run continues, and the next save writes it again")

    def finish(self) -> bool:
        """Wait for the write; return False if it failed."""
        if self._running is not None:
            wait([self._running])
        self._running = None
        return self._error is None

    def close(self) -> None:
        """Wait for the write, and end the thread."""
        self.finish()
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = None

    def repeat(self) -> None:
        """Do the last write again, in this thread.

        Raises: CheckpointError: it failed again.
        """
        assert self._running is None
        last, self._last, self._error = self._last, None, None
        if last is not None:
            last()

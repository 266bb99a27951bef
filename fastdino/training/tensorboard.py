"""TensorBoard events of a run; a failure to write them does not stop the run."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Board:
    """Scalars in a folder of TensorBoard events; without TensorBoard it writes nothing.

    After a failed write, or if the folder was deleted, `flush` starts a new file.

    Args:
        folder: of the events; its parent must exist.
        iteration: events of this and later iterations from an interrupted run are dropped.
        warn: called with the first error.
    """

    def __init__(self, folder: Path, iteration: int, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._warned = False
        self._writer: Any = None
        self._previous_hook = threading.excepthook
        threading.excepthook = self._hook
        self._open(iteration)

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Add a value to each of the named curves."""
        with self._reported():
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, iteration)

    def flush(self, iteration: int) -> None:
        """Write buffered events to disk; `iteration` is the next one."""
        with self._reported():
            if self._writer is not None:
                self._writer.flush()
                if not any(self._folder.glob("events*")):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if self._writer is None:
            self._open(iteration)

    def close(self) -> None:
        """Write buffered events and close the file."""
        with self._reported():
            if self._writer is not None:
                self._writer.close()
        self._writer = None
        threading.excepthook = self._previous_hook

    def _open(self, iteration: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with self._reported():
            self._folder.mkdir(exist_ok=True)
            self._writer = SummaryWriter(str(self._folder), purge_step=iteration)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Warn of an error, once, and close the file."""
        try:
            yield
        except Exception as error:  # with TensorFlow installed, its own types
            with suppress(Exception):
                self._writer.close()
            self._writer = None
            if not self._warned:
                self._warned = True
                self._warn(
                    f"TensorBoard events cannot be written to {self._folder} ({error}): the run "
                    "continues, and tries again after each save"
                )

    def _hook(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback for TensorBoard's thread: the next call raises its error."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._previous_hook(failure)

"""TensorBoard events of a run."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from fastdino.training.metric_logger import Origin, Pixels


class Board:
    """Curves and pictures in the folder tensorboard/ of a run.

    Events of an interrupted run after its checkpoint are hidden by TensorBoard (purge_step). After
    a failed write, or if the folder was deleted, `flush` starts a new file.
    """

    def __init__(self, origin: Origin) -> None:
        self._folder = origin.folder / "tensorboard"
        self._settings = origin.settings
        self.problem = f"TensorBoard events cannot be written to {self._folder}"
        self._writer: Any = None
        self._previous_hook: Any = None

    def restart(self, iteration: int, *, new: bool) -> None:
        """Start a file; events of `iteration` and later ones in older files are dropped."""
        with suppress(Exception):
            self.close()
        self._previous_hook = threading.excepthook
        threading.excepthook = self._hook
        self._open(iteration)
        text = json.dumps(dict(self._settings), indent=2)
        with self._dropped_on_error():
            self._writer.add_text("settings", f"```json\n{text}\n```", iteration)

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Add a value to each of the named curves."""
        with self._dropped_on_error():
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, iteration)

    def add_image(self, name: str, pixels: Pixels, iteration: int) -> None:
        """Add a picture [height, width, 3]."""
        with self._dropped_on_error():
            if self._writer is not None:
                self._writer.add_image(name, pixels, iteration, dataformats="HWC")

    def flush(self, iteration: int) -> None:
        """Write buffered events to disk; `iteration` is the next one."""
        if self._writer is None:
            self._open(iteration)
            return
        with self._dropped_on_error():
            self._writer.flush()
            if not any(self._folder.glob("events*")):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def close(self) -> None:
        """Write buffered events and close the file."""
        writer, self._writer = self._writer, None
        if self._previous_hook is not None:
            threading.excepthook, self._previous_hook = self._previous_hook, None
        if writer is not None:
            writer.close()

    def _open(self, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with self._dropped_on_error():
            self._folder.mkdir(exist_ok=True)
            self._writer = SummaryWriter(str(self._folder), purge_step=iteration)

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """Close the file after an error."""
        try:
            yield
        except Exception:  # with TensorFlow installed, its own types
            with suppress(Exception):
                self._writer.close()
            self._writer = None
            raise

    def _hook(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback for TensorBoard's thread: the next call raises its error."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._previous_hook(failure)

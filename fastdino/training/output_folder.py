"""The output folder of a run: its lock, and the temporary files of killed runs."""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

from fastdino.errors import CheckpointError
from fastdino.files import PART, open_locked, part_of
from fastdino.launch import restart_count
from fastdino.terminal import print_err

# To open a folder without reading it.
_O_PATH = getattr(os, "O_PATH", os.O_RDONLY)
# A file server keeps the lock of a failed node for a while, and a requeued job waits for it.
STALE_LOCK_SECONDS, LOCK_POLL_SECONDS = 300.0, 1.0
# Files that a run writes atomically.
_WRITTEN = re.compile(
    r"(checkpoint(\d{4,})?\.pth|log\.txt|config\.json|metrics\.csv|wandb\.json|mlflow\.json|"
    r"(images|knn_train|knn_val)\.npz)"
)


class OutputFolder:
    """A folder that one run at a time may write to; a context manager that holds its lock.

    Entering it creates the folder and removes the temporary files of killed runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Descriptors. While one is open, no other file or folder gets the same inode.
        self._lock = self._folder = -1

    def __enter__(self) -> OutputFolder:
        """Create and lock the folder.

        Raises: CheckpointError: it cannot be written, or another run uses it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._open_after_requeue():
                self._remove_leftovers()
        except OSError as error:
            raise self._error(error) from error
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)
        os.close(self._folder)

    def _open_after_requeue(self) -> bool:
        """Open and lock the folder; a requeued Slurm job waits for the lock of its last start."""
        try:
            return self._open()
        except BlockingIOError:
            if not restart_count():
                raise
        print_err(
            f"waiting up to {STALE_LOCK_SECONDS:g} s for the lock of {self.path}, which the last "
            "start of this job may have left"
        )
        end = time.monotonic() + STALE_LOCK_SECONDS
        while True:
            time.sleep(LOCK_POLL_SECONDS)
            try:
                return self._open()
            except BlockingIOError:
                if time.monotonic() > end:
                    raise

    def _open(self) -> bool:
        """Open and lock the folder; return False if its file system has no locks."""
        lock, held = open_locked(self.path / ".lock", wait=False)
        self._lock, self._folder = lock, os.open(self.path, _O_PATH)
        return held

    def restore(self) -> bool:
        """Create and lock the folder again if it was deleted or replaced; return True if it was.

        Its parent must exist: without it, a disk was probably unmounted.

        Raises: CheckpointError: it cannot be written, or another run uses it.
        """
        old_lock, old_folder = self._lock, self._folder
        try:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path / ".lock"), os.fstat(old_lock)):
                    return False
            self.path.mkdir(exist_ok=True)
            self._open()
        except OSError as error:
            raise self._error(error) from error
        is_new = not os.path.samestat(os.fstat(self._folder), os.fstat(old_folder))
        os.close(old_lock)
        os.close(old_folder)
        return is_new

    def _error(self, error: OSError) -> CheckpointError:
        if isinstance(error, BlockingIOError):
            return CheckpointError(
                f"--output_dir {self.path}: another run is writing there; use another folder"
            )
        # Also for a link to nowhere.
        reason = "it is not a folder" if isinstance(error, FileExistsError) else str(error)
        return CheckpointError(
            f"--output_dir {self.path} cannot be written ({reason}): use another folder"
        )

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of writes during which a run was killed."""
        for name in os.listdir(self.path):
            written = name.removesuffix(PART)
            if _WRITTEN.fullmatch(written):
                part = part_of(self.path / written)
                with suppress(OSError):
                    if stat.S_ISREG(part.lstat().st_mode):
                        part.unlink()

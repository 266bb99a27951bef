"""Atomic writes, write errors that suggest a fix, and file locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastdino.errors import CheckpointError
from fastdino.waiting import killable


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block succeeds.

    If the block fails or the process is killed, `path` is unchanged.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Convert an OSError in the block to a CheckpointError that says how to fix it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:  # not a file system error
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        todo = "the disk is full: free some space" if full else "check the folder's permissions"
        kept = f"; the previous {path.name} is intact" if path.is_file() else ""
        reason = cause.strerror or str(cause)
        if cause.filename not in (None, path, str(path)):
            reason += f": {cause.filename}"
        raise CheckpointError(f"cannot write {path} ({reason}): {todo}{kept}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError in an exception's chain; torch.save raises a RuntimeError from it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def write_json(value: Any, path: Path) -> None:
    """Write `value` as JSON, atomically; create the parent folders.

    Raises: CheckpointError: the file cannot be written.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path` during the block; create the file if it is missing.

    The lock excludes other processes, not threads, and child processes do not inherit it. On a
    file system without locks it has no effect. SIGINT and SIGTERM end a process that waits.

    Raises:
        BlockingIOError: another process holds the lock and `wait` is false.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if not wait:
                raise BlockingIOError(f"another process holds {path}") from error
            with killable():
                print(f"waiting for the process that holds {path}", file=sys.stderr, flush=True)
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(descriptor)

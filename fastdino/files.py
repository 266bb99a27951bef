"""Atomic writes, write errors that suggest a fix, and file locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastdino.errors import CheckpointError
from fastdino.file_names import texts_in
from fastdino.terminal import print_err
from fastdino.waiting import killable

PART = ".part"  # of the temporary files of atomic_write


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block succeeds.

    If the block fails or the process is killed, `path` is unchanged. A symbolic link is kept, and
    its target replaced. Devices and pipes are written directly. Of two processes that write the
    same file, one waits for the other.

    Raises: OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    part = part_of(target)
    with _open_alone(part) as file:  # closed last, which releases the lock
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
        sync_folder(target.parent)


def _open_alone(path: Path) -> IO[bytes]:
    """Open an empty file for writing, and lock it until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # no locks here
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                # Else the process that was waited for has renamed or removed this file.
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    if os.fstat(descriptor).st_size:  # a device cannot be cut
                        os.ftruncate(descriptor, 0)
                    return os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def part_of(path: Path) -> Path:
    """Return the temporary file of atomic_write; it is left behind if the process is killed."""
    target = Path(os.path.realpath(path))
    return target.with_name(target.name + PART)


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, where the file system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the folder can be written, but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def append(content: bytes, path: Path) -> None:
    """Append to a file, or leave it unchanged; raise OSError."""
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Convert an OSError in the block to a CheckpointError that says how to fix it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = os_error_of(error)
        if cause is None:  # not a file system error
            raise
        kept = f"; the previous {path.name} is intact" if os.path.isfile(path) else ""
        reason = cause.strerror or str(cause)
        if cause.filename not in (None, path, str(path)):
            reason += f": {cause.filename}"
        todo = _remedy(cause.errno)
        raise CheckpointError(f"cannot write {path} ({reason}): {todo}{kept}") from error


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise CheckpointError if a file, or a folder, cannot be written at `path`; create nothing.

    For commands that compute for long before they write.
    """
    with explain_write_errors(path):
        nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
        if nearest.is_dir() and nearest == path and not folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not nearest.is_dir() and (nearest != path or folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
        if not os.access(nearest, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))


def _remedy(number: int | None) -> str:
    """Return what to do about a failed write."""
    if number == errno.EDQUOT:
        return "the quota is used up: free some space"
    if number == errno.EFBIG:
        return "raise the limit of the file size (ulimit -f)"
    if number == errno.ENOSPC:
        return "the disk is full: free some space"
    if number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        return "check the disk, or the connection to its server"
    return "check the folder's permissions"


def os_error_of(error: BaseException | None) -> OSError | None:
    """Return the OSError in an exception's chain; torch.save raises a RuntimeError from it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def write_json(value: Any, path: Path) -> None:
    """Write `value` as JSON, atomically; create the parent folders.

    File names are text (fastdino.file_names).

    Raises: CheckpointError: the file cannot be written.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write((json.dumps(texts_in(value), indent=2) + "\n").encode())


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path` during the block; create the file if it is missing.

    The lock excludes other processes, not threads, and child processes do not inherit it. On a
    file system without locks it has no effect. SIGINT, SIGTERM and SIGHUP end a
    process that waits.

    Raises:
        BlockingIOError: another process holds the lock and `wait` is false.
        OSError: the file cannot be opened.
    """
    descriptor, _ = open_locked(path, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def open_locked(path: Path, *, wait: bool) -> tuple[int, bool]:
    """Open and lock a file as `file_lock` does.

    Returns: the descriptor, which holds the lock until it is closed; False if the file system has
        no locks.
    """
    held, descriptor = True, os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if not wait:
                raise BlockingIOError(f"another process holds {path}") from error
            with killable():
                print_err(f"waiting for the process that holds {path}")
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
        except OSError:  # no locks here
            held = False
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, held

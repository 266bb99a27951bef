"""Reading the headers of a dataset's images in parallel, except those in an earlier manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastdino.data import manifest
from fastdino.data.datasets.file_list import FileList
from fastdino.data.image_files import (
    Header,
    Part,
    Unusable,
    quiet_pillow,
    read_header,
    reason_of,
    retrying,
)
from fastdino.data.manifest import Manifest, concatenate, unread_manifest
from fastdino.errors import DataError
from fastdino.waiting import DaemonExecutor

T = TypeVar("T")
R = TypeVar("R")

BAR_AFTER = 1.0  # seconds until a progress bar appears
_CHUNK = 256  # items per task of a thread
_UNKNOWN = -1  # stamp of a file that could not be read


def scan(files: FileList, workers: int, cache: Path | None) -> tuple[Manifest, list[str]]:
    """Return the manifest of all images, and messages about the cache.

    Args:
        workers: threads.
        cache: images.npz of an earlier scan. Files with the same size and mtime are not opened
            again. It is rewritten if anything changed.
    Raises: DataError: an archive is damaged or cannot be read.
    """
    if cache is None:
        return _scan(files, workers, None)[0], []
    cached, notes = None, []
    try:
        loaded = manifest.load(cache)
        of_archives = any(loaded.members)
        if of_archives == bool(files.archive) and loaded.selection == files.selection:
            cached = loaded
    except FileNotFoundError:
        pass
    except ValueError as error:
        notes.append(f"{cache} cannot be used ({error}): all images are scanned again")
    images, changed = _scan(files, workers, cached)
    if cached:
        if not changed and cached.files == images.files:
            return images, notes
        kind = f"{files.archive}s" if files.archive else "images"
        notes.append(
            f"{cache} is outdated: {changed} of {len(files.files)} {kind} are new or changed and "
            "were scanned again"
        )
    try:
        manifest.save(images, cache)
    except OSError as error:
        notes.append(f"{cache} cannot be written ({error}): the next run scans all images again")
    return images, notes


def _scan(files: FileList, workers: int, cached: Manifest | None) -> tuple[Manifest, int]:
    """Return the manifest, and how many files had to be opened."""
    paths = [files.path(name) for name in files.files]
    stamps = _parallel(_stamp, paths, workers, "checking files", "files")
    all_stamps = np.array(stamps, dtype=np.int64).reshape(-1, 2)
    rows = _cached_rows(files.files, all_stamps, cached)
    changed = np.flatnonzero(rows < 0)
    if cached is not None and not len(changed) and cached.files == files.files:
        return cached, 0
    images = _list_images(files, [files.files[i] for i in changed.tolist()], workers)
    images.stamps = all_stamps[changed]
    _read_headers(images, files, workers)
    if cached is not None:
        rows[changed] = len(cached.files) + np.arange(len(changed))
        images = concatenate([cached, images]).select_files(rows)
    images.selection = files.selection
    return images, len(changed)


def _stamp(path: str) -> tuple[int, int]:
    """Return size and mtime of a file; _UNKNOWN if stat fails: reading then reports the reason."""
    try:
        status = retrying(os.stat)(path)
    except OSError:
        return _UNKNOWN, _UNKNOWN
    return status.st_size, status.st_mtime_ns


def _cached_rows(
    names: Sequence[str], stamps: NDArray[np.int64], cached: Manifest | None
) -> NDArray[np.int64]:
    """Return the row of each file in the cached manifest, -1 if it is missing or has changed."""
    if cached is None or not len(cached.files):
        return np.full(len(names), -1)
    known = {name: row for row, name in enumerate(cached.files)}
    rows = np.array([known.get(name, -1) for name in names], dtype=np.int64)
    same = (cached.stamps[rows] == stamps).all(axis=1) & (stamps[:, 0] != _UNKNOWN)
    return np.where((rows >= 0) & same, rows, -1)


def _list_images(files: FileList, names: Sequence[str], workers: int) -> Manifest:
    """Return the manifest of image files, or of the members of archives, without headers."""
    index = files.index
    if index is None:
        return unread_manifest(names)

    def index_archive(name: str) -> Manifest:
        try:
            images = index(files.path(name))
        except OSError as error:
            raise DataError(f"--data_path: {files.path(name)} {reason_of(error)}") from error
        images.files = [name]
        return images

    kind = f"{files.archive}s"
    return concatenate(_parallel(index_archive, names, workers, f"reading {kind}", kind, chunk=1))


def _read_headers(images: Manifest, files: FileList, workers: int) -> None:
    """Fill in the headers, or the reasons, of all images that have no reason yet."""
    wanted = [i for i in range(len(images.members)) if i not in images.reasons]

    def read(i: int) -> Header | Unusable:
        path = files.path(images.files[images.file_ids[i]])
        return read_header(path, Part(*images.parts[i].tolist()) if files.archive else None)

    with quiet_pillow():
        headers = _parallel(read, wanted, workers, "reading image headers", "images")
    for i, header in zip(wanted, headers, strict=True):
        if isinstance(header, Header):
            images.headers[i] = header
            continue
        images.reasons[i] = header.reason
        if header.transient:  # so that the next scan tries again
            images.stamps[images.file_ids[i]] = _UNKNOWN


def _parallel(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int,
    title: str,
    unit: str,
    chunk: int = 0,
) -> list[R]:
    """Return function(item) for each item, with a progress bar on a terminal."""
    size = chunk or _CHUNK
    chunks = [items[i : i + size] for i in range(0, len(items), size)]
    results: list[R] = []
    bar = tqdm(total=len(items), desc=title, unit=unit, disable=None, delay=BAR_AFTER, leave=False)
    with bar, DaemonExecutor(min(workers, len(chunks))) as pool:  # starts all threads at once
        for done in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
            results += done
            bar.update(len(done))
    return results

"""The scan: the headers of all images, in parallel, except those that an earlier scan has read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastdino.data.datasets.archives import ArchiveIndex
from fastdino.data.datasets.data_path import Found
from fastdino.data.image_files import (
    Header,
    Part,
    Unusable,
    quiet_pillow,
    read_header,
    reason_of,
    retrying,
)
from fastdino.data.manifest import Table, concatenate
from fastdino.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

BAR_AFTER = 1.0  # seconds
_A_TASK = 256
_UNKNOWN = -1  # bytes and mtime of a file whose reading failed


class Scanner:
    """Reads headers in threads, with a bar where stderr is a terminal and it takes a while.

    fresh: how many files had to be read, as `known` did not have them as they are.
    """

    def __init__(self, workers: int, known: Table | None = None) -> None:
        self._workers, self._known = max(1, workers), known
        self.fresh = 0

    def images(self, paths: Sequence[str], names: Sequence[str]) -> Table:
        """The table of images that are files; `names` are what the table calls them."""
        table = Table(
            files=list(names),
            stamps=self._stamps(paths),
            counts=np.ones(len(names), np.int64),
            members=[""] * len(names),
            parts=np.zeros((len(names), 3), np.int64),
            headers=np.zeros((len(names), 3), np.int32),
            labels=[""] * len(names),
        )
        fresh = self._take_known(table)
        self.fresh = len(fresh)
        for i, found in zip(fresh, self._headers([(paths[i], None) for i in fresh]), strict=True):
            if isinstance(found, Header):
                table.headers[i] = found
                continue
            table.reasons[i] = found.reason
            if found.passing:
                table.stamps[i] = _UNKNOWN
        return table

    def archives(self, found: Found) -> Table:
        """The table of the images in archives, of those that are asked for where some are.

        Raises: DataError: a file is no such archive, or cannot be read.
        """
        assert found.index is not None
        find, photos, names = found.index, found.photos, found.files
        paths = [found.path(name) for name in names]
        stamps = self._stamps(paths)
        rows = self._known_rows(names, stamps)
        fresh = np.flatnonzero(rows < 0).tolist()
        self.fresh = len(fresh)

        def index(i: int) -> ArchiveIndex:
            try:
                one = find(paths[i])
            except OSError as error:
                raise DataError(f"--data_path: {paths[i]} {reason_of(error)}") from error
            return one if photos is None else one.taken(photos.among(one.members).tolist())

        indices = self._map(index, fresh, f"reading {found.archive}s", f"{found.archive}s")
        tables = {
            i: _of_index(names[i], stamps[i], one) for i, one in zip(fresh, indices, strict=True)
        }
        wanted = [
            (paths[i], Part(*part))
            for i in fresh
            for row, part in enumerate(tables[i].parts.tolist())
            if row not in tables[i].reasons
        ]
        headers = iter(self._headers(wanted))
        for i in fresh:
            _fill(tables[i], headers)
        if self._known is not None:
            starts = np.cumsum([0, *self._known.counts])
            for i in np.flatnonzero(rows >= 0).tolist():
                tables[i] = _part(self._known, int(rows[i]), int(starts[rows[i]]))
        return concatenate([tables[i] for i in range(len(names))])

    def _stamps(self, paths: Sequence[str]) -> NDArray[np.int64]:
        """[f, 2] bytes and mtime in ns."""

        def stamp(path: str) -> tuple[int, int]:
            try:
                found = retrying(lambda: os.stat(path))
            except OSError:  # Reading it will fail too, and say why.
                return _UNKNOWN, _UNKNOWN
            return found.st_size, found.st_mtime_ns

        found = self._map_chunks(stamp, paths, "looking at files", "files")
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def _known_rows(self, names: Sequence[str], stamps: NDArray[np.int64]) -> NDArray[np.int64]:
        """[f] the place among the known files, -1 where a file is not as it was, or was not."""
        if self._known is None:
            return np.full(len(names), -1)
        places = {name: row for row, name in enumerate(self._known.files)}
        rows = np.array([places.get(name, -1) for name in names], dtype=np.int64)
        same = (self._known.stamps[rows] == stamps).all(axis=1) & (stamps[:, 0] != _UNKNOWN)
        return np.where((rows >= 0) & same, rows, -1)

    def _take_known(self, table: Table) -> list[int]:
        """Fills in what is known; returns the images that are not."""
        rows = self._known_rows(table.files, table.stamps)
        if self._known is not None:
            known = rows >= 0
            table.headers[known] = self._known.headers[rows[known]]
            new = {int(row): int(i) for i, row in enumerate(rows) if row >= 0}
            table.reasons |= {new[i]: r for i, r in self._known.reasons.items() if i in new}
        return np.flatnonzero(rows < 0).tolist()

    def _headers(self, wanted: Sequence[tuple[str, Part | None]]) -> list[Header | Unusable]:
        with quiet_pillow():
            return self._map_chunks(
                lambda one: read_header(*one), wanted, "reading image headers", "images"
            )

    def _map_chunks(self, do: Callable[[T], R], items: Sequence[T], title: str, of: str) -> list[R]:
        """As _map, many items a task."""
        chunks = [items[i : i + _A_TASK] for i in range(0, len(items), _A_TASK)]
        done = self._map(lambda chunk: [do(item) for item in chunk], chunks, title, of, len(items))
        return [one for chunk in done for one in chunk]

    def _map(
        self,
        do: Callable[[T], R],
        items: Sequence[T],
        title: str,
        of: str,
        total: int | None = None,
    ) -> list[R]:
        """What `do` gives for each item; total: how many things the items are together."""
        results: list[R] = []
        pool = ThreadPoolExecutor(self._workers)
        bar = tqdm(
            total=total or len(items),
            desc=title,
            unit=of,
            disable=None,
            delay=BAR_AFTER,
            leave=False,
        )
        try:
            for item, result in zip(items, pool.map(do, items), strict=True):
                results.append(result)
                bar.update(len(item) if total and isinstance(item, Sequence) else 1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()
        return results


def _of_index(name: str, stamp: NDArray[np.int64], index: ArchiveIndex) -> Table:
    n = len(index.members)
    return Table(
        files=[name],
        stamps=stamp[None].copy(),
        counts=np.array([n], np.int64),
        members=index.members,
        parts=np.array(index.parts, np.int64).reshape(n, 3),
        headers=np.zeros((n, 3), np.int32),
        labels=index.labels,
        notes={0: index.note} if index.note else {},
        reasons=index.reasons,
    )


def _fill(table: Table, headers: Iterator[Header | Unusable]) -> None:
    """Takes a header for each image of an archive that has no reason yet."""
    rows = [row for row in range(len(table.members)) if row not in table.reasons]
    for row, found in zip(rows, itertools.islice(headers, len(rows)), strict=True):
        if isinstance(found, Header):
            table.headers[row] = found
            continue
        table.reasons[row] = found.reason
        if found.passing:
            table.stamps[:] = _UNKNOWN


def _part(table: Table, row: int, start: int) -> Table:
    """One file of a table."""
    images = slice(start, start + int(table.counts[row]))
    return Table(
        files=[table.files[row]],
        stamps=table.stamps[row : row + 1],
        counts=table.counts[row : row + 1],
        members=table.members[images],
        parts=table.parts[images],
        headers=table.headers[images],
        labels=table.labels[images],
        notes={0: table.notes[row]} if row in table.notes else {},
        reasons={
            i - start: reason
            for i, reason in table.reasons.items()
            if images.start <= i < images.stop
        },
    )

"""Which photos of YFCC100M are to be taken, by its metadata: a table of text, or an SQLite file.

An image is a photo of the metadata where its file is called by the photo's number, or by its key:
the hash by which the Multimedia Commons store it, data/images/abc/def/abcdef....jpg, which is
in some tables and follows from the photo's address. Videos are none.

Legend: R rows of the metadata that are photos, M names of them.
"""

from __future__ import annotations

import bz2
import hashlib
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastdino.errors import DataError

# What the metadata is called as it is distributed.
NAMES = ("yfcc100m_dataset", "yfcc100m_subset_data")
SUFFIXES = ("", ".tsv", ".txt", ".bz2", ".tsv.bz2", ".sql", ".sqlite", ".db")
_TABLE = "yfcc100m_dataset"
_VIDEO = "1"  # in the column `marker`
_SQLITE = b"SQLite format 3\0"


class _Columns(NamedTuple):
    """Where a table has what is wanted: numbers of columns, None where it has no such one."""

    number: int
    key: int | None = None
    address: int | None = None
    marker: int | None = None


# By how many columns a table without a header has: of the first release, of the later ones with a
# row's number and a hash, of the subset of 15 million (row, photo, hash), and of photos alone.
_LAYOUTS = {
    23: _Columns(0, None, 14, 22),
    25: _Columns(1, 2, 16, 24),
    3: _Columns(1, 2),
    1: _Columns(0),
}
_CALLED = {
    "number": ("photoid", "photo_id", "id"),
    "key": ("key", "hash", "photohash"),
    "address": ("downloadurl", "download_url", "url"),
    "marker": ("marker", "ext_marker"),
}


@dataclass(frozen=True)
class Photos:
    """Photos by their names.

    names: [M] uint64, hashes of the names, sorted. rows: [M] int32, the photo of each name.
    number: R. source: the metadata's name. videos: rows that are none.
    """

    names: NDArray[np.uint64]
    rows: NDArray[np.int32]
    number: int
    source: str
    videos: int = 0

    def among(self, files: Sequence[str]) -> NDArray[np.int64]:
        """The places in `files` of those that are photos of these."""
        return np.flatnonzero(self._rows_of(files) >= 0)

    def missing(self, files: Sequence[str]) -> int:
        """How many of the photos are none of `files`."""
        rows = self._rows_of(files)
        return self.number - len(np.unique(rows[rows >= 0]))

    def selection(self) -> str:
        """Tells these photos from others."""
        return hashlib.sha256(self.names.tobytes()).hexdigest()[:16]

    def _rows_of(self, files: Sequence[str]) -> NDArray[np.int64]:
        """The row of each file, -1 where it is none."""
        hashes = [_hash(PurePosixPath(name).name.partition(".")[0]) for name in files]
        wanted = np.array(hashes, np.uint64)
        if not len(self.names):
            return np.full(len(wanted), -1)
        places = np.searchsorted(self.names, wanted).clip(max=len(self.names) - 1)
        return np.where(self.names[places] == wanted, self.rows[places], -1)


def find_metadata(folder: str) -> str | None:
    """The metadata that lies in a folder under one of its usual names."""
    names = [name + suffix for name in NAMES for suffix in SUFFIXES]
    return next((str(path) for path in map(Path(folder).joinpath, names) if path.is_file()), None)


def read_metadata(path: str) -> Photos:
    """The photos that the metadata names: a table with tabs (or .bz2 of one), or an SQLite file.

    Raises: DataError: it cannot be read, is none of them, or names no photo.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        rows = _of_sqlite(path) if start == _SQLITE else _of_text(path)
        return _collect(rows, path)
    except (OSError, EOFError, sqlite3.Error) as error:
        raise DataError(f"--data_path: the metadata {path} cannot be read: {error}") from error


def photo_key(address: str) -> str:
    """The name of a photo in the Multimedia Commons: of the MD5 of its address each byte in hex,
    without a leading zero.
    """
    digest = hashlib.md5(address.encode(), usedforsecurity=False).digest()
    return "".join(f"{byte:x}" for byte in digest)


def _collect(rows: Iterator[tuple[str, list[str]]], path: str) -> Photos:
    """Of rows (marker, names) those that are photos."""
    hashes, of = array("Q"), array("i")  # lists of 300 million would be many times as large
    number = videos = 0
    bar = tqdm(rows, desc="reading metadata", unit="photos", disable=None, delay=1, leave=False)
    for marker, names in bar:
        if marker == _VIDEO:
            videos += 1
            continue
        hashes.extend(map(_hash, names))
        of.extend([number] * len(names))
        number += 1
    if not number:
        raise DataError(f"--data_path: the metadata {path} names no photo ({videos} videos)")
    names, first = np.unique(np.frombuffer(hashes, np.uint64), return_index=True)
    return Photos(names, np.frombuffer(of, np.int32)[first], number, Path(path).name, videos)


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _names(number: str, key: str, address: str) -> list[str]:
    """All that a photo's file may be called, each once."""
    names = [number, key]
    if len(key) == 32:  # with the leading zeros that the file's name lacks
        names.append("".join(key[i : i + 2].removeprefix("0") or "0" for i in range(0, 32, 2)))
    if address:
        names.append(photo_key(address))
    return [name for name in dict.fromkeys(names) if name]


def _of_text(path: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table with tabs between its columns; its first line may name them."""
    with (bz2.open if path.endswith(".bz2") else open)(path, "rb") as file:
        columns: _Columns | None = None
        for number, line in enumerate(file, start=1):
            values = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
            if values == [""]:
                continue
            if columns is None:
                columns, is_header = _columns(values, path)
                if is_header:
                    continue
            if len(values) <= max(place for place in columns if place is not None):
                raise DataError(
                    f"--data_path: the metadata {path}, line {number}: {len(values)} columns, "
                    "fewer than the lines before"
                )
            yield _row(values, columns)


def _columns(values: list[str], path: str) -> tuple[_Columns, bool]:
    """Which columns are meant, by the first line, and whether that is a header."""
    lower = [value.strip().lower() for value in values]
    number, *others = (
        next((lower.index(name) for name in names if name in lower), None)
        for names in _CALLED.values()
    )
    if number is not None:
        return _Columns(number, *others), True
    layout = _LAYOUTS.get(len(values))
    if layout is None or not values[layout.number].isdigit():
        raise DataError(
            f"--data_path: the metadata {path} begins with {values[:4]!r}, {len(values)} columns "
            "by tabs: expected YFCC100M's (25, or 23 without row and hash), those of its subset "
            "(row, photo, hash), a photo's number a line, a header with a column photoid, or SQLite"
        )
    return layout, False


def _row(values: Sequence[str], columns: _Columns) -> tuple[str, list[str]]:
    number, key, address, marker = ("" if i is None else values[i].strip() for i in columns)
    return marker, _names(number, key, address)


def _of_sqlite(path: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of an SQLite file's only table, or of that called as YFCC100M's is."""
    address = Path(path).resolve().as_uri() + "?mode=ro"
    with closing(sqlite3.connect(address, uri=True)) as base:
        query = "select name from sqlite_master where type = 'table'"
        tables = [name for (name,) in base.execute(query)]
        table = _TABLE if _TABLE in tables or len(tables) != 1 else tables[0]
        if table not in tables:
            raise DataError(
                f"--data_path: the metadata {path} has no table {_TABLE}; it has: "
                f"{', '.join(tables) or 'none'}"
            )
        have = [row[1] for row in base.execute(f"pragma table_info({_quoted(table)})")]
        lower = [name.lower() for name in have]
        wanted = {
            field: next((have[lower.index(name)] for name in names if name in lower), None)
            for field, names in _CALLED.items()
        }
        if wanted["number"] is None:
            raise DataError(
                f"--data_path: the metadata {path}: its table {table} has no column photoid; it "
                f"has {', '.join(have)}"
            )
        columns = ["''" if name is None else _quoted(name) for name in wanted.values()]
        for row in base.execute(f"select {', '.join(columns)} from {_quoted(table)}"):
            number, key, url, marker = ("" if value is None else str(value) for value in row)
            yield marker, _names(number, key, url)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'

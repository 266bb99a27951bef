"""Photos of YFCC100M, selected by its metadata: a table of text, or an SQLite file.

An image is a photo of the metadata if its file is named after the photo's number or key. The key is
the hash under which the Multimedia Commons store the photo (data/images/abc/def/abcdef....jpg). It
is in some tables and can be computed from the photo's download URL. Videos are not used.

Notation: R photos in the metadata, M names of them.
"""

from __future__ import annotations

import bz2
import hashlib
import os
import sqlite3
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastdino.data.datasets.file_list import FileList
from fastdino.data.image_files import read_file
from fastdino.data.manifest import Manifest
from fastdino.errors import DataError

# File names under which the metadata is distributed.
NAMES = ("yfcc100m_dataset", "yfcc100m_subset_data")
SUFFIXES = ("", ".tsv", ".txt", ".bz2", ".tsv.bz2", ".sql", ".sqlite", ".db")
_TABLE = "yfcc100m_dataset"
_VIDEO = "1"  # in the column `marker`
_SQLITE = b"SQLite format 3\0"
# Limits of a compressed table or database, which can claim any size: bytes of a line or value, and
# rows. YFCC100M has 100 million.
_LONGEST_LINE, _MOST_ROWS = 1 << 20, 1 << 28
# The columns that are read, with their usual names; a missing one reads as "".
_COLUMNS = {
    "number": ("photoid", "photo_id", "id"),
    "key": ("key", "hash", "photohash"),
    "url": ("downloadurl", "download_url", "url"),
    "marker": ("marker", "ext_marker"),
}
# Column indices in tables without a header, by their number of columns: the first release, later
# ones with row number and hash, the subset of 15 million (row, photo, hash), and plain numbers.
_LAYOUTS: dict[int, tuple[int | None, ...]] = {
    23: (0, None, 14, 22),
    25: (1, 2, 16, 24),
    3: (1, 2, None, None),
    1: (0, None, None, None),
}


@dataclass(frozen=True)
class Photos:
    """The photos of a metadata file.

    names: [M] uint64, sorted hashes of names. rows: [M] int32, the photo of each name.
    number: R. videos: rows that are videos. source: file name of the metadata.
    """

    names: NDArray[np.uint64]
    rows: NDArray[np.int32]
    number: int
    videos: int
    source: str

    def indices(self, files: Sequence[str]) -> NDArray[np.int64]:
        """Return the indices of the files that are photos."""
        return np.flatnonzero(self._rows_of(files) >= 0)

    def summarize(self, files: Sequence[str]) -> str:
        """Return how many photos are missing from the files."""
        rows = self._rows_of(files)
        missing = self.number - len(np.unique(rows[rows >= 0]))
        return f"{missing} of the photos in {self.source} are missing"

    def index(self, index: Callable[[str], Manifest], path: str) -> Manifest:
        """Return the manifest of the photos in an archive."""
        images = index(path)
        return images.select_images(self.indices(images.members))

    def _rows_of(self, files: Sequence[str]) -> NDArray[np.int64]:
        """Return the photo of each file, -1 if it is not one."""
        hashes = [_hash(PurePosixPath(name).name.partition(".")[0]) for name in files]
        wanted = np.array(hashes, np.uint64)
        places = np.searchsorted(self.names, wanted).clip(max=len(self.names) - 1)
        return np.where(self.names[places] == wanted, self.rows[places], -1)


def select_photos(files: FileList, metadata: str | None) -> FileList:
    """Return the photos that the metadata lists, as one class; all files without metadata."""
    if metadata is None:
        return files
    photos = read_metadata(os.path.expanduser(metadata))
    files.summarize, files.kind, files.numbered = photos.summarize, f"YFCC100M, {files.kind}", True
    files.selection = hashlib.sha256(photos.names.tobytes()).hexdigest()[:16]
    videos = f" (and {photos.videos} videos, which are not used)" if photos.videos else ""
    files.notes.append(f"{photos.source} lists {photos.number} photos{videos}")
    if files.index is not None:
        files.index = partial(photos.index, files.index)
        return files
    files.files = [files.files[i] for i in photos.indices(files.files).tolist()]
    files.labels, files.classes = [0] * len(files.files), [Path(files.base).resolve().name]
    if not files.files:
        raise DataError(
            f"none of the {photos.number} photos of {metadata} is in {files.base}: files must be "
            "named after a photo's number or key"
        )
    return files


def find_metadata(folder: str) -> str | None:
    """Return the metadata in a folder, by its usual names."""
    names = [name + suffix for name in NAMES for suffix in SUFFIXES]
    return next((str(path) for path in map(Path(folder).joinpath, names) if path.is_file()), None)


def read_metadata(path: str) -> Photos:
    """Read the photos of a tab-separated table (also .bz2) or of an SQLite file.

    Raises: DataError: the file cannot be read, has another format, or lists no photo.
    """
    try:
        start = read_file(path, length=16)
        return _collect(_sqlite_rows(path) if start == _SQLITE else _text_rows(path), path)
    except (OSError, EOFError, sqlite3.Error) as error:
        raise DataError(f"--data_path: the metadata {path} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"--data_path: the metadata {path} {error}") from error


def photo_key(url: str) -> str:
    """Return a photo's name in the Multimedia Commons: the bytes of the URL's MD5, each in hex
    without a leading zero.
    """
    digest = hashlib.md5(url.encode(), usedforsecurity=False).digest()
    return "".join(f"{byte:x}" for byte in digest)


def _collect(rows: Iterator[Sequence[str]], path: str) -> Photos:
    """Return the photos among rows of (number, key, url, marker)."""
    hashes, of = array("Q"), array("i")  # lists of 300 million would be many times as large
    number = videos = 0
    bar = tqdm(rows, desc="reading metadata", unit="photos", disable=None, delay=1, leave=False)
    for row, (photo, key, url, marker) in enumerate(bar):
        if row == _MOST_ROWS:
            raise ValueError(f"has more than {_MOST_ROWS} rows")
        if marker == _VIDEO:
            videos += 1
            continue
        names = _names(photo, key, url)
        hashes.extend(map(_hash, names))
        of.extend([number] * len(names))
        number += 1
    if not hashes:
        raise ValueError(f"lists no photo ({videos} videos)")
    unique, first = np.unique(np.frombuffer(hashes, np.uint64), return_index=True)
    return Photos(unique, np.frombuffer(of, np.int32)[first], number, videos, Path(path).name)


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _names(number: str, key: str, url: str) -> list[str]:
    """Return the distinct names that a photo's file can have."""
    names = [number, key]
    if len(key) == 32:  # with the leading zeros that the file name lacks
        names.append("".join(key[i : i + 2].removeprefix("0") or "0" for i in range(0, 32, 2)))
    if url:
        names.append(photo_key(url))
    return [name for name in dict.fromkeys(names) if name]


def _text_rows(path: str) -> Iterator[list[str]]:
    """Yield the columns of a tab-separated table, with or without a header."""
    with (bz2.open if path.endswith(".bz2") else open)(path, "rb") as file:
        columns: Sequence[int | None] = ()
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"has more than {_LONGEST_LINE} bytes in line {number}")
            values = [value.strip() for value in line.decode("utf-8", "replace").split("\t")]
            if number > _MOST_ROWS:  # empty lines too
                raise ValueError(f"has more than {_MOST_ROWS} rows")
            if values == [""]:
                continue
            if not columns:
                columns = _find_columns([value.lower() for value in values])
                if columns[0] is not None:
                    continue
                columns = _layout(values)
            if len(values) <= max(index for index in columns if index is not None):
                raise ValueError(f"has fewer columns in line {number} than before: {len(values)}")
            yield ["" if index is None else values[index] for index in columns]


def _find_columns(header: Sequence[str]) -> list[int | None]:
    """Return the indices of _COLUMNS in a header in lower case, None for those it lacks."""
    return [
        next((header.index(name) for name in names if name in header), None)
        for names in _COLUMNS.values()
    ]


def _layout(values: list[str]) -> Sequence[int | None]:
    """Return the column indices of a table without a header, by its first row."""
    layout = _LAYOUTS.get(len(values), (None,))
    if layout[0] is not None and values[layout[0]].isdigit():
        return layout
    raise ValueError(
        f"begins with {values[:4]!r}, {len(values)} tab-separated columns: expected YFCC100M's "
        "table (25, or 23 without row and hash), its subset (row, photo, hash), one photo "
        "number per line, a header with a column photoid, or SQLite"
    )


def _sqlite_rows(path: str) -> Iterator[list[str]]:
    """Yield the columns of an SQLite file's only table, or of the one named as in YFCC100M."""
    address = Path(path).resolve().as_uri() + "?mode=ro"
    with closing(sqlite3.connect(address, uri=True)) as base:
        if hasattr(base, "setlimit"):  # from Python 3.11 on
            base.setlimit(0, _LONGEST_LINE)  # SQLITE_LIMIT_LENGTH
        query = "select name from sqlite_master where type = 'table'"
        tables = [name for (name,) in base.execute(query)]
        table = _TABLE if _TABLE in tables or len(tables) != 1 else tables[0]
        if table not in tables:
            raise ValueError(f"has no table {_TABLE}; it has: {', '.join(tables) or 'none'}")
        header = [row[1] for row in base.execute(f"pragma table_info({_quoted(table)})")]
        columns = _find_columns([name.lower() for name in header])
        if columns[0] is None:
            raise ValueError(f"has no column photoid in {table}; it has {', '.join(header)}")
        names = ["''" if index is None else _quoted(header[index]) for index in columns]
        for row in base.execute(f"select {', '.join(names)} from {_quoted(table)}"):
            yield ["" if value is None else str(value) for value in row]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'

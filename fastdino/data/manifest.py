"""What a scan found, as columns, and its copy on disk, from which the next scan takes what holds.

Legend: f files (images, or tars of them), n images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import PIL
from numpy.typing import NDArray

from fastdino.files import atomic_write

_FORMAT = "fastdino images 2"


class Names(Sequence[str]):
    """Strings in two arrays: a million of them cost their bytes, and forked workers share them.

    (A list's strings are copied by each worker, page by page, as it counts references in them.)
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        index %= len(self)
        name = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return name.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@dataclass
class Table:
    """n images in f files, in the files' order.

    files: [f] names.
    stamps: [f, 2] int64, bytes and mtime in ns; -1 where reading failed, which may pass.
    counts: [f] int64, images in each file: 1 where it is one itself.
    notes: file -> what is wrong with it, where it is an archive.
    members: [n] names within the archive; "" where the file is the image.
    parts: [n, 3] int64, reading.Part: offset, length, inflated; zeros where the file is the image.
    headers: [n, 3] int32, height, width, swapped (reading.Header); zeros where there is a reason.
    labels: [n] what a .cls or .json beside it in the archive says; "" where none does.
    reasons: image -> why it cannot be used.
    selection: places.Found's.
    """

    files: list[str]
    stamps: NDArray[np.int64]
    counts: NDArray[np.int64]
    members: list[str]
    parts: NDArray[np.int64]
    headers: NDArray[np.int32]
    labels: list[str]
    notes: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    selection: str = ""

    def check(self) -> None:
        """Raises ValueError where the columns do not belong together."""
        f, n = len(self.files), len(self.members)
        shapes = (self.stamps.shape, self.counts.shape, self.parts.shape, self.headers.shape)
        if shapes != ((f, 2), (f,), (n, 3), (n, 3)) or len(self.labels) != n:
            raise ValueError(f"columns of other lengths: {f} files, {n} images, {shapes}")
        if self.counts.sum() != n or (self.counts < 0).any():
            raise ValueError(f"{n} images, and {self.counts.sum()} by the files' counts")
        if any(not 0 <= i < n for i in self.reasons) or any(not 0 <= i < f for i in self.notes):
            raise ValueError("a reason for an image that is not there")


def concatenate(tables: Sequence[Table]) -> Table:
    """The tables one after the other."""
    notes: dict[int, str] = {}
    reasons: dict[int, str] = {}
    files = images = 0
    for table in tables:
        notes |= {files + i: note for i, note in table.notes.items()}
        reasons |= {images + i: reason for i, reason in table.reasons.items()}
        files, images = files + len(table.files), images + len(table.members)
    return Table(
        files=[name for table in tables for name in table.files],
        stamps=np.concatenate([np.zeros((0, 2), np.int64), *(t.stamps for t in tables)]),
        counts=np.concatenate([np.zeros(0, np.int64), *(t.counts for t in tables)]),
        members=[name for table in tables for name in table.members],
        parts=np.concatenate([np.zeros((0, 3), np.int64), *(t.parts for t in tables)]),
        headers=np.concatenate([np.zeros((0, 3), np.int32), *(t.headers for t in tables)]),
        labels=[label for table in tables for label in table.labels],
        notes=notes,
        reasons=reasons,
    )


def save(table: Table, path: Path) -> None:
    """Writes the table, whole or not at all; raises OSError."""
    about = {
        "format": _FORMAT,
        "pillow": PIL.__version__,  # whose verdict it is
        "selection": table.selection,
        "notes": list(table.notes.items()),
        "reasons": list(table.reasons.items()),
    }
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            about=_blob([json.dumps(about)]),
            files=_blob(table.files),
            members=_blob(table.members),
            labels=_blob(table.labels),
            stamps=table.stamps,
            counts=table.counts,
            parts=table.parts,
            headers=table.headers,
        )


def load(path: Path) -> Table:
    """Reads what save wrote, with nothing run from the file.

    Raises: FileNotFoundError; ValueError: what is there is damaged, or another version's.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as columns:
            about = json.loads(_strings(columns["about"])[0])
            if about["format"] != _FORMAT or about["pillow"] != PIL.__version__:
                raise ValueError(f"it is of {about['format']!r}, Pillow {about['pillow']}")
            table = Table(
                files=_strings(columns["files"]),
                members=_strings(columns["members"]),
                labels=_strings(columns["labels"]),
                stamps=columns["stamps"].astype(np.int64, casting="safe"),
                counts=columns["counts"].astype(np.int64, casting="safe"),
                parts=columns["parts"].astype(np.int64, casting="safe"),
                headers=columns["headers"].astype(np.int32, casting="safe"),
                notes={int(i): str(note) for i, note in about["notes"]},
                reasons={int(i): str(reason) for i, reason in about["reasons"]},
                selection=str(about["selection"]),
            )
            table.check()
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # numpy, zipfile, zlib and json raise all kinds on damaged bytes.
        raise ValueError(str(error) or type(error).__name__) from error
    return table


def _blob(names: Sequence[str]) -> NDArray[np.uint8]:
    """Each name, and a byte 0 after it, which no path holds."""
    text = "".join(f"{name}\0" for name in names)
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def _strings(blob: NDArray[Any]) -> list[str]:
    return blob.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]

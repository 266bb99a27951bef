"""The images of a dataset as columns, and images.npz, which keeps them between runs.

Notation: f files (image files or archives), n images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from fastdino.data.image_files import Part
from fastdino.files import atomic_write

_FORMAT = "fastdino images 3"
# Keeps every string exactly, in every locale. "surrogateescape" would turn UTF-8 bytes into
# characters, which an ASCII locale cannot encode when the file is opened.
_CODEC = ("utf-8", "surrogatepass")


class Names(Sequence[str]):
    """A compact, immutable list of strings, stored in two arrays.

    Forked workers share the arrays. A list would be copied into every worker page by page, because
    reading a string changes its reference count.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode(*_CODEC) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        index %= len(self)
        name = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return name.decode(*_CODEC)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@dataclass
class Manifest:
    """n images in f files, grouped by file, in the order of the files.

    files: [f] image files or archives, relative to the dataset's folder.
    file_ids: [n] int32, index into files.
    members: [n] name within the archive; "" for an image file.
    parts: [n, 3] int64, offset, length and inflated length (image_files.Part); zeros for an image
        file.
    labels: [n] label stored in the archive; "" if it has none.
    reasons: image -> why it cannot be used.
    notes: archive -> its defect.
    stamps: [f, 2] int64, size in bytes and mtime in ns; -1 if reading failed and may work later.
    headers: [n, 3] int32, height, width, traits (image_files.Header); zeros if there is a reason.
    selection: identifies which images of the files were requested (FileList.selection).
    """

    files: Sequence[str]
    file_ids: NDArray[np.int32]
    members: Sequence[str]
    parts: NDArray[np.int64]
    labels: Sequence[str]
    reasons: dict[int, str]
    notes: dict[int, str]
    stamps: NDArray[np.int64]
    headers: NDArray[np.int32]
    selection: str = ""

    def check(self, f: int) -> None:
        """Raise ValueError unless all columns are of f files and of equally many images."""
        n = len(self.members)
        shapes = (self.stamps.shape, self.file_ids.shape, self.parts.shape, self.headers.shape)
        lengths = (len(self.files), len(self.labels))
        if shapes != ((f, 2), (n,), (n, 3), (n, 3)) or lengths != (f, n):
            raise ValueError(f"columns of different lengths: {f} files, {n} images, {shapes}")
        if any(not 0 <= i < n for i in self.reasons) or any(not 0 <= i < f for i in self.notes):
            raise ValueError("a reason for an image that does not exist")

    def counts(self) -> NDArray[np.int64]:
        """Return the number of images per file, [f]."""
        return np.bincount(self.file_ids, minlength=len(self.files))

    def select_images(self, images: NDArray[np.int64]) -> Manifest:
        """Return the manifest of these images, in this order; an image may be repeated."""
        return replace(
            self,
            files=Names(self.files),
            file_ids=self.file_ids[images],
            members=Names([self.members[i] for i in images.tolist()]),
            parts=self.parts[images],
            labels=Names([self.labels[i] for i in images.tolist()]),
            reasons=_renumber(self.reasons, images),
            headers=self.headers[images],
        )

    def select_files(self, rows: NDArray[np.int64]) -> Manifest:
        """Return the manifest of these files and all their images, in this order."""
        all_counts = self.counts()
        counts = all_counts[rows]
        shifts = (np.cumsum(all_counts) - all_counts)[rows] - (np.cumsum(counts) - counts)
        images = np.repeat(shifts, counts) + np.arange(counts.sum())
        return replace(
            self.select_images(images),
            files=[self.files[row] for row in rows.tolist()],
            file_ids=np.repeat(np.arange(len(rows), dtype=np.int32), counts),
            notes=_renumber(self.notes, rows),
            stamps=self.stamps[rows],
        )


def unread_manifest(
    files: Sequence[str],
    members: Sequence[str] | None = None,
    parts: Sequence[Part] | NDArray[np.int64] = (),
    labels: Sequence[str] = (),
    reasons: dict[int, str] | None = None,
    note: str = "",
) -> Manifest:
    """Return the manifest of image files, or of the members of one archive, without headers."""
    n = len(files) if members is None else len(members)
    of_archive = members is not None
    return Manifest(
        files=files,
        file_ids=np.zeros(n, np.int32) if of_archive else np.arange(n, dtype=np.int32),
        members=[""] * n if members is None else members,
        parts=np.array(parts, np.int64).reshape(n, 3) if of_archive else np.zeros((n, 3), np.int64),
        labels=labels or [""] * n,
        reasons=reasons or {},
        notes={0: note} if note else {},
        stamps=np.full((len(files), 2), -1),
        headers=np.zeros((n, 3), np.int32),
    )


def concatenate(manifests: Sequence[Manifest]) -> Manifest:
    """Return one manifest with the files of all, in order."""
    columns: dict[str, Any] = {name: [] for name in ("files", "members", "labels")}
    notes: dict[int, str] = {}
    reasons: dict[int, str] = {}
    file_ids = []
    for one in manifests:
        first_file, first_image = len(columns["files"]), len(columns["members"])
        notes |= {first_file + i: note for i, note in one.notes.items()}
        reasons |= {first_image + i: reason for i, reason in one.reasons.items()}
        file_ids.append(one.file_ids + np.int32(first_file))
        for name in ("files", "members", "labels"):
            columns[name] += getattr(one, name)
    if not manifests:
        return unread_manifest([])
    for name in ("parts", "stamps", "headers"):
        columns[name] = np.concatenate([getattr(one, name) for one in manifests])
    return Manifest(file_ids=np.concatenate(file_ids), reasons=reasons, notes=notes, **columns)


def save(manifest: Manifest, path: Path) -> None:
    """Write a manifest atomically; raise OSError on failure."""
    about = {
        "format": _FORMAT,
        "pillow": PIL.__version__,  # another version may accept other files
        "selection": manifest.selection,
        "notes": list(manifest.notes.items()),
        "reasons": list(manifest.reasons.items()),
    }
    columns: dict[str, Any] = {"about": _blob([json.dumps(about)]), "counts": manifest.counts()}
    columns |= {name: _blob(getattr(manifest, name)) for name in ("files", "members", "labels")}
    columns |= {name: getattr(manifest, name) for name in ("stamps", "parts", "headers")}
    with atomic_write(path) as file:
        np.savez_compressed(file, **columns)


def load(path: Path) -> Manifest:
    """Read a manifest written by save, without executing anything from the file.

    Raises: FileNotFoundError; ValueError: the file is damaged or of another version.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as columns:
            about = json.loads(_strings(columns["about"])[0])
            if about["format"] != _FORMAT or about["pillow"] != PIL.__version__:
                raise ValueError(f"written as {about['format']!r} with Pillow {about['pillow']}")
            counts = columns["counts"].astype(np.int64, casting="safe")
            manifest = Manifest(
                files=_strings(columns["files"]),
                file_ids=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
                members=_strings(columns["members"]),
                parts=columns["parts"].astype(np.int64, casting="safe"),
                labels=_strings(columns["labels"]),
                reasons={int(i): str(reason) for i, reason in about["reasons"]},
                notes={int(i): str(note) for i, note in about["notes"]},
                stamps=columns["stamps"].astype(np.int64, casting="safe"),
                headers=columns["headers"].astype(np.int32, casting="safe"),
                selection=str(about["selection"]),
            )
            manifest.check(len(counts))
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # numpy, zipfile, zlib and json raise many types on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from error
    return manifest


def _renumber(texts: dict[int, str], kept: NDArray[np.int64]) -> dict[int, str]:
    """Return the texts of the kept rows under their new indices."""
    return {new: texts[old] for new, old in enumerate(kept.tolist()) if old in texts}


def _blob(names: Sequence[str]) -> NDArray[np.uint8]:
    """Encode names as one array, each terminated by a zero byte, which no path contains."""
    text = "".join(f"{name}\0" for name in names)
    return np.frombuffer(text.encode(*_CODEC), np.uint8)


def _strings(blob: NDArray[Any]) -> list[str]:
    return blob.tobytes().decode(*_CODEC).split("\0")[:-1]

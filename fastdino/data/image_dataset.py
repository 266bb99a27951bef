"""The images of a run: what --data_path holds, without what is broken, and the bytes of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data import manifest as tables
from fastdino.data.bad_images import first_names, raise_if_many_bad
from fastdino.data.datasets.archives import class_names
from fastdino.data.datasets.data_path import Found, known_labels, number_labels
from fastdino.data.datasets.registry import find
from fastdino.data.image_files import Part, decode_rgb, read_file, read_part
from fastdino.data.manifest import Names, Table
from fastdino.data.scanning import Scanner
from fastdino.errors import DataError


@dataclass(frozen=True)
class InArchives:
    """Where images lie in archives: n of them in files of `files`.

    file: [n] int32, places in `files`. parts: [n, 3] int64, reading.Part.
    """

    files: Names
    file: NDArray[np.int32]
    parts: NDArray[np.int64]


@dataclass(frozen=True)
class ImageDataset:
    """The images whose header can be read; any one can be read at any time, in any process.

    paths: n names: files, in the order of torchvision's ImageFolder, or "ARCHIVE/MEMBER".
    labels: [n] int64, places in `classes`.
    classes: the first-level folders, sorted (empty ones too), or what the labels or the tars are
        called; a flat folder is one class.
    sizes: [n, 2] int32 (height, width) in pixels, as decoded.
    skipped: what was left out, with the reason.
    broken: how many of the skipped are images that cannot be read.
    kind: what it is, in a few words.
    fingerprint: of the names and sizes, in their order; the same wherever the images lie.
    exif: images are turned as their EXIF orientation says.
    notes: what is to be said about the scan.
    """

    paths: Sequence[str]
    labels: NDArray[np.int64]
    classes: list[str]
    sizes: NDArray[np.int32]
    skipped: dict[str, str]
    broken: int = 0
    kind: str = ""
    fingerprint: str = ""
    exif: bool = False
    notes: tuple[str, ...] = ()
    in_archives: InArchives | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Return the path of an image, or "ARCHIVE/MEMBER"."""
        return self.paths[index]

    @property
    def files(self) -> Sequence[str]:
        """The paths of all files that hold the images."""
        return self.paths if self.in_archives is None else self.in_archives.files

    def read_bytes(self, index: int) -> bytes:
        """The encoded image; what may pass is tried again.

        Raises: OSError: reading keeps failing. UnusableImageError: its archive has changed.
        """
        archives = self.in_archives
        if archives is None:
            return read_file(self.paths[index])
        part = Part(*archives.parts[index].tolist())
        return read_part(archives.files[int(archives.file[index])], part)

    def read_rgb(self, index: int) -> Image.Image:
        """The decoded image; raises what reading and decoding raise."""
        return decode_rgb(self.read_bytes(index), exif=self.exif)

    def subset(self, indices: NDArray[np.int64]) -> ImageDataset:
        """These of the images, [m], in this order; the same one may come several times."""
        within = self.in_archives
        if within is not None:
            within = replace(within, file=within.file[indices], parts=within.parts[indices])
        return replace(
            self,
            paths=Names([self.paths[i] for i in indices.tolist()]),
            labels=self.labels[indices],
            sizes=self.sizes[indices],
            in_archives=within,
            fingerprint="",
        )


def scan_images(
    data_path: str | os.PathLike[str],
    *,
    max_bad_share: float = 0.05,
    workers: int = 8,
    exif: bool = False,
    cache: Path | None = None,
    role: str = "",
) -> ImageDataset:
    """Finds the images and reads their headers, without decoding them.

    data_path is one of (docs/data.md has them all)
    - a folder with one folder a class (images anywhere below it), or with the images themselves;
    - a text file with the path of an image a line, relative to the file's folder, and a label
      after it or none; lines that begin with # are passed over;
    - a folder of .tar or .zip files, one of them, or a pattern ('train-{000..146}.tar'). Their
      classes are what .cls or .json members say, in shards; else each archive is one; in an only
      one, each folder or tar in it. With metadata of YFCC100M, the photos that it names;
    - DAVIS, a set of torchvision (torchvision:NAME), or of Hugging Face (hf:NAME or hf:FOLDER).
    Options follow it: ?split=... of what has splits.

    A JPEG or PNG whose end marker is missing is decoded, to see whether it is whole. What cannot be
    read is skipped, and so are images beside class folders, which ImageFolder passes over too.

    Args:
        max_bad_share: share of broken images above which the scan is an error.
        workers: threads.
        exif: sizes are those of the images turned as their EXIF orientation says.
        cache: file of an earlier scan's verdicts, of which those hold whose file has the same size
            and mtime; written anew where any does not.
        role: of an evaluation's two splits which one, "train" or "val"; "": what data_path says.
    Raises: DataError: nothing of that kind there, what cannot be read, a compressed tar, no images,
        too many broken ones, more images beside the class folders than in them.
    """
    found = find(os.fspath(data_path), role)
    table, notes = _scan(found, workers, cache)
    notes = [*found.notes, *_missing(found, table), *notes]
    paths = _paths(found, table)
    skipped = found.skipped | {found.path(table.files[i]): why for i, why in table.notes.items()}
    bad = {paths[i]: reason for i, reason in table.reasons.items()}
    if not len(table.members):
        why = first_names(skipped) or "; ".join(notes) or f"{found.kind} has none"
        raise DataError(f"no images in {data_path}: {why}")
    raise_if_many_bad(bad, len(paths), max_bad_share)
    if len(table.reasons) == len(paths):
        raise DataError(
            f"none of the {len(paths)} images in {data_path} can be read: {first_names(bad)}"
        )
    labels, classes, kind = _labels(found, table)
    good = np.ones(len(paths), bool)
    good[list(table.reasons)] = False
    kept = np.flatnonzero(good).tolist()
    return ImageDataset(
        paths=Names([paths[i] for i in kept]),
        labels=np.array(labels, dtype=np.int64)[good],
        classes=classes,
        sizes=_sizes(table, exif)[good],
        skipped=skipped | bad,
        broken=len(bad),
        kind=kind,
        fingerprint=_fingerprint(table, good),
        exif=exif,
        notes=tuple(notes),
        in_archives=None if found.labels is not None else _in_archives(found, table, good),
    )


def _scan(found: Found, workers: int, cache: Path | None) -> tuple[Table, list[str]]:
    """The table of what was found, and what is to be said of the cache."""
    known, notes = None, []
    if cache is not None:
        try:
            known = tables.load(cache)
        except FileNotFoundError:
            pass
        except ValueError as error:
            notes.append(f"{cache} cannot be used ({error}): all images are looked at again")
    if known and any(known.members) != (found.labels is None):
        known = None  # of images, and these are archives, or the other way round
    if known and known.selection != found.selection:
        known = None  # of what else is in these files
    scanner = Scanner(workers, known)
    if found.labels is None:
        table = scanner.archives(found)
    else:
        table = scanner.images([found.path(file) for file in found.files], found.files)
    table.selection = found.selection
    if cache is None or (known and not scanner.fresh and known.files == table.files):
        return table, notes
    if known:
        what = f"{found.archive}s" if found.labels is None else "images"
        notes.append(
            f"{cache} is not of these {what} as they are: {scanner.fresh} of {len(found.files)} "
            "are new or changed and were looked at"
        )
    try:
        tables.save(table, cache)
    except OSError as error:
        notes.append(f"{cache} cannot be written ({error}): the next scan starts anew")
    return table, notes


def _missing(found: Found, table: Table) -> list[str]:
    """What is to be said of photos that are asked for and are not there."""
    if found.photos is None:
        return []
    names = table.files if found.labels is not None else table.members
    missing = found.photos.missing(names)
    return [f"{missing} of the photos that {found.photos.source} names are not here"]


def _paths(found: Found, table: Table) -> list[str]:
    """The name of each image: its path, or its archive's and its own in it."""
    files = [found.path(file) for file in table.files]
    if found.labels is not None:
        return files
    of = np.repeat(np.arange(len(files)), table.counts).tolist()
    return [f"{files[i]}/{member}" for i, member in zip(of, table.members, strict=True)]


def _labels(found: Found, table: Table) -> tuple[list[int], list[str], str]:
    """Class numbers, classes, and the source's kind."""
    if found.labels is not None:
        return found.labels, found.classes, found.kind
    lone = Path(found.base).resolve().name
    number, archive = len(table.files), found.archive
    if found.classes and any(table.labels):
        return *known_labels(table.labels, found.classes), found.kind
    if found.kind != f"{archive}s":  # a set by its name, which has labels or none
        return *number_labels(table.labels, lone), f"{found.kind}: {number} {archive}(s)"
    if any(table.labels):
        return *number_labels(table.labels, lone), f"{number} labelled {archive} shard(s)"
    if found.numbered:
        return *number_labels(table.labels, lone), f"{number} {archive} shards"
    names = class_names(table.files, table.counts.tolist(), table.members)
    return *number_labels(names, lone), f"class {archive}s: {number} {archive}(s)"


def _sizes(table: Table, exif: bool) -> NDArray[np.int32]:
    sizes = table.headers[:, :2]
    return np.where(table.headers[:, 2:] == 1, sizes[:, ::-1], sizes) if exif else sizes


def _fingerprint(table: Table, good: NDArray[np.bool_]) -> str:
    """A hash of the names, relative to the source, and the stored sizes of the good images."""
    digest = hashlib.sha256()
    of = np.repeat(np.arange(len(table.files)), table.counts)
    for i in np.flatnonzero(good).tolist():
        name = f"{table.files[of[i]]}\0{table.members[i]}\0"
        digest.update(name.encode("utf-8", "surrogateescape"))
    digest.update(table.headers[good, :2].astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def _in_archives(found: Found, table: Table, good: NDArray[np.bool_]) -> InArchives:
    return InArchives(
        files=Names([found.path(file) for file in table.files]),
        file=np.repeat(np.arange(len(table.files), dtype=np.int32), table.counts)[good],
        parts=table.parts[good],
    )

"""The images of a run: those that --data_path names and whose headers can be read."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.bad_images import first_names, raise_if_many_bad
from fastdino.data.datasets.archives import label_images
from fastdino.data.datasets.file_list import UNLABELLED, FileList
from fastdino.data.datasets.registry import find_dataset
from fastdino.data.image_files import (
    AS_STORED,
    DEEP,
    PAGED,
    SWAPPED,
    Conversion,
    Part,
    read_file,
    read_part,
)
from fastdino.data.manifest import Manifest
from fastdino.data.rgb_conversion import deep_warning
from fastdino.data.scanning import scan
from fastdino.errors import DataError


@dataclass(frozen=True)
class ImageDataset:
    """n images with readable headers; any of them can be read at any time, in any process.

    base: folder that the manifest's files are relative to.
    manifest: file, member and byte range of each image.
    labels: [n] int64, class numbers.
    classes: names of first-level folders (empty ones too), archives or labels, sorted.
    labelled: [n] bool, which images have a label; None if all have. The others are of the last
        class, which has no other images.
    sizes: [n, 2] int32, height and width in pixels as decoded.
    kind: short description for the log.
    skipped: path -> reason, for files and images that are not used.
    broken: how many of the skipped are unreadable images.
    conversion: how images become RGB.
    deep: number of images with one channel of more than 8 bits, as of the scan.
    notes: messages for the log.
    fingerprint: hash of names and sizes in order; independent of the dataset's folder.
    """

    base: str
    manifest: Manifest
    labels: NDArray[np.int64]
    classes: list[str]
    sizes: NDArray[np.int32]
    kind: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    broken: int = 0
    conversion: Conversion = AS_STORED
    deep: int = 0
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    labelled: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def warning(self) -> str | None:
        """A warning of deep images that the conversion makes white or black; None without."""
        return deep_warning(self.deep, len(self), self.conversion.image_range)

    def path(self, index: int) -> str:
        """Return the path of an image; ARCHIVE/MEMBER for an image in an archive."""
        return _image_path(self.base, self.manifest, index)

    def name(self, index: int) -> str:
        """Return the path of an image relative to the dataset's folder."""
        return _image_path("", self.manifest, index)

    def known_labels(self) -> tuple[NDArray[np.int64], list[str]]:
        """Return the labels [n], -1 for an image without one, and the names of their classes."""
        if self.labelled is None:
            return self.labels, self.classes
        return np.where(self.labelled, self.labels, -1), self.classes[:-1]

    @property
    def paths(self) -> list[str]:
        """The paths of all images."""
        return [self.path(i) for i in range(len(self))]

    @property
    def files(self) -> list[str]:
        """The paths of the files that hold the images: image files or archives."""
        used = np.unique(self.manifest.file_ids).tolist()
        return [os.path.join(self.base, self.manifest.files[file]) for file in used]

    def check_present(self) -> None:
        """Raise DataError if this machine has no file of the dataset, which another one scanned."""
        used = self.manifest.file_ids[[0, len(self) // 2, -1]].tolist()
        files = [os.path.join(self.base, self.manifest.files[file]) for file in used]
        if not any(map(os.path.exists, files)):
            raise DataError(
                f"{socket.gethostname()} has no {files[0]}, which rank 0 found: every node needs "
                "the dataset at the same path"
            )

    def read_bytes(self, index: int) -> bytes:
        """Read an encoded image, with retries after transient errors.

        Raises: OSError: reading keeps failing. UnusableImageError: its archive has changed.
        """
        images = self.manifest
        path = os.path.join(self.base, images.files[images.file_ids[index]])
        part = Part(*images.parts[index].tolist())
        return read_part(path, part) if images.members[index] else read_file(path)

    def read_rgb(self, index: int) -> Image.Image:
        """Read and decode an image; raises what read_bytes and Pillow raise."""
        return self.conversion.decode(self.read_bytes(index))

    def subset(self, indices: NDArray[np.int64]) -> ImageDataset:
        """Return the dataset of these images, [m], in this order; an image may be repeated."""
        return replace(
            self,
            manifest=self.manifest.select_images(indices),
            labels=self.labels[indices],
            sizes=self.sizes[indices],
            fingerprint="",
            labelled=None if self.labelled is None else self.labelled[indices],
        )


def scan_images(
    data_path: str | os.PathLike[str],
    *,
    max_bad_share: float = 0.05,
    workers: int = 8,
    conversion: Conversion = AS_STORED,
    cache: Path | None = None,
    role: str = "",
) -> ImageDataset:
    """Find the images of a dataset and read their headers, without decoding them.

    A JPEG or PNG without its end marker is decoded, to check whether it is complete. Unreadable
    images are skipped, and so are images next to class folders, which ImageFolder ignores too.

    Args:
        data_path: [SCHEME:]PATH[?name=value&...]: a folder, an archive, a list or a dataset by
            name; docs/data.md describes them all.
        max_bad_share: largest allowed share of unreadable images.
        workers: threads.
        conversion: how images become RGB; `sizes` are those after its rotation.
        cache: images.npz of an earlier scan. Files with the same size and mtime are not opened
            again. It is rewritten if anything changed.
        role: "train" or "val" for one of an evaluation's two splits, "" for training. Images
            without labels are then left out.
    Raises: DataError: data_path is not a dataset, has no images or too many unreadable ones, or no
        labels for an evaluation.
    """
    files = find_dataset(os.fspath(data_path), role)
    images, cache_notes = scan(files, workers, cache)
    notes = [*files.notes]
    if files.summarize:
        notes.append(files.summarize(images.members if files.archive else images.files))
    notes += cache_notes
    bad = {_image_path(files.base, images, i): reason for i, reason in images.reasons.items()}
    skipped = files.skipped | {files.path(images.files[i]): why for i, why in images.notes.items()}
    total = len(images.members)
    why_none = first_names(skipped) or "; ".join(notes) or f"{files.kind} contains none"
    _check_readable(data_path, total, bad, max_bad_share, why_none)
    kept = np.array([i for i in range(total) if i not in images.reasons])
    labels, classes, kind = _labels(files, images, role, notes)
    if role and files.labelled is not None:
        _check_labels(files.labelled, f"{role} of {data_path} ({kind})")
        kept, classes = _only_labelled(files.labelled, kept, classes, notes)
        files.labelled = None
    readable = images.select_images(kept)
    traits = readable.headers[:, 2]
    if paged := np.count_nonzero(traits & PAGED):
        notes.append(f"{paged} images have several pages or frames: the first one is used")
    return ImageDataset(
        base=files.base,
        manifest=readable,
        labels=labels[kept],
        classes=classes,
        sizes=_sizes(readable, conversion),
        kind=kind,
        skipped=skipped | bad,
        broken=len(bad),
        conversion=conversion,
        deep=int(np.count_nonzero(traits & DEEP)),
        notes=tuple(notes),
        fingerprint=_fingerprint(readable),
        labelled=None if files.labelled is None else np.array(files.labelled, bool)[kept],
    )


def _labels(
    files: FileList, images: Manifest, role: str, notes: list[str]
) -> tuple[NDArray[np.int64], list[str], str]:
    """Return the class number of each image, the classes, and the dataset's kind.

    Training uses no labels, so invalid ones are one class.

    Raises: DataError: labels are invalid, and an evaluation needs them.
    """
    labels, classes, kind = files.labels, files.classes, files.kind
    if labels is None:
        try:
            labels, classes, kind = label_images(files, images)
        except DataError as error:
            if role:
                raise
            notes.append(f"labels are not used: {error}")
            labels, classes = [0] * len(images.members), [UNLABELLED]
            files.labelled = [False] * len(images.members)
    return np.array(labels, dtype=np.int64), classes, kind


def _check_labels(labelled: Sequence[bool], where: str) -> None:
    """Raise DataError if no image has a label."""
    if not any(labelled):
        flat = where.endswith("(a flat folder)")
        problem = "has no class folders: expected one folder per class" if flat else "has no labels"
        raise DataError(f"{where} {problem}")


def _only_labelled(
    labelled: Sequence[bool], kept: NDArray[np.int64], classes: list[str], notes: list[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Return the kept images that have a label, and the classes without the last one."""
    has_label = np.array(labelled, dtype=bool)[kept]
    if not has_label.all():
        notes.append(f"{np.count_nonzero(~has_label)} images without a label are left out")
    return kept[has_label], classes[:-1]


def _sizes(images: Manifest, conversion: Conversion) -> NDArray[np.int32]:
    """Return the height and width of each image after its rotation, [n, 2]."""
    sizes: NDArray[np.int32] = images.headers[:, :2]
    if conversion.exif:
        sizes = np.where(images.headers[:, 2:] & SWAPPED, sizes[:, ::-1], sizes)
    return sizes


def _check_readable(
    data_path: str | os.PathLike[str],
    total: int,
    bad: dict[str, str],
    max_bad_share: float,
    why_none: str,
) -> None:
    """Raise DataError if there are no images, or too many that cannot be read."""
    if not total:
        raise DataError(f"no images in {data_path}: {why_none}")
    try:
        raise_if_many_bad(bad, total, max_bad_share)
    except DataError as error:
        raise DataError(f"{data_path}: {error}") from None


def _image_path(base: str, images: Manifest, index: int) -> str:
    file = os.path.join(base, images.files[images.file_ids[index]])
    return f"{file}/{images.members[index]}" if images.members[index] else file


def _fingerprint(images: Manifest) -> str:
    """Return a hash of the names, relative to the dataset's folder, and the stored sizes."""
    digest, files = hashlib.sha256(), list(images.files)
    for file, member in zip(images.file_ids.tolist(), images.members, strict=True):
        digest.update(f"{files[file]}\0{member}\0".encode("utf-8", "surrogateescape"))
    digest.update(images.headers[:, :2].astype("<i4").tobytes())
    return digest.hexdigest()[:16]

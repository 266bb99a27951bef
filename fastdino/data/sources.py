"""Which images there are, which of them are broken, and in which order an epoch sees them."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastdino.errors import DataError

# As torchvision.datasets.ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# The last bytes of a whole file, for the formats whose header says nothing about its length.
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_FILES_A_TASK = 256
_NAMED = 5


@dataclass(frozen=True)
class ImageSource:
    """The images of a folder whose header can be read.

    paths: n files, in the order of torchvision's ImageFolder.
    labels: [n] int64, places in `classes`.
    classes: the first-level folders, sorted (empty ones too); a flat folder is one class.
    sizes: [n, 2] int32 (height, width) in pixels, without EXIF rotation.
    skipped: what was left out, with the reason.
    broken: how many of the skipped are images that cannot be read.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    sizes: NDArray[np.int32]
    skipped: dict[str, str]
    broken: int = 0

    def __len__(self) -> int:
        return len(self.paths)


def scan_images(
    root: str | os.PathLike[str], *, max_bad_share: float = 0.05, workers: int = 8
) -> ImageSource:
    """Finds the images under root and reads their headers, without decoding them.

    root holds one folder a class (images anywhere below it), or the images themselves. A JPEG or
    PNG whose end marker is missing is decoded, to see whether it is whole. What cannot be read is
    skipped, and so are images beside class folders, which ImageFolder passes over too.

    Args:
        max_bad_share: share of broken images above which the scan is an error.
        workers: threads.
    Raises: DataError: no such folder, one that cannot be read, no images, too many broken ones,
        more images beside the class folders than in them.
    """
    root = os.fspath(root)
    skipped: dict[str, str] = {}
    paths, labels, classes = _find_images(root, skipped)
    chunks = [paths[i : i + _FILES_A_TASK] for i in range(0, len(paths), _FILES_A_TASK)]
    with quiet_pillow(), ThreadPoolExecutor(max(1, workers)) as pool:
        found = [one for chunk in pool.map(_inspect_all, chunks) for one in chunk]
    bad = {p: one for p, one in zip(paths, found, strict=True) if isinstance(one, str)}
    raise_if_many_bad(bad, len(paths), max_bad_share)
    if len(bad) == len(paths):
        raise DataError(f"none of the {len(paths)} images in {root} can be read: {_names(bad)}")
    good = [i for i, one in enumerate(found) if not isinstance(one, str)]
    return ImageSource(
        paths=[paths[i] for i in good],
        labels=np.array([labels[i] for i in good], dtype=np.int64),
        classes=classes,
        sizes=np.array([found[i] for i in good], dtype=np.int32).reshape(-1, 2),
        skipped=skipped | bad,
        broken=len(bad),
    )


def _find_images(root: str, skipped: dict[str, str]) -> tuple[list[str], list[int], list[str]]:
    """paths, labels, classes; what is passed over is added to skipped."""
    if not os.path.exists(root):
        raise DataError(f"--data_path: there is no folder {root}")
    if not os.path.isdir(root):
        raise DataError(f"--data_path must be a folder of images, and {root} is a file")
    try:
        with os.scandir(root) as entries:
            folders = sorted(entry.name for entry in entries if _is_dir(entry))
    except OSError as error:
        raise DataError(f"--data_path: the folder {root} cannot be read: {error}") from error
    loose = sorted(entry.path for entry in os.scandir(root) if _is_image_file(entry))
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        below = _images_below(os.path.join(root, folder))
        paths += below
        labels += [label] * len(below)
    if len(loose) > len(paths) > 0:
        raise DataError(
            f"{root} holds {len(loose)} images, and folders with {len(paths)} more: images beside "
            "folders would not be used. Move them into a folder of their own, or the folders away"
        )
    if paths:
        skipped |= dict.fromkeys(loose, "lies beside the class folders")
        return paths, labels, folders
    if not loose:
        raise DataError(
            f"no images in {root}: neither there nor in folders below it is a file that "
            f"ends in {', '.join(EXTENSIONS)}"
        )
    return loose, [0] * len(loose), [Path(root).resolve().name]


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and not _is_dir(entry)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _images_below(folder: str) -> list[str]:
    """Images in ImageFolder's order: by folder, then name. Links are followed, cycles are not."""

    def fail(error: OSError) -> None:
        raise DataError(
            f"the folder {error.filename} cannot be read: {error.strerror}; "
            "make it readable or move it elsewhere"
        )

    found: list[tuple[str, list[str]]] = []
    above = {folder: [os.path.realpath(folder)]}  # itself and its ancestors, without links
    for here, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        ancestors = above.pop(here)
        real = {below: os.path.realpath(os.path.join(here, below)) for below in folders}
        folders[:] = [below for below in folders if not _holds_one(real[below], ancestors)]
        above |= {os.path.join(here, below): [*ancestors, real[below]] for below in folders}
        found.append((here, sorted(n for n in names if n.lower().endswith(EXTENSIONS))))
    return [os.path.join(here, name) for here, names in sorted(found) for name in names]


def _holds_one(folder: str, others: Sequence[str]) -> bool:
    """Whether one of the others is this folder or lies below it."""
    start = os.path.join(folder, "")
    return any(os.path.join(other, "").startswith(start) for other in others)


def _inspect_all(paths: Sequence[str]) -> list[tuple[int, int] | str]:
    return [_inspect(path) for path in paths]


def _inspect(path: str) -> tuple[int, int] | str:
    """(height, width), or the reason why the image cannot be used."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return "is empty (0 bytes)"
            with Image.open(file) as image:
                width, height = image.size
                if not _ends_well(file, image.format):
                    image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds on broken headers.
        return reason_of(error)
    return height, width


def _ends_well(file: BinaryIO, image_format: str | None) -> bool:
    marker = _END_MARKERS.get(image_format or "", b"")
    place = file.tell()
    file.seek(-min(len(marker), file.seek(0, os.SEEK_END)), os.SEEK_END)
    ends_well = file.read() == marker
    file.seek(place)
    return ends_well


def cpu_count() -> int:
    """The processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def reason_of(error: BaseException) -> str:
    """A short reason for a report, from what reading or decoding a file raised."""
    if isinstance(error, UnidentifiedImageError):
        return "is not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be decoded: {error or type(error).__name__}"


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """silence_pillow() for a while. It reaches all threads: enter it in one of them alone."""
    with warnings.catch_warnings():
        silence_pillow()
        yield


def silence_pillow() -> None:
    """Silences Pillow's warnings (large images, odd metadata), in all threads."""
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


def read_rgb(path: str) -> Image.Image:
    """The decoded image as torchvision's pil_loader gives it: RGB, no EXIF rotation."""
    with open(path, "rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def raise_if_many_bad(
    bad: dict[str, str], total: int, max_bad_share: float, broken: int = 0
) -> None:
    """Raises DataError, with the first few names, where more than max_bad_share are bad.

    broken: bad ones that are neither in `bad` nor in `total`.
    """
    count = len(bad) + broken
    if count > max_bad_share * (total + broken):
        raise DataError(
            f"{count} of {total + broken} images cannot be read, more than --max_bad_share "
            f"{max_bad_share:g} allows: {_names(bad)}"
        )


def _names(bad: dict[str, str]) -> str:
    named = "; ".join(f"{path} {reason}" for path, reason in list(bad.items())[:_NAMED])
    return named + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")


def epoch_order(n: int, *, seed: int, epoch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The samples of one process in one epoch, [ceil(n / world_size)].

    It is the order of torch's DistributedSampler(shuffle=True, seed=seed) after set_epoch(epoch):
    the first samples come again at the end, where world_size does not divide n.
    """
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order = torch.randperm(n, generator=generator).numpy()
    return np.resize(order, -(-n // world_size) * world_size)[rank::world_size]


def steps_per_epoch(n: int, batch: int, world: int) -> int:
    """Whole batches an epoch, the last incomplete one dropped, as in the paper's code.

    Raises: DataError: there is not even one.
    """
    samples = -(-n // world)
    if samples < batch:
        processes = f" on each of {world} processes" if world > 1 else ""
        raise DataError(
            f"{n} images give {samples} an epoch{processes}, fewer than one batch of {batch}: "
            f"lower --batch_size_per_gpu (or --grad_accum) until a batch is at most {samples}"
        )
    return samples // batch


@dataclass
class EpochPlan:
    """The batches of one process: which samples, in which step of which epoch.

    Raises: DataError: fewer samples than a batch.
    """

    n: int
    batch: int
    seed: int
    rank: int
    world_size: int
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = steps_per_epoch(self.n, self.batch, self.world_size)

    def batches(self, epoch: int, start_step: int) -> list[list[int]]:
        """The samples of the steps start_step, start_step + 1, ... of an epoch.

        Raises: ValueError: start_step is not in 0..steps.
        """
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step must be from 0 to {self.steps}, got {start_step}")
        order = epoch_order(
            self.n, seed=self.seed, epoch=epoch, rank=self.rank, world_size=self.world_size
        )
        kept = order[start_step * self.batch : self.steps * self.batch]
        return kept.reshape(-1, self.batch).tolist()


class BadFiles:
    """The files found broken while running, and what takes their place: the next good sample.

    `skipped` holds path -> reason, `reasons` sample -> reason. Safe to use from several threads.

    Args:
        n: samples, those that the scan kept.
        max_bad_share: of all files, those that the scan skipped as broken among them.
        broken: how many these are.
    """

    def __init__(self, n: int, max_bad_share: float, broken: int = 0) -> None:
        self.n, self.max_bad_share, self.broken = n, max_bad_share, broken
        self.skipped: dict[str, str] = {}
        self.reasons: dict[int, str] = {}

    def add(self, index: int, path: str, reason: str) -> None:
        """Notes a broken file; raises DataError where there are too many."""
        self.reasons[index] = self.skipped[path] = reason
        raise_if_many_bad(self.skipped, self.n, self.max_bad_share, self.broken)

    def good(self, index: int) -> int:
        """The first sample from index on that is not known to be broken; DataError if all are."""
        for candidate in itertools.chain(range(index, self.n), range(index)):
            if candidate not in self.reasons:
                return candidate
        raise DataError(f"none of the {self.n} images can be read: {_names(self.skipped)}")

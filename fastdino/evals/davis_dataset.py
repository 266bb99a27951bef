"""DAVIS on disk: its sequences and frames, and reading and writing masks.

    JPEGImages/480p/<sequence>/00000.jpg    frames
    Annotations/480p/<sequence>/00000.png   masks, named as the frames
    ImageSets/2017/val.txt                  DAVIS 2017: one sequence name per line
    ImageSets/480p/val.txt                  DAVIS 2016: paths of a frame and its mask per line

A mask of DAVIS 2017 has an object number per pixel (0 is background; 255 is void and counts as
background). A mask of DAVIS 2016 has one object: all pixels other than 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.data.datasets.davis_frames import RESOLUTION, sequence_names
from fastdino.data.image_files import (
    AS_STORED,
    Conversion,
    Header,
    count_deep,
    quiet_pillow,
    read_header,
)
from fastdino.data.image_names import image_files
from fastdino.errors import DataError
from fastdino.evals.frames import common_size
from fastdino.evals.masks import palette_colors, read_mask_pixels

VOID = 255
PACKED = np.array([1 << 16, 1 << 8, 1])  # colors @ PACKED: one number per color
LISTS = {"2017": ("ImageSets/2017",), "2016": (f"ImageSets/{RESOLUTION}", "ImageSets/2016")}


@dataclass(frozen=True)
class Sequence:
    """A video: its frames in order, and their masks.

    Attributes:
        frames: at least 3 files of one size.
        annotations: of the first frame only (then the sequence is not scored), or of every frame.
        size: (height, width) of frames and annotations, in pixels.
        binary: masks of one object, as in DAVIS 2016.
        deep: frames that --image_range applies to.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: tuple[Path, ...]
    size: tuple[int, int]
    binary: bool
    deep: int = 0

    @property
    def is_scored(self) -> bool:
        return len(self.annotations) == len(self.frames)


def find_sequences(
    root: Path, *, split: str = "val", year: str = "auto"
) -> tuple[list[Sequence], dict[str, str]]:
    """List the sequences of a split in the order of its list, after reading all image headers.

    Args:
        year: "2016", "2017", or "auto" for 2017 if it has a list of this split.

    Returns: the usable sequences; and name -> reason of those left out: a frame or annotation is
        missing or unreadable, sizes differ, or the first frame marks no object.
    Raises: DataError: no list, an empty one, or no usable sequence.
    """
    years = ("2017", "2016") if year == "auto" else (year,)
    lists = [(root / folder / f"{split}.txt", y == "2016") for y in years for folder in LISTS[y]]
    for path, binary in lists:
        if path.is_file():
            return _usable_sequences(root, path, binary=binary)
    candidates = ", ".join(str(path) for path, _ in lists)
    raise DataError(f"no list of DAVIS sequences: expected one of {candidates}")


def _usable_sequences(
    root: Path, listing: Path, *, binary: bool
) -> tuple[list[Sequence], dict[str, str]]:
    sequences: list[Sequence] = []
    left_out: dict[str, str] = {}
    for name in sequence_names(listing):
        try:
            sequence = _sequence(root, name, binary=binary)
            first_mask(sequence)
            sequences.append(sequence)
        except DataError as error:
            left_out[name] = str(error)
    if not sequences:
        more = f"; and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise DataError(f"{next(iter(left_out.values()))}{more}")
    return sequences, left_out


def _sequence(root: Path, name: str, *, binary: bool) -> Sequence:
    folder = root / "JPEGImages" / RESOLUTION / name
    if not folder.is_dir():
        raise DataError(f"sequence {name}: folder {folder} is missing")
    frames = image_files(folder)
    if len(frames) < 3:
        raise DataError(
            f"sequence {name}: {folder} has {len(frames)} frames; expected at least 3, because "
            "the first is given and the last is not scored"
        )
    masks = [root / "Annotations" / RESOLUTION / name / f"{path.stem}.png" for path in frames]
    missing = [path for path in masks if not path.is_file()]
    if missing == masks[1:]:  # as in the test splits
        masks = masks[:1]
    elif missing:
        raise DataError(
            f"sequence {name}: {len(missing)} annotations are missing, e.g. {missing[0]}; "
            "expected one of the first frame only, or one of every frame"
        )
    headers = {path: _header(path) for path in (*frames, *masks)}
    deep = count_deep(headers[path] for path in frames)
    return Sequence(name, tuple(frames), tuple(masks), common_size(headers), binary, deep)


def _header(path: Path) -> Header:
    with quiet_pillow():
        header = read_header(str(path))
    if not isinstance(header, Header):
        raise DataError(f"{path} {header.reason}")
    return header


def read_frame(path: Path, conversion: Conversion = AS_STORED) -> Tensor:
    """Read a frame as [3, H, W] uint8, RGB; raise DataError if it cannot be decoded."""
    return torch.from_numpy(np.array(conversion.read(path))).permute(2, 0, 1)


def first_mask(sequence: Sequence) -> NDArray[np.uint8]:
    """Read the first annotation [H, W]; raise DataError if it marks no object."""
    path = sequence.annotations[0]
    mask = read_mask(path, binary=sequence.binary)
    if not mask.any():
        raise DataError(
            f"sequence {sequence.name}: {path} marks no object to follow (255 is void; for masks "
            "of 0 and 255 pass --year 2016)"
        )
    return mask


def read_mask(path: Path, *, binary: bool) -> NDArray[np.uint8]:
    """Read a mask [H, W] of object numbers, with 0 for background and void.

    Only the numbers of a palette image matter, not its colors. A mask saved as RGB is decoded with
    the palette of DAVIS.

    Raises: DataError: unreadable file, number above 255, or color outside the palette.
    """
    pixels = read_mask_pixels(path)
    if binary:
        return ((pixels if pixels.ndim == 2 else pixels.max(2)) > 0).astype(np.uint8)
    if pixels.ndim == 2 and pixels.max() > VOID:
        raise DataError(f"{path} has {pixels.max()}; expected object numbers, or {VOID} for void")
    mask = pixels.astype(np.uint8) if pixels.ndim == 2 else _numbers_of_colors(pixels, path)
    mask[mask == VOID] = 0
    return mask


def _numbers_of_colors(pixels: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    pixels = np.where(pixels == 191, 192, pixels)  # some writers round 191.25 down
    numbers = np.full(1 << 24, -1, np.int16)
    numbers[palette_colors() @ PACKED] = np.arange(256)
    mask = numbers[pixels @ PACKED]
    if (mask < 0).any():
        y, x = np.argwhere(mask < 0)[0]
        raise DataError(
            f"{path}: the color {tuple(pixels[y, x].tolist())} at row {y}, column {x} is not in "
            "DAVIS's palette; expected object numbers (a palette or gray PNG) or its colors"
        )
    return mask.astype(np.uint8)


def write_mask(mask: NDArray[np.uint8], path: Path, *, binary: bool) -> None:
    """Write a mask [H, W] in the benchmark's format.

    2017: object numbers with the palette of DAVIS. 2016: gray values 0 and 255.
    """
    image = Image.fromarray(mask * np.uint8(255) if binary else mask)
    if not binary:
        image.putpalette(palette_colors().tobytes())
    image.save(path, format="PNG")

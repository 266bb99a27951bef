"""DAVIS on disk: which sequences there are, their frames, and masks in and out.

    JPEGImages/480p/<sequence>/00000.jpg    frames
    Annotations/480p/<sequence>/00000.png   masks, by the frames' names
    ImageSets/2017/val.txt                  DAVIS 2017: a sequence's name a line
    ImageSets/480p/val.txt                  DAVIS 2016: a frame's and a mask's path a line

DAVIS 2017's masks hold an object's number in each pixel (0 background, 255 void, which counts as
background); DAVIS 2016's know one object: what is not 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.data.datasets.davis_frames import RESOLUTION, sequence_names
from fastdino.data.image_files import NUMBERS, Header, explained_reading, read_header, read_rgb
from fastdino.data.shapes import davis_palette
from fastdino.errors import DataError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
VOID = 255
LISTS = {
    "2017": ("ImageSets/2017",),
    "2016": (f"ImageSets/{RESOLUTION}", "ImageSets/2016"),
}


@dataclass(frozen=True)
class Sequence:
    """A video: its frames in order, and the annotations there are of them.

    Attributes:
        frames: at least 3 files of one size.
        annotations: of the first frame alone (nothing is scored), or one a frame.
        size: (height, width) of frames and annotations, in pixels.
        binary: masks know one object, DAVIS 2016.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: tuple[Path, ...]
    size: tuple[int, int]
    binary: bool

    @property
    def is_scored(self) -> bool:
        return len(self.annotations) == len(self.frames)


def find_sequences(root: Path, *, split: str = "val", year: str = "auto") -> list[Sequence]:
    """The sequences of a split, in the order of its list, every file's header looked at.

    Args:
        year: "2016", "2017", or "auto": 2017 where it has a list of this split.

    Raises: DataError: no list, an empty one, frames or annotations that are missing, unreadable, or
        not of one size.
    """
    years = ("2017", "2016") if year == "auto" else (year,)
    lists = [(root / folder / f"{split}.txt", one) for one in years for folder in LISTS[one]]
    for path, found in lists:
        if path.is_file():
            names = sequence_names(path)
            return [_sequence(root, name, binary=found == "2016") for name in names]
    tried = ", ".join(str(path) for path, _ in lists)
    raise DataError(f"no list of DAVIS sequences: expected one of {tried}")


def _sequence(root: Path, name: str, *, binary: bool) -> Sequence:
    folder = root / "JPEGImages" / RESOLUTION / name
    if not folder.is_dir():
        raise DataError(f"sequence {name}: there is no folder {folder}")
    frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES)
    if len(frames) < 3:
        raise DataError(
            f"sequence {name}: {folder} has {len(frames)} frames; it takes 3, as the first is "
            "given and the last is not scored"
        )
    masks = [root / "Annotations" / RESOLUTION / name / f"{path.stem}.png" for path in frames]
    missing = [path for path in masks if not path.is_file()]
    if missing == masks[1:]:  # as in the test splits
        masks = masks[:1]
    elif missing:
        raise DataError(
            f"sequence {name}: {len(missing)} annotations are missing, among them {missing[0]}; "
            "expected one of the first frame alone, or one a frame"
        )
    size = _size(frames[0])
    for path in (*frames, *masks):
        if _size(path) != size:
            raise DataError(
                f"sequence {name}: {path} is {_by(_size(path))}, {frames[0]} is {_by(size)}; "
                "frames and annotations must be of one size"
            )
    return Sequence(name, tuple(frames), tuple(masks), size, binary)


def _size(path: Path) -> tuple[int, int]:
    header = read_header(str(path))
    if not isinstance(header, Header):
        raise DataError(f"{path} {header.reason}")
    return header.height, header.width


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"


def read_frame(path: Path) -> Tensor:
    """A frame [3, H, W] uint8, RGB; raises DataError where it cannot be decoded."""
    return torch.from_numpy(np.array(read_rgb(path))).permute(2, 0, 1)


def read_mask(path: Path, *, binary: bool) -> np.ndarray:
    """A mask [H, W] uint8 of object numbers, 0 the background; void is background.

    A palette's colours do not matter, the numbers do. A mask saved as colours is read by DAVIS's
    palette.

    Raises: DataError: unreadable, a number above 255, or a colour that the palette does not have.
    """
    with explained_reading(path), Image.open(path) as image:
        pixels = np.array(image if image.mode in NUMBERS else image.convert("RGB"))
    if binary:
        return ((pixels if pixels.ndim == 2 else pixels.max(2)) > 0).astype(np.uint8)
    if pixels.ndim == 2 and pixels.max() > VOID:
        raise DataError(f"{path} holds {pixels.max()}; expected object numbers, or {VOID} for void")
    mask = pixels.astype(np.uint8) if pixels.ndim == 2 else _numbers_of_colours(pixels, path)
    mask[mask == VOID] = 0
    return mask


def _numbers_of_colours(pixels: np.ndarray, path: Path) -> np.ndarray:
    palette = np.array(davis_palette(), np.int64).reshape(256, 3)
    wide = pixels.astype(np.int64)
    wide[wide == 191] = 192  # some writers' shade of it
    numbers = np.full(1 << 24, -1, np.int16)
    numbers[_packed(palette)] = np.arange(256)
    mask = numbers[_packed(wide)]
    if (mask < 0).any():
        y, x = np.argwhere(mask < 0)[0]
        raise DataError(
            f"{path}: the colour {tuple(pixels[y, x].tolist())} at row {y}, column {x} is not in "
            "DAVIS's palette; expected object numbers (a palette or grey PNG) or its colours"
        )
    return mask.astype(np.uint8)


def _packed(colours: np.ndarray) -> np.ndarray:
    return colours @ np.array([1 << 16, 1 << 8, 1])


def write_mask(mask: np.ndarray, path: Path, *, binary: bool) -> None:
    """Writes a mask [H, W] uint8 as the benchmarks want it.

    For 2017 that is numbers under DAVIS's palette, for 2016 grey of 0 and 255.
    """
    image = Image.fromarray(mask * np.uint8(255) if binary else mask)
    if not binary:
        image.putpalette(davis_palette())
    image.save(path, format="PNG")

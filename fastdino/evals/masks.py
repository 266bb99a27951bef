"""Segmentation masks: read from image files, and drawn over video frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.image_files import NUMBERS, explained_reading, open_file
from fastdino.data.shapes_clips import davis_palette
from fastdino.evals.segmentation_metrics import boundary

_OBJECT_SHARE = 0.5  # share of the object's color inside its outline; the outline is opaque
_GAP = 4  # pixels between the pictures of a sheet


def palette_colors() -> NDArray[np.uint8]:
    """Return the palette of DAVIS and PASCAL VOC, [256, 3]."""
    return np.array(davis_palette(), np.uint8).reshape(256, 3)


def read_mask_pixels(path: Path) -> NDArray[Any]:
    """Read a mask as stored: numbers [H, W] (palette indices or gray), or RGB [H, W, 3].

    Raises: DataError: the file cannot be read.
    """
    with explained_reading(path), open_file(str(path)) as file, Image.open(file) as image:
        return np.array(image if image.mode in NUMBERS else image.convert("RGB"))


def blend(
    pixels: NDArray[np.uint8], colors: NDArray[Any], share: float | NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Blend pixels [H, W, 3] with a share, 0 to 1, of other colors. All arguments broadcast."""
    base = pixels.astype(np.float32)
    return (base + share * (colors - base)).round().astype(np.uint8)


def overlay(frame: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draw the objects of a mask [H, W] over a frame [H, W, 3] in the colors of DAVIS."""
    objects = torch.from_numpy(mask == np.unique(mask)[:, None, None])
    outline = boundary(objects).any(0).numpy()
    share = np.where(mask > 0, np.where(outline, 1, _OBJECT_SHARE), 0).astype(np.float32)
    return blend(frame, palette_colors().astype(np.float32)[mask], share[..., None])


def draw_sheet(
    rows: Sequence[Sequence[NDArray[np.uint8]]], path: Path, *, width: int = 320
) -> None:
    """Save rows of pictures [H, W, 3] of one size as one PNG.

    Args:
        width: of a picture on the sheet in pixels; larger pictures are downscaled.
    """
    height, full_width = rows[0][0].shape[:2]
    width = min(width, full_width)
    size = (width, max(1, round(height * width / full_width)))
    step = (size[0] + _GAP, size[1] + _GAP)
    sheet = Image.new("RGB", (len(rows[0]) * step[0] - _GAP, len(rows) * step[1] - _GAP), "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            small = Image.fromarray(picture).resize(size, Image.Resampling.BOX)
            sheet.paste(small, (x * step[0], y * step[1]))
    sheet.save(path)

"""Colours over pictures: one mixing for all overlays, objects over their frames, sheets of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.shapes import davis_palette
from fastdino.evals.segmentation_metrics import boundary

_SHARE = 0.5  # of the object's colour; its outline has it whole
_GAP = 4  # pixels between pictures


def mix(
    pixels: NDArray[np.uint8], colours: NDArray[Any], share: float | NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] with a share, 0 to 1, of other colours in each; these and it broadcast."""
    plain = pixels.astype(np.float32)
    return (plain + share * (colours - plain)).round().astype(np.uint8)


def overlay(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3] uint8 with the objects of a mask [H, W] uint8 in DAVIS's colours."""
    colours = np.array(davis_palette(), np.float32).reshape(256, 3)[mask]
    share = np.where(mask > 0, np.float32(_SHARE), 0)
    objects = torch.from_numpy(mask == np.unique(mask)[:, None, None])
    outline = boundary(objects).any(0).numpy()
    share[outline & (mask > 0)] = 1
    return mix(frame, colours, share[..., None])


def draw_sheet(rows: Sequence[Sequence[np.ndarray]], path: Path, *, width: int = 320) -> None:
    """Writes rows of pictures [H, W, 3] uint8, all of one size, as one PNG.

    Args:
        width: of a picture on the sheet, in pixels; wider ones are made smaller.
    """
    height, full = rows[0][0].shape[:2]
    width = min(width, full)
    size = (width, max(1, round(height * width / full)))
    step = (size[0] + _GAP, size[1] + _GAP)
    sheet = Image.new("RGB", (len(rows[0]) * step[0] - _GAP, len(rows) * step[1] - _GAP), "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            small = Image.fromarray(picture).resize(size, Image.Resampling.BOX)
            sheet.paste(small, (x * step[0], y * step[1]))
    sheet.save(path)

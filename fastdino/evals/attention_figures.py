"""Attention maps as pictures: in color, over the image, as masks, and on one sheet.

Shapes: B images, H heads, h x w patches. Pixels are uint8 [height, width, 3].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdino.evals.attention_maps import keep_mass
from fastdino.evals.masks import blend
from fastdino.file_names import as_text

COLORMAP = "inferno"  # as in the paper's video_generation.py; visualize_attention.py uses viridis
DIMMED = 0.3  # brightness of the image outside a mask
TINT = 0.45  # share of the head's color inside a mask
OVERLAY = 0.6  # share of the map in an overlay
CELL = 1.5  # width of a column of the sheet, in inches
DPI = 110
_GAP = ((1, 1), (1, 1), (0, 0))  # black pixels around each cell of a strip

Pixels = NDArray[np.uint8]


def drawable(text: str) -> str:
    """Escape the characters that matplotlib's fonts cannot draw, and control characters.

    The fonts are those of rcParams["font.family"].
    """
    text = as_text(text)
    families = (FontProperties(family=[family]) for family in FontProperties().get_family())
    fonts = [get_font(findfont(family)) for family in families]
    known = {code for font in fonts for code in font.get_charmap()}
    return "".join(
        c if c.isprintable() and ord(c) in known else c.encode("unicode_escape").decode()
        for c in text
    )


def map_picture(map_: Tensor, size: tuple[int, int], *, smooth: bool = False) -> Pixels:
    """Color a map [h, w] from its minimum to its maximum.

    Args:
        size: height and width of the picture in pixels.
        smooth: interpolate bilinearly between patches instead of drawing blocks.
    """
    values = map_.detach().float().cpu()[None, None]
    values = F.interpolate(values, size=size, mode="bilinear" if smooth else "nearest")
    array = values[0, 0].numpy()
    low, high = float(array.min()), float(array.max())
    array = (array - low) / (high - low) if high > low else np.zeros_like(array)
    colors: Pixels = colormaps[COLORMAP](array, bytes=True)[..., :3]
    return colors


def overlay_picture(pixels: Pixels, map_: Tensor) -> Pixels:
    """Blend a map [h, w] over an image."""
    return blend(pixels, map_picture(map_, pixels.shape[:2], smooth=True), OVERLAY)


def mask_picture(pixels: Pixels, mask: Tensor, head: int = 0) -> Pixels:
    """Tint the image inside a mask [h, w] with the head's color; dim it to gray outside."""
    height, width = pixels.shape[:2]
    inside = F.interpolate(mask.float().cpu()[None, None], size=(height, width))[0, 0].bool()
    color = 255 * np.array(colormaps["tab10"](head % 10)[:3], np.float32)
    dim = (DIMMED * pixels.mean(axis=2, keepdims=True)).round().astype(np.uint8)
    return np.where(inside.numpy()[..., None], blend(pixels, color, TINT), dim)


def heads_picture(maps: Tensor, size: tuple[int, int]) -> Pixels:
    """Draw all maps [H, h, w] as tiles of one picture, row by row; unused tiles are black."""
    columns = math.isqrt(len(maps) - 1) + 1
    rows = -(-len(maps) // columns)
    height, width = size[0] // rows, size[1] // columns
    picture = np.zeros((*size, 3), np.uint8)
    if not height or not width:
        return picture
    for head, map_ in enumerate(maps):
        top, left = head // columns * height, head % columns * width
        picture[top : top + height, left : left + width] = map_picture(map_, (height, width))
    return picture


def attention_strip(pictures: Sequence[Pixels], maps: Tensor, scale: int = 1) -> Pixels:
    """Draw one row per picture: the picture, its mean map, and the map of each head.

    Args:
        pictures: B pictures of one size.
        maps: [B, H, h, w] of attention_maps.
        scale: enlarge the pictures by this factor.
    """
    rows = []
    for picture, heads in zip(pictures, maps, strict=True):
        pixels = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        panels = torch.cat((heads.mean(0, keepdim=True), heads))
        cells = [pixels, *(map_picture(panel, pixels.shape[:2]) for panel in panels)]
        rows.append(np.concatenate([np.pad(cell, _GAP) for cell in cells], axis=1))
    return np.concatenate(rows)


def draw_attention(
    pictures: Sequence[Image.Image],
    maps: Tensor,
    path: Path,
    *,
    threshold: float | None = None,
    title: str = "",
) -> None:
    """Save a sheet with one row per picture: the picture, the mean map and the map of each head.

    Args:
        pictures: B pictures of one size.
        maps: [B, H, h, w] of attention_maps.
        path: the PNG file to write.
        threshold: add a row per picture with the masks that keep this share of the mass.
        title: printed above the sheet.
    """
    rows: list[list[Pixels | None]] = []  # None leaves a cell empty
    for picture, heads in zip(pictures, maps, strict=True):
        pixels = np.asarray(picture)
        panels = torch.cat((heads.mean(0, keepdim=True), heads))
        rows.append([pixels, *(map_picture(panel, pixels.shape[:2]) for panel in panels)])
        if threshold is not None:
            masks = keep_mass(panels, threshold)
            rows.append([None, *(mask_picture(pixels, mask, i) for i, mask in enumerate(masks))])
    names = ["image", "mean", *(f"head {head}" for head in range(maps.shape[1]))]
    height = min(max(CELL * pictures[0].height / pictures[0].width, CELL / 4), 4 * CELL)
    figure = Figure(figsize=(CELL * len(names), height * len(rows) + 0.5), layout="compressed")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    figure.suptitle(drawable(title), fontsize=9, parse_math=False)  # file names may contain $
    for name, axis in zip(names, axes[0], strict=True):
        axis.set_title(name, fontsize=8)
    for cell, axis in zip((cell for row in rows for cell in row), axes.flat, strict=True):
        axis.set_axis_off()
        if cell is not None:
            axis.imshow(cell)
    figure.savefig(path, dpi=DPI)

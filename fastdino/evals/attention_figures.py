"""Pictures of attention: maps in colour, over the image, as masks, and all heads on one sheet.

Legend: B images, H heads, h x w patches. Pixels are uint8 [height, width, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdino.evals.mask_overlay import mix

COLORMAP = "inferno"  # of the paper's video_generation.py; its visualize_attention.py has viridis
# Of a mask: what is left of the image's brightness outside, and how much of the colour is inside.
DIMMED, TINT = 0.3, 0.45
OVERLAY = 0.6  # the map's share where it is over the image
CELL = 1.5  # inches: a column of the contact sheet

Pixels = NDArray[np.uint8]


def map_picture(map_: Tensor, size: tuple[int, int], *, smooth: bool = False) -> Pixels:
    """One map [h, w] in colours from its least to its largest value.

    size: height and width of the picture. smooth: between patches, bilinearly; else in blocks.
    """
    values = map_.detach().float().cpu()[None, None]
    if smooth:
        values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    else:
        values = F.interpolate(values, size=size, mode="nearest")
    array = values[0, 0].numpy()
    low, high = float(array.min()), float(array.max())
    array = (array - low) / (high - low) if high > low else np.zeros_like(array)
    colours: Pixels = colormaps[COLORMAP](array, bytes=True)[..., :3]
    return colours


def overlay_picture(pixels: Pixels, map_: Tensor) -> Pixels:
    """The image under one map [h, w]."""
    heat = map_picture(map_, pixels.shape[:2], smooth=True)
    return mix(pixels, heat, OVERLAY)


def mask_picture(pixels: Pixels, mask: Tensor, head: int = 0) -> Pixels:
    """The image, tinted where the mask [h, w] is, dark gray elsewhere; each head has a colour."""
    height, width = pixels.shape[:2]
    inside = F.interpolate(mask.float().cpu()[None, None], size=(height, width))[0, 0].bool()
    colour = 255 * np.array(colormaps["tab10"](head % 10)[:3], np.float32)
    dim = (DIMMED * pixels.mean(axis=2, keepdims=True)).round().astype(np.uint8)
    return np.where(inside.numpy()[..., None], mix(pixels, colour, TINT), dim)


def heads_picture(maps: Tensor, size: tuple[int, int]) -> Pixels:
    """All heads' maps [H, h, w] as tiles of one picture, row by row; what is left over is black."""
    columns = 1
    while columns**2 < len(maps):
        columns += 1
    rows = -(-len(maps) // columns)
    height, width = size[0] // rows, size[1] // columns
    picture = np.zeros((*size, 3), np.uint8)
    if not height or not width:
        return picture
    for head, map_ in enumerate(maps):
        top, left = head // columns * height, head % columns * width
        tile = map_picture(map_, (height, width))
        picture[top : top + height, left : left + width] = tile
    return picture


def draw_heads(
    picture: Image.Image, maps: Tensor, masks: Tensor | None, path: Path, *, title: str = ""
) -> None:
    """The contact sheet of one image: it, the mean map and each head's; below, their masks.

    Args:
        picture: as the network saw it.
        maps: [1 + H, h, w], the mean of the heads first.
        masks: bool, like maps; None: no such row.
        path: the PNG to write.
        title: a line above everything.
    """
    pixels = np.asarray(picture)
    names = ["mean", *(f"head {head}" for head in range(len(maps) - 1))]
    rows, columns = 1 if masks is None else 2, 1 + len(maps)
    height = min(max(CELL * picture.height / picture.width, CELL / 4), 4 * CELL)
    figsize = (CELL * columns, height * rows + 0.5)
    figure = Figure(figsize=figsize, layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=9, parse_math=False)  # names of files may have $ in them
    axes[0, 0].imshow(pixels)
    axes[0, 0].set_title("image", fontsize=8)
    for i, name in enumerate(names):
        axes[0, 1 + i].imshow(map_picture(maps[i], pixels.shape[:2]))
        axes[0, 1 + i].set_title(name, fontsize=8)
        if masks is not None:
            axes[1, 1 + i].imshow(mask_picture(pixels, masks[i], i))
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_attention(
    pictures: Sequence[Image.Image], maps: Tensor, path: Path, *, title: str = ""
) -> None:
    """Draws a row a picture: the picture, the mean map, each head's map; writes a PNG.

    Args:
        pictures: B square pictures.
        maps: [B, H, h, w] of attention_maps.
        path: the PNG to write.
        title: a line above everything.
    """
    heads = maps.shape[1]
    columns = 2 + heads
    figure = Figure(figsize=(1.25 * columns, 1.25 * len(pictures) + 0.5), layout="constrained")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    figure.suptitle(title, fontsize=9)
    for row, (picture, heads_maps) in enumerate(zip(pictures, maps, strict=True)):
        size = (picture.height, picture.width)
        panels = torch.cat((heads_maps.mean(0, keepdim=True), heads_maps))
        axes[row, 0].imshow(picture)
        for panel, axis in zip(panels, axes[row, 1:], strict=True):
            axis.imshow(map_picture(panel, size))
        if row == 0:
            names = ["image", "mean", *(f"head {i + 1}" for i in range(heads))]
            for name, axis in zip(names, axes[0], strict=True):
                axis.set_title(name, fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)

"""Labelled images of the shapes dataset: objects of one class in shared scenery.

DINO learns what the crops of an image have in common and other images have not. Here this is the
class and little else:

- Objects: an image shows several objects of one class. The class decides their form, their hue
  (one of four: purple, magenta, red, yellow) and their pattern (one of three: plain, stripes,
  dots). Their size, rotation, lightness, saturation and position vary.
- Scenery: the background is a part, turned and mirrored, of one of a few patchworks that all
  images share. Its hues are from green to blue, and its patterns are of all kinds.

The scenery is as light and as dark as the objects, so no threshold on brightness finds them. Color
finds them for whoever knows which color to look for.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastdino.data.shapes_drawing import (
    CLASSES,
    SPLITS,
    Array,
    Paints,
    Points,
    Pose,
    Rng,
    Texture,
    area,
    blob,
    colour,
    fragment,
    generator,
    outline,
    paint,
    stroke,
)

HUES = (0.75, 0.88, 1.0, 1.13)  # of the objects, in turns: purple, magenta, red, yellow
PATTERNS = ("plain", "stripes", "dots")
MOST_OBJECTS = 7  # those without enough space are left out
SCENERIES = 4  # patchworks

_LUMA, _VIVID = (0.2, 0.75), (0.6, 1.0)  # of the objects
_CONTRAST = 0.35  # difference in luma between the two colors of stripes and dots
_SCENERY = Paints(luma=(0.1, 0.85), saturation=(0.15, 0.8), hue=(0.22, 0.62))
_PATCHES = 107  # of a patchwork, per area of an image


def still(form: str, size: int, rng: Rng, seed: int) -> tuple[Array, NDArray[np.uint8]]:
    """Draw one labelled image.

    Args:
        form: one of CLASSES.
        size: side of the image in pixels.
        rng: draws all but the scenery's patchworks.
        seed: of the dataset; it decides the patchworks.

    Returns: the canvas [size, size, 3], and the object labels [size, size]: 0 for the background,
        1, 2, ... for the objects, which are whole and separate.
    """
    canvas = _scenery(size, rng, seed)
    objects = np.zeros((size, size), np.uint8)
    boxes: list[tuple[float, float, float, float]] = []
    for _ in range(MOST_OBJECTS):
        turned = Pose(0, 0, 1, math.radians(rng.uniform(-30, 30))).place(outline(form, rng))
        low, extent = turned.min(axis=0), np.ptp(turned, axis=0)
        scale = _scale(turned, size, rng)
        texture = _texture(form, rng)
        for left, top in (rng.random((30, 2)) * (size - scale * extent)).tolist():
            right, bottom = left + scale * extent[0], top + scale * extent[1]
            if all(right < x0 or x1 < left or bottom < y0 or y1 < top for x0, y0, x1, y1 in boxes):
                boxes.append((left, top, right, bottom))
                pose = Pose(float(left - scale * low[0]), float(top - scale * low[1]), scale)
                objects[paint(canvas, turned, pose, texture) >= 0.5] = len(boxes)
                break
    return canvas, objects


def draw_patchworks(size: int, seed: int) -> None:
    """Draw all patchworks of a dataset, so that processes forked later find them in memory."""
    for index in range(SCENERIES):
        _patchwork(index, size, seed)


def _scale(turned: Points, size: int, rng: Rng) -> float:
    """Draw the scale of an outline by its area, so that the filled share reveals no form."""
    longer = float(np.ptp(turned, axis=0).max())
    share = rng.uniform(0.135, 0.195) / math.sqrt(area(turned)) * longer
    return float(np.clip(share, 0.18, 0.26)) * size / longer


def _texture(form: str, rng: Rng) -> Texture:
    """Draw the texture of an object in the hue and pattern of its class."""
    label = CLASSES.index(form)
    middle, pattern = HUES[label % len(HUES)], PATTERNS[label // len(HUES)]
    hue = (middle - 0.02, middle + 0.02)
    if pattern == "plain":
        kind = ("flat", "gradient")[rng.integers(2)]
        colours = [colour(rng, Paints(_LUMA, _VIVID, hue)) for _ in range(2)]
    else:
        kind = pattern
        dark = rng.uniform(_LUMA[0], _LUMA[1] - _CONTRAST)
        lumas = rng.permutation((dark, dark + _CONTRAST)).tolist()
        colours = [colour(rng, Paints((luma, luma), _VIVID, hue)) for luma in lumas]
    return Texture(
        kind=kind,
        colours=(colours[0], colours[1]),
        frequency=3.2,
        angle=rng.uniform(0, 2 * math.pi),
        phase=(rng.random(), rng.random()),
        lattice=np.zeros((8, 8), np.float32),  # no pattern here uses it
    )


def _scenery(size: int, rng: Rng, seed: int) -> Array:
    """Cut a part [size, size, 3] out of a patchwork, turned and mirrored."""
    patchwork = _patchwork(int(rng.integers(SCENERIES)), size, seed)
    top, left = rng.integers(0, len(patchwork) - size + 1, 2).tolist()
    part = np.rot90(patchwork[top : top + size, left : left + size], int(rng.integers(4)))
    return np.ascontiguousarray(part[:, ::-1] if rng.random() < 0.5 else part)


@lru_cache(maxsize=2 * SCENERIES)
def _patchwork(index: int, size: int, seed: int) -> Array:
    """Draw a patchwork of twice the images' side, the same for all images of a dataset."""
    rng = generator(seed, len(SPLITS) + 1, index)
    side = 2 * size
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = colour(rng, _SCENERY)
    for _ in range(4 * _PATCHES):
        shape = (blob, fragment, stroke)[rng.choice(3, p=(0.5, 0.3, 0.2))]
        share = rng.uniform(0.08, 0.235) * (1 if shape is blob else 1.6)  # of the image's side
        x, y, angle = rng.uniform(0, (side, side, 2 * math.pi)).tolist()
        texture = Texture.draw(rng, _SCENERY, (5.3 * share, 13.3 * share))
        paint(canvas, shape(rng), Pose(x, y, share * size, angle), texture)
    canvas.flags.writeable = False
    return canvas

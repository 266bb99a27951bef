"""Pictures to make crops of: drawn scenes, vivid and pale, and a photograph; or a folder's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from numpy.typing import NDArray
from PIL import Image

from fastdino.data import scan_images, shapes_drawing

SIZE = (375, 500)  # height and width of the drawn pictures: as most of ImageNet's
GRAIN = 3.0  # levels: the noise of a camera
# What the colours of a drawn picture keep of their distance from gray.
VIVIDNESS = {"drawn, vivid": 1.0, "drawn, half as vivid": 0.5, "drawn, pale": 0.2}
PHOTO = "photograph"


def pictures(count: int, folder: str | None = None) -> dict[str, list[bytes]]:
    """Kind -> encoded pictures, `count` in all: a quarter of each kind, or of a folder's.

    The photograph, matplotlib's sample, is one file: it differs by its draws alone.
    """
    if folder is not None:
        source = scan_images(folder)
        chosen = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
        return {Path(folder).name: [source.read_bytes(i) for i in chosen]}
    photos = count // (len(VIVIDNESS) + 1)
    found: dict[str, list[bytes]] = {kind: [] for kind in VIVIDNESS}
    for i in range(count - photos):
        kind = list(VIVIDNESS)[i % len(VIVIDNESS)]
        found[kind].append(encode(scene(i, VIVIDNESS[kind]), "JPEG", quality=90))
    photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    found[PHOTO] = [Path(photo).read_bytes()] * photos
    return {kind: files for kind, files in found.items() if files}


def scene(seed: int, vividness: float) -> NDArray[np.uint8]:
    """A cluttered scene [375, 500, 3] with a camera's grain."""
    rng = np.random.default_rng(seed)
    forms = list(shapes_drawing.FORMS)
    canvas, _ = shapes_drawing.still(forms[seed % len(forms)], max(SIZE), rng)
    pixels = 255 * canvas[: SIZE[0]].astype(np.float64)
    gray = pixels @ np.array(shapes_drawing.LUMA)
    pixels = gray[..., None] + vividness * (pixels - gray[..., None])
    pixels += rng.normal(0, GRAIN, pixels.shape)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], form: str, **options: Any) -> bytes:
    """The picture as a file of Pillow's format `form`."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()

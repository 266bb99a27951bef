"""Test images for crops: drawn scenes, vivid and pale, and a photograph; or those of a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from numpy.typing import NDArray
from PIL import Image

from fastdino.data import scan_images, shapes_drawing
from fastdino.data.shapes_stills import still

SIZE = (375, 500)  # height and width of the drawn images, the most common of ImageNet
GRAIN = 3.0  # levels: standard deviation of the camera noise
# Factor on the distance of a drawn image's colors from gray.
VIVIDNESS = {"drawn, vivid": 1.0, "drawn, half as vivid": 0.5, "drawn, pale": 0.2}
PHOTO = "photograph"


def pictures(count: int, folder: str | None = None) -> dict[str, list[bytes]]:
    """Return encoded images by kind, `count` in total, a quarter of each kind; or a folder's.

    The photograph, matplotlib's sample, is one file repeated: only its crops differ.
    """
    if folder is not None:
        dataset = scan_images(folder)
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()
        return {Path(folder).name: [dataset.read_bytes(i) for i in chosen]}
    photos = count // (len(VIVIDNESS) + 1)
    files: dict[str, list[bytes]] = {kind: [] for kind in VIVIDNESS}
    for i in range(count - photos):
        kind = list(VIVIDNESS)[i % len(VIVIDNESS)]
        files[kind].append(encode(scene(i, VIVIDNESS[kind]), "JPEG", quality=90))
    photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    files[PHOTO] = [Path(photo).read_bytes()] * photos
    return {kind: some for kind, some in files.items() if some}


def scene(seed: int, vividness: float) -> NDArray[np.uint8]:
    """Draw a cluttered scene [375, 500, 3] with camera noise."""
    rng = np.random.default_rng(seed)
    forms = list(shapes_drawing.FORMS)
    canvas, _ = still(forms[seed % len(forms)], max(SIZE), rng, seed=0)
    pixels = 255 * canvas[: SIZE[0]].astype(np.float64)
    gray = pixels @ np.array(shapes_drawing.LUMA)
    pixels = gray[..., None] + vividness * (pixels - gray[..., None])
    pixels += rng.normal(0, GRAIN, pixels.shape)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], form: str, **options: Any) -> bytes:
    """Encode an image in Pillow's format `form`."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()

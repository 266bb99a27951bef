"""Generated JPEGs that take as long to decode as photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (500, 375)  # width and height in pixels, as most of ImageNet
QUALITY = 90
DESCRIPTION = (
    "generated: noise with detail at all scales (amplitude 1/f^1.4), so that files are as large, "
    "and decoding takes as long, as with photographs"
)
_SLOPE = 1.4  # amplitude 1/f^1.4 gives files of about 70 KB
_CONTRAST = 50.0  # standard deviation of the luma, in levels
_CHROMA = 0.35  # contrast of the two chroma planes, relative to the luma


def write_photos(folder: Path, number: int, seed: int = 0) -> None:
    """Write `number` JPEGs of SIZE into a folder."""
    for n in range(number):
        photo([seed, n]).save(folder / f"{n:05}.jpg", quality=QUALITY)


def photo(seed: int | list[int]) -> Image.Image:
    """Generate one RGB image of SIZE."""
    width, height = SIZE
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.arange(width // 2 + 1))
    amplitude = 1 / np.maximum(frequency, 1) ** _SLOPE
    noise = rng.standard_normal((3, *amplitude.shape, 2))
    planes = np.fft.irfft2((noise[..., 0] + 1j * noise[..., 1]) * amplitude, (height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    contrast = _CONTRAST * np.array([1, _CHROMA, _CHROMA])
    levels = 128 + contrast[:, None, None] * planes
    pixels = np.ascontiguousarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return Image.frombytes("YCbCr", SIZE, pixels.tobytes()).convert("RGB")

"""Conversion of decoded images of every mode to 8-bit RGB, the same for all loaders and commands.

Pillow converts, as in the paper's loader:

    L, 1                  gray in all channels; 1 bit becomes 0 and 255
    P                     the palette's colors
    LA, PA, RGBA, ...     the colors as stored, transparent or not: alpha is dropped
    CMYK, YCbCr           Pillow's formulas, without color profiles
    16 bits per channel   RGB: the high byte, when Pillow decodes. Gray: see below
    several pages         the first page or frame

Images with one deep channel, 16-bit or 32-bit integers or floats, are an exception. Pillow clips
their values to 0..255, so that most become white or black. `image_range` "scale" maps their range
to 0..255 instead:

    integers    the range of the type: 0..65535 is divided by 257
    floats      0..1
    TIFF        the range that SMinSampleValue and SMaxSampleValue state, if it has both; else that
                of its bits per sample. WhiteIsZero is inverted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

IMAGE_RANGES = ("clip", "scale")

# Formats whose pages or frames are pictures of their own. In MPO, which cameras write as .jpg, the
# others are previews.
_PAGED = ("TIFF", "GIF", "PNG", "WEBP")
# Tags of TIFF 6.0; MinSampleValue and MaxSampleValue are statistics, not a range.
_BITS, _PHOTOMETRIC, _FORMAT, _SMALLEST, _LARGEST = 258, 262, 339, 340, 341
_WHITE_IS_ZERO, _SIGNED = 0, 2


def is_deep(image: Image.Image) -> bool:
    """Return whether the image has one channel of more than 8 bits: an integer or a float."""
    return image.mode == "F" or image.mode.startswith("I")


def has_pages(image: Image.Image) -> bool:
    """Return whether the file has pages or frames besides the first, which alone is used."""
    if image.format not in _PAGED:
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except MemoryError:
        raise
    except Exception:  # A broken second frame of a good image: of any type.
        return False


def to_rgb(image: Image.Image, image_range: str = "clip") -> Image.Image:
    """Convert an image of any mode to RGB.

    Args:
        image_range: "clip" or "scale", for deep images: how their values become 0..255.
    """
    if image_range == "clip" or not is_deep(image):
        return image.convert("RGB")
    image.load()  # first: a TIFF's tags may change with the page
    low, high = _range(image)
    values = _values(image)
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.rint((values - low) * (255 / (high - low)))
    levels = np.nan_to_num(levels, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def deep_warning(count: int, total: int, image_range: str) -> str | None:
    """Return a warning for images that --image_range clip makes white or black; None without."""
    if not count or image_range != "clip":
        return None
    return (
        f"{count} of {total} images have 16-bit, 32-bit or float values, which are clipped to "
        "0..255 as in the paper's code, so that most become white or black: "
        "--image_range scale keeps their range"
    )


def _values(image: Image.Image) -> NDArray[np.float64]:
    """Return the values as float64 [height, width]."""
    stored = np.asarray(image)
    if image.mode == "I" and _tag(image, _BITS) == 32 and _tag(image, _FORMAT) != _SIGNED:
        stored = stored.view(np.uint32)  # Pillow has no mode for these
    return stored.astype(np.float64)


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the values that become 0 and 255."""
    stated = _tag(image, _SMALLEST), _tag(image, _LARGEST)
    if None not in stated:
        low, high = map(float, stated)
        if math.isfinite(high - low) and high > low:
            return low, high
    if image.mode == "F":
        return 0.0, 1.0
    bits = _tag(image, _BITS) or 16  # Pillow scales the other formats to 16 bits
    if _tag(image, _FORMAT) == _SIGNED:
        return -float(2 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _tag(image: Image.Image, number: int) -> Any:
    """Return the first value of a tag of a TIFF; None if it has none, or none that is a number."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    value = image.tag_v2.get(number)
    if isinstance(value, tuple):
        value = value[0] if value else None
    return value if isinstance(value, (int, float)) else None

"""Pillow's and torchvision's image operations as plain PyTorch: multi_crop's oracle and fallback.

All arithmetic is on integers, except for the blends (fp32, truncated) and the resize coefficients
(fp64, rounded to integers). Pixels are int32 [height, width, 3], from 0 to 255.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .crop_params import BLUR, FACTOR, FLAGS, FLIP, GRAY, JITTER, ORDER, SOLARIZE

# Fractional bits of the resize coefficients, of the weights of gray, and of those of the blur.
RESIZE_BITS, GRAY_BITS, BLUR_BITS = 22, 16, 24
# Weights of red, green and blue in gray: ITU-R 601.
GRAY_WEIGHTS = (19595, 38470, 7471)


def multi_crop_(out: Tensor, images: Sequence[Tensor], packed: Tensor, levels: Tensor) -> None:
    """Write out [N, B, 3, size, size], one crop at a time.

    packed: [N, B, 14], as from CropParams.pack(), on the CPU. levels: [3, 256], the output of each
    level per channel.
    """
    floats = packed.view(torch.float32)
    channel = torch.arange(3, device=out.device)
    for b, image in enumerate(images):
        for n in range(len(out)):
            top, left, height, width, flags = packed[n, b, : FLAGS + 1].tolist()
            factors, blur_radius = floats[n, b, FACTOR:BLUR].tolist(), floats[n, b, BLUR].item()
            pixels = image[top : top + height, left : left + width].to(torch.int32)
            pixels = resize(pixels, out.shape[-1])
            if flags & FLIP:
                pixels = pixels.flip(1)
            if flags & JITTER:
                for operation in packed[n, b, ORDER:FACTOR].tolist():
                    pixels = OPERATIONS[operation](pixels, factors[operation])
            if flags & GRAY:
                pixels = to_gray(pixels).expand(-1, -1, 3)
            if blur_radius > 0:
                pixels = gaussian_blur(pixels, blur_radius)
            if flags & SOLARIZE:
                pixels = torch.where(pixels < 128, pixels, 255 - pixels)
            out[n, b] = levels[channel, pixels.long()].permute(2, 0, 1)


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize to [size, size], bicubic and antialiased: along x, rounded to 8 bits, then along y."""
    for dim in (1, 0):
        first, weights = resize_weights(pixels.shape[dim], size)
        first, weights = first.to(pixels.device), weights.to(pixels.device)
        shape = [1, 1, 1]
        shape[dim] = size
        total: Tensor | int = 1 << (RESIZE_BITS - 1)
        for tap in range(weights.shape[1]):
            index = (first + tap).clamp(max=pixels.shape[dim] - 1)
            total = total + pixels.index_select(dim, index) * weights[:, tap].view(shape)
        assert isinstance(total, Tensor)
        pixels = (total >> RESIZE_BITS).clamp(0, 255)
    return pixels


@functools.lru_cache(maxsize=1024)
def resize_weights(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Return (first [size] int64, weights w [size, taps] int32).

    Output i is sum_t w[i, t] in[first_i + t]. The filter is Keys' cubic with a = -.5, stretched by
    the scale if that is above 1. Sums and products are in Pillow's order, in fp64, then rounded to
    integers.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    center = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    first = (center - 2 * stretch + 0.5).long().clamp(min=0)
    last = (center + 2 * stretch + 0.5).long().clamp(max=length)
    taps = torch.arange(int((last - first).max()))
    x = ((taps + first[:, None]) - center[:, None] + 0.5) * (1.0 / stretch)
    weights = torch.where(taps < (last - first)[:, None], _cubic(x.abs()), 0.0)
    total = torch.zeros_like(center)
    for column in weights.unbind(1):
        total = total + column
    fixed = weights / total[:, None] * (1 << RESIZE_BITS)
    return first, (fixed + torch.where(fixed < 0, -0.5, 0.5)).to(torch.int32)


def _cubic(x: Tensor) -> Tensor:
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def to_gray(pixels: Tensor) -> Tensor:
    """Return the gray level of each pixel, [height, width, 1]."""
    weights = torch.tensor(GRAY_WEIGHTS, dtype=torch.int32, device=pixels.device)
    total = (pixels * weights).sum(-1, keepdim=True, dtype=torch.int32)
    return (total + (1 << (GRAY_BITS - 1))) >> GRAY_BITS


def blend(start: Tensor | int, end: Tensor, factor: float) -> Tensor:
    """Return start + factor*(end - start) in fp32, each operation rounded, then truncated."""
    alpha = torch.tensor(factor, dtype=torch.float32, device=end.device)
    moved = alpha * (end - start).to(torch.float32)
    return (start + moved).clamp(0, 255).to(torch.int32)


def brightness(pixels: Tensor, factor: float) -> Tensor:
    """Blend with black."""
    return blend(0, pixels, factor)


def contrast(pixels: Tensor, factor: float) -> Tensor:
    """Blend with the mean of the gray image, rounded half up."""
    gray = to_gray(pixels)
    mean = (2 * int(gray.sum(dtype=torch.int64)) + gray.numel()) // (2 * gray.numel())
    return blend(mean, pixels, factor)


def saturation(pixels: Tensor, factor: float) -> Tensor:
    """Blend with the gray image."""
    return blend(to_gray(pixels), pixels, factor)


def hue(pixels: Tensor, factor: float) -> Tensor:
    """Rotate the hue by a fraction of the circle, in 8-bit HSV."""
    h, s, v = rgb_to_hsv(pixels).unbind(-1)
    return hsv_to_rgb(torch.stack([(h + int(factor * 255)) & 255, s, v], dim=-1))


OPERATIONS = (brightness, contrast, saturation, hue)


def rgb_to_hsv(pixels: Tensor) -> Tensor:
    """Convert to Pillow's 8-bit HSV.

    With c = max - min: s = floor(255 c/max), and h = floor(255 m/(6 c)), m/c being the position on
    a circle of length 6. If 255 m/(6 c) is an integer, Pillow's fp32 result may be just below it.
    """
    r, g, b = pixels.unbind(-1)
    v, low = pixels.amax(-1), pixels.amin(-1)
    c = v - low
    m = torch.where(v == r, g - b, torch.where(v == g, 2 * c + b - r, 4 * c + r - g))
    m = torch.where(m < 0, m + 6 * c, m)
    divisor = 6 * c.clamp(min=1)
    h = 255 * m // divisor
    below = torch.tensor(hue_ties(), dtype=torch.int32, device=pixels.device)
    h = h - torch.where(h * divisor == 255 * m, below[h.long()], 0)
    return torch.stack([h, 255 * c // v.clamp(min=1), v], dim=-1)


@functools.cache
def hue_ties() -> list[int]:
    """Return [256] with 1 for each h whose position 6h/255 gives h - 1 in Pillow's arithmetic.

    Pillow divides max - x by c in fp32, adds an integer, rounds to fp32, takes the fractional part
    of a sixth of that (fp64), rounds to fp32 again and truncates 255 times it. These steps depend
    only on the quotient, so c = 255 represents all c.
    """
    place = 6 * torch.arange(256)
    sector, rest = place // 255, place % 255
    # In odd sectors the quotient is added, in even ones subtracted from the next integer.
    odd = sector % 2 == 1
    quotient = torch.where(odd, rest, 255 - rest).float() / torch.full((256,), 255.0)
    base = torch.where(odd, torch.where(sector == 5, -1, sector), sector + 1).double()
    turn = torch.where(odd, base + quotient.double(), base - quotient.double()).float()
    turn = torch.fmod(turn.double() / 6.0 + 1.0, 1.0).float()
    return (torch.arange(256) - (turn.double() * 255.0).long()).clamp(max=1).tolist()


def hsv_to_rgb(pixels: Tensor) -> Tensor:
    """Invert rgb_to_hsv as Pillow; p, q and t are never halfway, so integers round as fp64 does."""
    h, s, v = pixels.unbind(-1)
    sector, rest = 6 * h // 255, 6 * h % 255
    p = (2 * v * (255 - s) + 255) // 510
    q = (2 * v * (65025 - s * rest) + 65025) // 130050
    t = (2 * v * (65025 - s * (255 - rest)) + 65025) // 130050
    table = torch.stack([v, q, p, p, t, v, t, v, v, q, p, p, p, p, t, v, v, q], dim=-1)
    sector = sector % 6  # h = 255 is red again
    return torch.stack(
        [table.gather(-1, (6 * c + sector)[..., None].long())[..., 0] for c in range(3)], dim=-1
    )


def gaussian_blur(pixels: Tensor, radius: float) -> Tensor:
    """Blur as Pillow: three box blurs along x, then three along y, each rounded to 8 bits."""
    taps, near, far = blur_weights(radius)
    for dim in (1, 1, 1, 0, 0, 0):
        pixels = _box_blur(pixels, dim, taps, near, far)
    return pixels


def blur_weights(radius: float) -> tuple[int, int, int]:
    """Return (r, near, far): a box of 2r + 1 pixels of weight near between two of weight far.

    Weights are in units of 2^-24. Gwosdek et al. 2011, equations 11 and 14, for 3 passes; fp32
    where Pillow uses it.
    """

    def fp32(x: float) -> float:
        return torch.tensor(x, dtype=torch.float32).item()

    variance = fp32(fp32(radius * radius) / 3)
    length = fp32(math.sqrt(12.0 * variance + 1.0))
    whole = float(math.floor((length - 1.0) / 2.0))
    part = fp32(fp32(2 * whole + 1) * fp32(whole * (whole + 1) - fp32(3 * variance)))
    part = fp32(part / fp32(6 * fp32(variance - (whole + 1) * (whole + 1))))
    box = fp32(whole + part)
    r = int(box)
    near = int(fp32((1 << BLUR_BITS) / fp32(fp32(box * 2) + 1)))
    return r, near, ((1 << BLUR_BITS) - (2 * r + 1) * near) // 2


def _box_blur(pixels: Tensor, dim: int, r: int, near: int, far: int) -> Tensor:
    """Compute near sum_{|k| <= r} in[x + k] + far (in[x - r - 1] + in[x + r + 1]), rounded.

    Edge pixels are repeated outside the image.
    """
    size = pixels.shape[dim]
    place = torch.arange(size, device=pixels.device)

    def at(offset: int) -> Tensor:
        return pixels.index_select(dim, (place + offset).clamp(0, size - 1)).long()

    inner = sum((at(k) for k in range(1 - r, r + 1)), at(-r))
    total = near * inner + far * (at(-r - 1) + at(r + 1))
    return ((total + (1 << (BLUR_BITS - 1))) >> BLUR_BITS).to(torch.int32)

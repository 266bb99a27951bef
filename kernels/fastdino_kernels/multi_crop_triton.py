"""multi_crop in Triton: every pixel of every crop in one launch, one program per crop.

A program runs these phases, with a barrier after each:

1. the resize coefficients of both axes, in fp64 as Pillow computes them, rounded to 22 bits;
2. for each strip of output rows: the input rows that the strip needs, resized along x to 8 bits,
   then along y, mirrored if the crop is flipped;
3. colours: brightness to hue in the drawn order, in two passes, as contrast needs the mean of the
   operations before it; gray at the end of the second;
4. blur: three box passes along x, three along y;
5. solarize and normalise: a look-up in the 3 x 256 levels.

Between phases a pixel is one 32-bit word (r, g, b in its low bytes, as in Pillow), so that a warp
moves 128 bytes at a time. All arithmetic is on integers, except for the blends, whose products and
sums must be rounded separately (enable_fp_fusion=False), and phase 1.

Bytes per crop, for a box of h x w: 3 h w read, 1 + 4/STRIP times; 12 size^2 written (fp32; bf16:
6). In L2: 4 h size for the strips, written once and read by each tap, and 8 size^2 per pass of
phases 3 (two) and 4 (six), of which a crop holds 8 size^2.

Legend: B images, N crops per image. The scratch of a crop is `pixels` [size^2] and `work`, which
holds the coefficients and the strip in phases 1 and 2 and a second [size^2] in phase 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .crop_params import (
    BLUR,
    COLUMNS,
    FACTOR,
    FLAGS,
    FLIP,
    GRAY,
    JITTER,
    MAX_BLUR_RADIUS,
    ORDER,
    SOLARIZE,
)
from .dispatch import backend_options, device_guard, triton_interprets
from .multi_crop_torch import BLUR_BITS, GRAY_BITS, GRAY_WEIGHTS, RESIZE_BITS, hue_ties

# Output rows whose input rows are resized along x together.
STRIP = 32
# Columns of the table of images: address, height, width, first word of scratch, words per crop.
IMAGE_COLUMNS = 5

_BLUR, _COLUMNS, _FACTOR, _FLAGS = map(tl.constexpr, (BLUR, COLUMNS, FACTOR, FLAGS))
_FLIP, _GRAY, _JITTER, _ORDER = map(tl.constexpr, (FLIP, GRAY, JITTER, ORDER))
_SOLARIZE, _MAX_RADIUS = map(tl.constexpr, (SOLARIZE, MAX_BLUR_RADIUS))
_STRIP, _IMAGE_COLUMNS = tl.constexpr(STRIP), tl.constexpr(IMAGE_COLUMNS)
_RESIZE_BITS, _GRAY_BITS = tl.constexpr(RESIZE_BITS), tl.constexpr(GRAY_BITS)
_BLUR_BITS = tl.constexpr(BLUR_BITS)
_RESIZE_ONE, _RESIZE_HALF = tl.constexpr(1 << RESIZE_BITS), tl.constexpr(1 << (RESIZE_BITS - 1))
_BLUR_ONE, _BLUR_HALF = tl.constexpr(1 << BLUR_BITS), tl.constexpr(1 << (BLUR_BITS - 1))
_GRAY_HALF = tl.constexpr(1 << (GRAY_BITS - 1))
_RED, _GREEN, _BLUE = map(tl.constexpr, GRAY_WEIGHTS)


def _tie_words() -> list[int]:
    """Pack hue_ties() into 8 signed words of 32 bits."""
    ties = hue_ties()
    words = [sum(ties[32 * k + bit] << bit for bit in range(32)) for k in range(8)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = map(tl.constexpr, _tie_words())


@triton.jit
def multi_crop_kernel(
    out, images, packed, levels, scratch, crops, size: tl.constexpr, COEFS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """Make one crop; see the module's docstring."""
    crop = tl.program_id(0).to(tl.int64)
    image = images + (crop // crops) * _IMAGE_COLUMNS
    param = packed + crop * _COLUMNS
    flags = tl.load(param + _FLAGS)
    words = tl.multiple_of(tl.load(image + 4), 16)
    pixels = scratch + tl.multiple_of(tl.load(image + 3), 16) + (crop % crops) * words
    work = pixels + size * size

    _resize(pixels, work, image, param, (flags & _FLIP) != 0, size, COEFS, ROWS, COLS)
    jitter = (flags & _JITTER) != 0
    gray = (flags & _GRAY) != 0
    if jitter | gray:
        _colours(pixels, param, jitter, gray, size, PIXELS)
    radius = tl.load((param + _BLUR).to(tl.pointer_type(tl.float32)))
    if radius > 0:
        _blur(pixels, work, tl.minimum(radius, _MAX_RADIUS), size, PIXELS)

    solarize = (flags & _SOLARIZE) != 0
    out += crop * (3 * size * size)
    for start in range(0, size * size, PIXELS):
        place = start + tl.arange(0, PIXELS)
        mask = place < size * size
        r, g, b = _unpack(tl.load(pixels + place, mask=mask, other=0))
        if solarize:
            r, g, b = _solarized(r), _solarized(g), _solarized(b)
        tl.store(out + place, tl.load(levels + r), mask=mask)
        tl.store(out + size * size + place, tl.load(levels + 256 + g), mask=mask)
        tl.store(out + 2 * size * size + place, tl.load(levels + 512 + b), mask=mask)


@triton.jit
def _unpack(word):
    return word & 255, (word >> 8) & 255, (word >> 16) & 255


@triton.jit
def _pack(r, g, b):
    return r | (g << 8) | (b << 16)


@triton.jit
def _solarized(x):
    return tl.where(x < 128, x, 255 - x)


@triton.jit
def _resize(
    pixels, work, image, param, flip, size: tl.constexpr, COEFS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Run phases 1 and 2; a box that leaves its image is clamped."""
    source = tl.load(image).to(tl.pointer_type(tl.uint8))
    full_height = tl.load(image + 1).to(tl.int32)
    full_width = tl.load(image + 2).to(tl.int32)
    top = tl.minimum(tl.maximum(tl.load(param), 0), full_height - 1)
    left = tl.minimum(tl.maximum(tl.load(param + 1), 0), full_width - 1)
    height = tl.minimum(tl.maximum(tl.load(param + 2), 1), full_height - top)
    width = tl.minimum(tl.maximum(tl.load(param + 3), 1), full_width - left)
    row_bytes = full_width.to(tl.int64) * 3
    source += top * row_bytes + left * 3

    taps_x, taps_y = _taps(width, size), _taps(height, size)
    first_x = work
    first_y = first_x + size
    weights_x = first_y + size
    weights_y = weights_x + taps_x * size
    strip = weights_y + taps_y * size
    _coefficients(first_x, weights_x, width, taps_x, size, COEFS)
    _coefficients(first_y, weights_y, height, taps_y, size, COEFS)
    tl.debug_barrier()

    for start in range(0, size, _STRIP):
        end = min(start + _STRIP, size)
        row0 = tl.load(first_y + start)
        row1 = tl.minimum(tl.load(first_y + end - 1) + taps_y, height)
        _along_x(
            strip, source, row_bytes, row0, row1, width, first_x, weights_x, taps_x,
            size, ROWS, COLS
        )  # fmt: skip
        tl.debug_barrier()
        _along_y(
            pixels, strip, row0, row1, start, end, first_y, weights_y, taps_y, flip,
            size, ROWS, COLS
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _taps(length, size: tl.constexpr):
    """Return how many input pixels an output pixel may depend on: twice the support, rounded up."""
    return tl.ceil(4.0 * _stretch(length, size)).to(tl.int32)


@triton.jit
def _stretch(length, size: tl.constexpr):
    return tl.maximum(length.to(tl.float64) / tl.full((), size, tl.float64), 1.0)


@triton.jit
def _coefficients(first, weights, length, taps, size: tl.constexpr, COEFS: tl.constexpr):
    """Store first [size], weights [taps, size]: output i is sum_t weights[t, i] in[first[i] + t].

    Rounding of an end may add one tap to `taps`; its weight is 0 to 22 bits.
    """
    scale = length.to(tl.float64) / tl.full((), size, tl.float64)
    stretch = _stretch(length, size)
    for start in range(0, size, COEFS):
        place = start + tl.arange(0, COEFS)
        i = tl.minimum(place, size - 1)
        center = (i.to(tl.float64) + 0.5) * scale
        low = tl.maximum((center - 2.0 * stretch + 0.5).to(tl.int32), 0)
        count = tl.minimum((center + 2.0 * stretch + 0.5).to(tl.int32), length) - low
        total = tl.zeros((COEFS,), tl.float64)
        for t in range(taps + 1):
            total += tl.where(t < count, _cubic(t + low, center, stretch), 0.0)
        for t in range(taps):
            fixed = _cubic(t + low, center, stretch) / total * _RESIZE_ONE
            weight = (fixed + tl.where(fixed < 0, -0.5, 0.5)).to(tl.int32)
            weight = tl.where(t < count, weight, 0)
            tl.store(weights + t * size + place, weight, mask=place < size)
        tl.store(first + place, low, mask=place < size)


@triton.jit
def _cubic(place, center, stretch):
    x = tl.abs((place.to(tl.float64) - center + 0.5) * (1.0 / stretch))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _clip8(total):
    return tl.minimum(tl.maximum(total >> _RESIZE_BITS, 0), 255)


@triton.jit
def _along_x(
    strip, source, row_bytes, row0, row1, width, first, weights, taps, size: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Resize input rows row0 to row1 along x into the strip [row1 - row0, size]."""
    for r in range(row0, row1, ROWS):
        row = r + tl.arange(0, ROWS)[:, None]
        line = source + tl.minimum(row, row1 - 1) * row_bytes
        for c in range(0, size, COLS):
            x = c + tl.arange(0, COLS)[None, :]
            low = tl.load(first + x, mask=x < size, other=0)
            red = tl.full((ROWS, COLS), _RESIZE_HALF, tl.int32)
            green, blue = red, red
            for t in range(taps):
                weight = tl.load(weights + t * size + x, mask=x < size, other=0)
                at = line + tl.minimum(low + t, width - 1) * 3
                red += weight * tl.load(at).to(tl.int32)
                green += weight * tl.load(at + 1).to(tl.int32)
                blue += weight * tl.load(at + 2).to(tl.int32)
            word = _pack(_clip8(red), _clip8(green), _clip8(blue))
            tl.store(strip + (row - row0) * size + x, word, mask=(row < row1) & (x < size))


@triton.jit
def _along_y(
    pixels, strip, row0, row1, start, end, first, weights, taps, flip, size: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Resize the strip along y into rows start to end of pixels [size, size]; mirror if flip."""
    for r in range(start, end, ROWS):
        y = r + tl.arange(0, ROWS)[:, None]
        inside = y < end
        low = tl.load(first + y, mask=inside, other=row0) - row0
        for c in range(0, size, COLS):
            x = c + tl.arange(0, COLS)[None, :]
            red = tl.full((ROWS, COLS), _RESIZE_HALF, tl.int32)
            green, blue = red, red
            mask = inside & (x < size)
            for t in range(taps):
                weight = tl.load(weights + t * size + y, mask=inside, other=0)
                at = tl.minimum(low + t, row1 - row0 - 1) * size + x
                r8, g8, b8 = _unpack(tl.load(strip + at, mask=mask, other=0))
                red += weight * r8
                green += weight * g8
                blue += weight * b8
            word = _pack(_clip8(red), _clip8(green), _clip8(blue))
            tl.store(pixels + y * size + tl.where(flip, size - 1 - x, x), word, mask=mask)


@triton.jit
def _colours(pixels, param, jitter, gray, size: tl.constexpr, PIXELS: tl.constexpr):
    """Run phase 3 in place; contrast, operation 1, begins the second of its two passes."""
    contrast = tl.full((), 0, tl.int32)
    for k in range(1, 4):
        contrast = tl.where(tl.load(param + _ORDER + k) == 1, k, contrast)
    mean = tl.full((), 0, tl.int32)
    for half in range(2):
        first = tl.where(half == 0, 0, contrast)
        last = tl.where(half == 0, contrast, 4)
        last = tl.where(jitter, last, first)
        lumas = tl.zeros((PIXELS,), tl.int64)
        for start in range(0, size * size, PIXELS):
            place = start + tl.arange(0, PIXELS)
            mask = place < size * size
            r, g, b = _unpack(tl.load(pixels + place, mask=mask, other=0))
            for k in range(first, last):
                operation = tl.load(param + _ORDER + k)
                factor = tl.load((param + _FACTOR + operation).to(tl.pointer_type(tl.float32)))
                r, g, b = _operation(operation, factor, mean, r, g, b)
            luma = _luma(r, g, b)
            if gray & (half == 1):
                r, g, b = luma, luma, luma
            lumas += tl.where(mask, luma, 0)
            tl.store(pixels + place, _pack(r, g, b), mask=mask)
        total = tl.sum(lumas, 0)
        mean = ((2 * total + size * size) // (2 * size * size)).to(tl.int32)
        tl.debug_barrier()


@triton.jit
def _operation(operation, factor, mean, r, g, b):
    if operation == 3:
        r, g, b = _hue((factor.to(tl.float64) * 255.0).to(tl.int32), r, g, b)
    else:
        other = tl.where(operation == 2, _luma(r, g, b), tl.where(operation == 1, mean, 0))
        r, g, b = _blend(other, r, factor), _blend(other, g, factor), _blend(other, b, factor)
    return r, g, b


@triton.jit
def _luma(r, g, b):
    return (r * _RED + g * _GREEN + b * _BLUE + _GRAY_HALF) >> _GRAY_BITS


@triton.jit
def _blend(start, end, factor):
    moved = start.to(tl.float32) + factor * (end - start).to(tl.float32)
    return tl.minimum(tl.maximum(moved, 0.0), 255.0).to(tl.int32)


@triton.jit
def _hue(shift, r, g, b):
    """Apply multi_crop_torch's rgb_to_hsv, rotate the hue, apply hsv_to_rgb."""
    v = tl.maximum(tl.maximum(r, g), b)
    c = v - tl.minimum(tl.minimum(r, g), b)
    m = tl.where(v == r, g - b, tl.where(v == g, 2 * c + b - r, 4 * c + r - g))
    m = 255 * tl.where(m < 0, m + 6 * c, m)
    divisor = 6 * tl.maximum(c, 1)
    h = m // divisor
    h -= tl.where(h * divisor == m, _tie(h), 0)
    h = (h + shift) & 255
    s = (255 * c) // tl.maximum(v, 1)

    sector = (h * 1542) >> 16  # 6h // 255
    rest = 6 * h - 255 * sector
    sector = tl.where(sector == 6, 0, sector)
    # v and p are the largest and the least channel; the third channel depends on the hue.
    p = (2 * v * (255 - s) + 255) // 510
    away = tl.where((sector & 1) == 0, 255 - rest, rest)
    between = (2 * v * (65025 - s * away) + 65025) // 130050
    return (
        _channel(sector, v, p, between),
        _channel(tl.where(sector < 2, sector + 4, sector - 2), v, p, between),
        _channel(tl.where(sector < 4, sector + 2, sector - 4), v, p, between),
    )


@triton.jit
def _channel(away, v, p, between):
    """Return v in the two sectors around the channel's own hue, p in the two opposite ones."""
    value = tl.where((away == 2) | (away == 3), p, between)
    return tl.where((away == 0) | (away == 5), v, value)


@triton.jit
def _tie(h):
    """Return bit h of hue_ties()."""
    word = tl.where(h < 32, _T0, tl.where(h < 64, _T1, tl.where(h < 96, _T2, _T3)))
    high = tl.where(h < 160, _T4, tl.where(h < 192, _T5, tl.where(h < 224, _T6, _T7)))
    return (tl.where(h < 128, word, high) >> (h & 31)) & 1


@triton.jit
def _blur(pixels, work, radius, size: tl.constexpr, PIXELS: tl.constexpr):
    """Run phase 4: from pixels to work and back three times, with the weights of blur_weights."""
    taps, near, far = _blur_weights(radius)
    for box in range(6):
        along_y = box >= 3
        source = pixels if box % 2 == 0 else work
        target = work if box % 2 == 0 else pixels
        step = tl.where(along_y, size, 1)
        for start in range(0, size * size, PIXELS):
            place = start + tl.arange(0, PIXELS)
            mask = place < size * size
            x = tl.where(along_y, place // size, place % size)
            line = source + place - x * step
            red, green, blue = _unpack(tl.load(line + x * step, mask=mask, other=0))
            for k in range(1, taps + 1):
                r0, g0, b0 = _unpack(tl.load(line + tl.maximum(x - k, 0) * step, mask=mask))
                r1, g1, b1 = _unpack(tl.load(line + tl.minimum(x + k, size - 1) * step, mask=mask))
                red += r0 + r1
                green += g0 + g1
                blue += b0 + b1
            before = tl.maximum(x - taps - 1, 0) * step
            after = tl.minimum(x + taps + 1, size - 1) * step
            r0, g0, b0 = _unpack(tl.load(line + before, mask=mask, other=0))
            r1, g1, b1 = _unpack(tl.load(line + after, mask=mask, other=0))
            word = _pack(
                _box(red, r0 + r1, near, far),
                _box(green, g0 + g1, near, far),
                _box(blue, b0 + b1, near, far),
            )
            tl.store(target + place, word, mask=mask)
        tl.debug_barrier()


@triton.jit
def _box(inner, ends, near, far):
    total = inner.to(tl.uint32) * near + ends.to(tl.uint32) * far + _BLUR_HALF
    return (total >> _BLUR_BITS).to(tl.int32)


@triton.jit
def _blur_weights(radius):
    """Compute multi_crop_torch.blur_weights; fp64 quotients rounded to fp32 are exact."""
    variance = _divide(radius * radius, 3.0)
    length = tl.sqrt(12.0 * variance.to(tl.float64) + 1.0).to(tl.float32)
    whole = tl.floor((length.to(tl.float64) - 1.0) / 2.0).to(tl.float32)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    part = _divide(part, 6.0 * (variance - (whole + 1.0) * (whole + 1.0)))
    box = whole + part
    taps = box.to(tl.int32)
    near = _divide(tl.full((), _BLUR_ONE, tl.float32), box * 2.0 + 1.0).to(tl.int32)
    far = (_BLUR_ONE - (2 * taps + 1) * near) // 2
    return taps, near.to(tl.uint32), far.to(tl.uint32)


@triton.jit
def _divide(a, b):
    return (a.to(tl.float64) / tl.cast(b, tl.float64)).to(tl.float32)


def multi_crop_(out: Tensor, images: Sequence[Tensor], packed: Tensor, levels: Tensor) -> None:
    """Write out [B, N, 3, size, size]; all tensors are on one device.

    images: B contiguous uint8 [H, W, 3]. packed: int32 [B, N, 14]. levels: [3, 256], out's dtype.
    """
    crops, size = out.shape[1], out.shape[-1]
    rows, words = [], 0
    for image in images:
        height, width, _ = image.shape
        of_crop = _scratch_words(height, width, size)
        rows.append((image.data_ptr(), height, width, words, of_crop))
        words += crops * of_crop
    table = torch.tensor(rows, dtype=torch.int64).to(out.device, non_blocking=True)
    scratch = torch.empty(words, dtype=torch.int32, device=out.device)
    with device_guard(out):
        multi_crop_kernel[(len(images) * crops,)](
            out, table, packed.contiguous(), levels, scratch, crops, size=size, **_tiles(size)
        )


def _scratch_words(height: int, width: int, size: int) -> int:
    """Return the scratch words of an image's largest crop, a multiple of 16 for the kernel."""
    stretch = [max(length / size, 1.0) for length in (height, width)]
    taps = [math.ceil(4 * s) for s in stretch]
    rows = min(math.ceil((STRIP - 1) * stretch[0]) + taps[0] + 2, height)
    work = max(size * size, size * (2 + sum(taps) + rows))
    return -(-(size * size + work) // 16) * 16


def _tiles(size: int) -> dict[str, int | bool]:
    """Return the tile sizes; the interpreter is slow per tile, so it gets few large ones."""
    if triton_interprets():
        cols = triton.next_power_of_2(size)
        return {"COEFS": cols, "ROWS": 64, "COLS": cols, "PIXELS": min(cols * cols, 1 << 14)}
    return {
        "COEFS": 256,
        "ROWS": 32,
        "COLS": 32,
        # 4 pixels per thread, so that one access is 128 bits wide.
        "PIXELS": 2048 if size >= 128 else 1024,
        "num_warps": 16 if size >= 128 else 8,
        "enable_fp_fusion": False,
        **backend_options(
            maxnreg=128
        ),  # otherwise ptxas aims at 64, for occupancy, and spills a few
    }

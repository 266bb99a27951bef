"""multi_crop in Triton: all crops of a batch, of all sizes, in three launches.

A crop is divided into parts, one program each. The direction of the division is such that no part
computes pixels of another one:

1. multi_crop_resize_kernel, bands of columns. For each strip of output rows: the input rows that it
   needs, resized along x to 8 bits; then along y, flipped, with the color operations that precede
   contrast. Also the sum of the gray levels, because contrast needs the mean of the whole crop.
2. multi_crop_color_kernel, bands of rows. Contrast, the operations after it, and gray. Then the
   output or, if the crop is blurred, three box passes along x.
3. multi_crop_blur_kernel, bands of columns of the blurred crops. Three box passes along y, then
   the output.

The output is solarized and normalized by a look-up in the 3 x 256 levels. Crops are sorted by
estimated work, heaviest first, so that no long program starts last.

Between operations a pixel is one 32-bit word (r, g, b in its low bytes, as in Pillow), and a warp
works on 32 neighbors in a row, so that accesses are coalesced. All arithmetic is on integers,
except for the blends, whose products and sums must be rounded separately (enable_fp_fusion=False),
and for the resize coefficients: fp64, as Pillow computes them, rounded to 22 bits.

Bytes per crop, for a box of h x w: 3 h w read, 1 + 4/STRIP times, and 12 size^2 written (fp32;
bf16: 6). Scratch: 4 size^2 bytes for the pixels, and 4 size^2 more if the crop is blurred. The
second area first holds the coefficients and strips of the resize, about 25 KB per band.

Legend: B images, N crops per image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import crop_table as columns
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
from .crop_table import crop_table
from .dispatch import backend_options, device_guard, triton_interprets
from .kernel_launch import alignment, launch
from .multi_crop_torch import BLUR_BITS, GRAY_BITS, GRAY_WEIGHTS, RESIZE_BITS, hue_ties

_TABLE_COLUMNS, _ADDRESS, _HEIGHT, _WIDTH, _PITCH, _SIZE, _OUT, _PARAMS, _PIXELS, _WORK, _WORDS = (
    tl.constexpr(getattr(columns, name))
    for name in (
        "TABLE_COLUMNS", "ADDRESS", "HEIGHT", "WIDTH", "PITCH", "SIZE", "OUT", "PARAMS", "PIXELS",
        "WORK", "BAND_WORDS",
    )
)  # fmt: skip
_BLUR, _COLUMNS, _FACTOR, _FLAGS = map(tl.constexpr, (BLUR, COLUMNS, FACTOR, FLAGS))
_FLIP, _GRAY, _JITTER, _ORDER = map(tl.constexpr, (FLIP, GRAY, JITTER, ORDER))
_SOLARIZE, _MAX_RADIUS = map(tl.constexpr, (SOLARIZE, MAX_BLUR_RADIUS))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_RESIZE_BITS, _GRAY_BITS = tl.constexpr(RESIZE_BITS), tl.constexpr(GRAY_BITS)
_BLUR_BITS = tl.constexpr(BLUR_BITS)
_RESIZE_ONE, _RESIZE_HALF = tl.constexpr(1 << RESIZE_BITS), tl.constexpr(1 << (RESIZE_BITS - 1))
_BLUR_ONE, _BLUR_HALF = tl.constexpr(1 << BLUR_BITS), tl.constexpr(1 << (BLUR_BITS - 1))
_GRAY_HALF = tl.constexpr(1 << (GRAY_BITS - 1))
_RED, _GREEN, _BLUE = map(tl.constexpr, GRAY_WEIGHTS)

# Columns of a band of the resize, and output rows whose input rows are resized along x together.
BAND, STRIP = 64, 32
# Rows of a part of the color kernel, and columns of one of the blur kernel.
PART = 32
NUM_WARPS = 4


def _tie_words() -> list[int]:
    """Pack hue_ties() into 8 signed words of 32 bits."""
    ties = hue_ties()
    words = [sum(ties[32 * k + bit] << bit for bit in range(32)) for k in range(8)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = map(tl.constexpr, _tie_words())


@triton.jit(do_not_specialize=["parts"])
def multi_crop_resize_kernel(
    table, packed, scratch, parts, BAND: tl.constexpr, STRIP: tl.constexpr, COEFS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Write pixels [size, size] of columns first to last, and the sum of their gray levels."""
    crop, part = _crop_and_part(table, parts)
    size = tl.load(crop + _SIZE).to(tl.int32)
    first = part * BAND
    if first < size:
        last = tl.minimum(first + BAND, size)
        param = packed + tl.load(crop + _PARAMS) * _COLUMNS
        source, height, width, pitch = _box(crop, param)
        taps_x, taps_y = (_taps(width, size) + 3) // 4 * 4, _taps(height, size)
        pixels = scratch + tl.load(crop + _PIXELS)
        first_x = scratch + tl.load(crop + _WORK) + part * tl.load(crop + _WORDS)
        first_y = first_x + BAND
        weights_x = first_y + size
        weights_y = weights_x + taps_x.to(tl.int64) * BAND
        strip = weights_y + taps_y.to(tl.int64) * size
        _coefficients(first_x, weights_x, first, last, width, taps_x, size, BAND, COEFS)
        _coefficients(first_y, weights_y, 0, size, height, taps_y, size, size, COEFS)
        tl.debug_barrier()

        gray = tl.zeros((ROWS * COLS,), tl.int32)
        for start in range(0, size, STRIP):
            end = tl.minimum(start + STRIP, size)
            row0 = tl.load(first_y + start)
            row1 = tl.minimum(tl.load(first_y + end - 1) + taps_y, height)
            _along_x(
                strip, source, pitch, row0, row1, last - first, width, first_x, weights_x, taps_x,
                BAND, ROWS, COLS
            )  # fmt: skip
            tl.debug_barrier()
            gray = _along_y(
                gray, pixels, param, strip, row0, row1, start, end, first, last, first_y,
                weights_y, taps_y, size, BAND, ROWS, COLS
            )  # fmt: skip
            tl.debug_barrier()
        tl.store(pixels + size * size + part, tl.sum(gray))


@triton.jit(do_not_specialize=["parts"])
def multi_crop_color_kernel(
    table, packed, levels, scratch, parts, BAND: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, SUM_BAND: tl.constexpr
):  # fmt: skip
    """Complete the colors of rows first to last, and blur them along x or write the output.

    Four passes from one area to the other leave the pixels of a blurred crop where they were.
    """
    crop, part = _crop_and_part(table, parts)
    size = tl.load(crop + _SIZE).to(tl.int32)
    first = part * BAND
    if first < size:
        last = tl.minimum(first + BAND, size)
        param = packed + tl.load(crop + _PARAMS) * _COLUMNS
        pixels, work = scratch + tl.load(crop + _PIXELS), scratch + tl.load(crop + _WORK)
        mean = _mean(pixels + size * size, size, SUM_BAND)
        radius = _radius(param)
        for r in range(first, last, ROWS):
            for c in range(0, size, COLS):
                y, x = _tile(r, c, ROWS, COLS)
                mask = (y < last) & (x < size)
                word = tl.load(pixels + y * size + x, mask=mask, other=0)
                word = _late_colors(word, param, mean)
                if radius > 0:
                    tl.store(work + y * size + x, word, mask=mask)
                else:
                    _write(crop, param, levels, word, y, x, mask, size)
        if radius > 0:
            taps, near, far = _blur_weights(radius)
            for box in tl.static_range(3):
                source = pixels if box == 1 else work
                target = work if box == 1 else pixels
                tl.debug_barrier()
                for r in range(first, last, ROWS):
                    for c in range(0, size, COLS):
                        y, x = _tile(r, c, ROWS, COLS)
                        mask = (y < last) & (x < size)
                        line = source + y * size
                        word = _box_blur(line, x, 1, mask, size, taps, near, far)
                        tl.store(target + y * size + x, word, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def multi_crop_blur_kernel(
    table, packed, levels, scratch, parts, BAND: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr
):  # fmt: skip
    """Blur columns first to last along y and write the output, if the crop is blurred."""
    crop, part = _crop_and_part(table, parts)
    size = tl.load(crop + _SIZE).to(tl.int32)
    param = packed + tl.load(crop + _PARAMS) * _COLUMNS
    radius = _radius(param)
    first = part * BAND
    if (radius > 0) & (first < size):
        last = tl.minimum(first + BAND, size)
        pixels, work = scratch + tl.load(crop + _PIXELS), scratch + tl.load(crop + _WORK)
        taps, near, far = _blur_weights(radius)
        for box in tl.static_range(3):
            source = work if box == 1 else pixels
            target = pixels if box == 1 else work
            for r in range(0, size, ROWS):
                for c in range(first, last, COLS):
                    y, x = _tile(r, c, ROWS, COLS)
                    mask = (y < size) & (x < last)
                    word = _box_blur(source + x, y, size, mask, size, taps, near, far)
                    if box < 2:
                        tl.store(target + y * size + x, word, mask=mask)
                    else:
                        _write(crop, param, levels, word, y, x, mask, size)
            tl.debug_barrier()


@triton.jit
def _crop_and_part(table, parts):
    """Return the program's row of the table and the number of its part."""
    program = tl.program_id(0)
    return table + (program // parts).to(tl.int64) * _TABLE_COLUMNS, program % parts


@triton.jit
def _box(crop, param):
    """Return the box, clamped to its image: first byte, height, width, bytes per row."""
    full_height = tl.load(crop + _HEIGHT).to(tl.int32)
    full_width = tl.load(crop + _WIDTH).to(tl.int32)
    top = tl.minimum(tl.maximum(tl.load(param), 0), full_height - 1)
    left = tl.minimum(tl.maximum(tl.load(param + 1), 0), full_width - 1)
    height = tl.minimum(tl.maximum(tl.load(param + 2), 1), full_height - top)
    width = tl.minimum(tl.maximum(tl.load(param + 3), 1), full_width - left)
    pitch = tl.load(crop + _PITCH)
    image = tl.load(crop + _ADDRESS).to(tl.pointer_type(tl.uint8))
    return image + top * pitch + left.to(tl.int64) * 3, height, width, pitch


@triton.jit
def _radius(param):
    """Return the radius of the blur, 0 for none."""
    radius = tl.load((param + _BLUR).to(tl.pointer_type(tl.float32)))
    return tl.where(radius > 0, tl.minimum(radius, _MAX_RADIUS), 0.0)


@triton.jit
def _unpack(word):
    return word & 255, (word >> 8) & 255, (word >> 16) & 255


@triton.jit
def _pack(r, g, b):
    return r | (g << 8) | (b << 16)


@triton.jit
def _write(crop, param, levels, word, y, x, mask, size):
    """Solarize and normalize pixels, and write them into the output [3, size, size]."""
    r, g, b = _unpack(word)
    if (tl.load(param + _FLAGS) & _SOLARIZE) != 0:
        r, g, b = _solarized(r), _solarized(g), _solarized(b)
    out = tl.load(crop + _OUT).to(tl.pointer_type(levels.dtype.element_ty)) + y * size + x
    tl.store(out, tl.load(levels + r), mask=mask)
    tl.store(out + size * size, tl.load(levels + 256 + g), mask=mask)
    tl.store(out + 2 * size * size, tl.load(levels + 512 + b), mask=mask)


@triton.jit
def _solarized(x):
    return tl.where(x < 128, x, 255 - x)


@triton.jit
def _taps(length, size):
    """Return how many input pixels an output pixel may depend on: twice the support, rounded up."""
    return tl.ceil(4.0 * _stretch(length, size)).to(tl.int32)


@triton.jit
def _stretch(length, size):
    return tl.maximum(length.to(tl.float64) / size.to(tl.float64), 1.0)


@triton.jit
def _coefficients(first, weights, start, end, length, taps, size, stride, COEFS: tl.constexpr):
    """Store first [n] and weights [taps, n] of the outputs start to end, n of them.

    Output i is sum_t weights[t, i - start] in[first[i - start] + t]. Rounding of an end may add one
    tap to `taps`; its weight is 0 to 22 bits.
    """
    scale = length.to(tl.float64) / size.to(tl.float64)
    stretch = _stretch(length, size)
    for chunk in range(start, end, COEFS):
        place = chunk + tl.arange(0, COEFS)
        i = tl.minimum(place, end - 1)
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
            at = weights + tl.cast(t, tl.int64) * stride + (place - start)
            tl.store(at, weight, mask=place < end)
        tl.store(first + (place - start), low, mask=place < end)


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
def _tile(first_row, first_column, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the rows y and columns x of a tile, as vectors of ROWS * COLS pixels.

    Triton chooses the order of threads of a matrix by its addresses, and for a look-up differently
    in each version. Threads of a vector are always neighbors in a row.
    """
    place = tl.arange(0, ROWS * COLS)
    return first_row + place // COLS, first_column + place % COLS


@triton.jit
def _along_x(
    strip, source, pitch, row0, row1, columns, width, first, weights, taps, BAND: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Resize input rows row0 to row1 along x into a strip [rows, BAND]; taps: a multiple of 4.

    Four pixels are three words. Aligned words with at least one byte of the row are read, so at
    most 3 bytes before and after it; those have the weight 0.
    """
    for r in range(row0, row1, ROWS):
        for c in range(0, columns, COLS):
            row, x = _tile(r, c, ROWS, COLS)
            inside = x < columns
            line = source.to(tl.int64) + tl.minimum(row, row1 - 1) * pitch
            begin = line + tl.load(first + x, mask=inside, other=0).to(tl.int64) * 3
            shift = (begin & 3) * 8
            word = (begin & -4).to(tl.pointer_type(tl.uint32))
            last = ((line + width.to(tl.int64) * 3 - 1 - (begin & -4)) >> 2).to(tl.int32)
            red = tl.full((ROWS * COLS,), _RESIZE_HALF, tl.int32)
            green, blue = red, red
            word0 = tl.load(word)
            for t in range(0, taps, 4):
                k = t // 4 * 3
                word1 = tl.load(word + tl.minimum(k + 1, last))
                word2 = tl.load(word + tl.minimum(k + 2, last))
                word3 = tl.load(word + tl.minimum(k + 3, last))
                bytes0 = _from_byte(word0, word1, shift)
                bytes1 = _from_byte(word1, word2, shift)
                bytes2 = _from_byte(word2, word3, shift)
                word0 = word3
                weight = weights + tl.cast(t, tl.int64) * BAND + x
                weight0 = tl.load(weight, mask=inside, other=0)
                weight1 = tl.load(weight + BAND, mask=inside, other=0)
                weight2 = tl.load(weight + 2 * BAND, mask=inside, other=0)
                weight3 = tl.load(weight + 3 * BAND, mask=inside, other=0)
                red += weight0 * (bytes0 & 255) + weight1 * (bytes0 >> 24 & 255)
                red += weight2 * (bytes1 >> 16 & 255) + weight3 * (bytes2 >> 8 & 255)
                green += weight0 * (bytes0 >> 8 & 255) + weight1 * (bytes1 & 255)
                green += weight2 * (bytes1 >> 24 & 255) + weight3 * (bytes2 >> 16 & 255)
                blue += weight0 * (bytes0 >> 16 & 255) + weight1 * (bytes1 >> 8 & 255)
                blue += weight2 * (bytes2 & 255) + weight3 * (bytes2 >> 24 & 255)
            word = _pack(_clip8(red), _clip8(green), _clip8(blue))
            at = strip + (row - row0).to(tl.int64) * BAND + x
            tl.store(at, word, mask=(row < row1) & inside)


@triton.jit
def _from_byte(low, high, shift):
    """Return 4 bytes of the 8 in two words, from bit `shift` on."""
    both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    return (both >> shift.to(tl.uint64)).to(tl.int32)


@triton.jit
def _along_y(
    gray, pixels, param, strip, row0, row1, start, end, left, right, first, weights, taps, size,
    BAND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Resize the strip along y into rows start to end of pixels, flipped, with the early colors.

    Returns: gray [ROWS * COLS] plus the gray levels of these pixels.
    """
    flip = (tl.load(param + _FLAGS) & _FLIP) != 0
    for r in range(start, end, ROWS):
        for c in range(left, right, COLS):
            y, x = _tile(r, c, ROWS, COLS)
            mask = (y < end) & (x < right)
            low = tl.load(first + y, mask=y < end, other=row0) - row0
            red = tl.full((ROWS * COLS,), _RESIZE_HALF, tl.int32)
            green, blue = red, red
            for t in range(taps):
                at = weights + tl.cast(t, tl.int64) * size + y
                weight = tl.load(at, mask=y < end, other=0)
                at = tl.minimum(low + t, row1 - row0 - 1).to(tl.int64) * BAND + (x - left)
                r8, g8, b8 = _unpack(tl.load(strip + at, mask=mask, other=0))
                red += weight * r8
                green += weight * g8
                blue += weight * b8
            red, green, blue = _early_colors(_clip8(red), _clip8(green), _clip8(blue), param)
            gray += _luma(red, green, blue)  # black outside
            at = pixels + y * size + tl.where(flip, size - 1 - x, x)
            tl.store(at, _pack(red, green, blue), mask=mask)
    return gray


@triton.jit
def _mean(sums, size, SUM_BAND: tl.constexpr):
    """Return the mean of the gray levels, rounded half up."""
    total = tl.full((), 0, tl.int64)
    for part in range((size + SUM_BAND - 1) // SUM_BAND):
        total += tl.load(sums + part)
    pixels = size * size
    return ((2 * total + pixels) // (2 * pixels)).to(tl.int32)


@triton.jit
def _early_colors(r, g, b, param):
    """Apply the operations before contrast, in the drawn order, if the crop is jittered."""
    for k in range(0, _contrast_place(param)):
        r, g, b = _operation(k, param, 0, r, g, b)
    return r, g, b


@triton.jit
def _late_colors(word, param, mean):
    """Apply contrast and the operations after it if the crop is jittered, then gray."""
    r, g, b = _unpack(word)
    flags = tl.load(param + _FLAGS)
    last = tl.where((flags & _JITTER) != 0, 4, 0)
    for k in range(_contrast_place(param), last):
        r, g, b = _operation(k, param, mean, r, g, b)
    if (flags & _GRAY) != 0:
        luma = _luma(r, g, b)
        r, g, b = luma, luma, luma
    return _pack(r, g, b)


@triton.jit
def _contrast_place(param):
    """Return how many operations precede contrast, operation 1; 0 without jitter."""
    place = tl.full((), 0, tl.int32)
    for k in range(1, 4):
        place = tl.where(_drawn_operation(param, k) == 1, k, place)
    return tl.where((tl.load(param + _FLAGS) & _JITTER) != 0, place, 0)


@triton.jit
def _drawn_operation(param, k):
    return tl.load(param + _ORDER + k) & 3  # values on a device are not checked


@triton.jit
def _operation(k, param, mean, r, g, b):
    """Apply the k-th operation in the drawn order."""
    operation = _drawn_operation(param, k)
    factor = tl.load((param + _FACTOR + operation).to(tl.pointer_type(tl.float32)))
    # Values on a device are not checked: one out of range, or not finite, becomes 0.
    factor = tl.where(tl.abs(factor) <= tl.where(operation == 3, 0.5, _LARGEST), factor, 0.0)
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
def _box_blur(line, place, step, mask, size, taps, near, far):
    """Blur by multi_crop_torch._box_blur along a line of `size` pixels `step` words apart."""
    word = tl.load(line + place * step, mask=mask, other=0)
    red_blue, green = word & 0xFF00FF, (word >> 8) & 255
    for k in range(1, taps + 1):
        before, after = _neighbors(line, place, k, step, mask, size)
        red_blue += (before & 0xFF00FF) + (after & 0xFF00FF)
        green += ((before >> 8) & 255) + ((after >> 8) & 255)
    before, after = _neighbors(line, place, taps + 1, step, mask, size)
    return _pack(
        _box_mean(red_blue & 0xFFFF, (before & 255) + (after & 255), near, far),
        _box_mean(green, ((before >> 8) & 255) + ((after >> 8) & 255), near, far),
        _box_mean((red_blue >> 16) & 0xFFFF, (before >> 16) + (after >> 16), near, far),
    )


@triton.jit
def _neighbors(line, place, distance, step, mask, size):
    before = tl.load(line + tl.maximum(place - distance, 0) * step, mask=mask, other=0)
    after = tl.load(line + tl.minimum(place + distance, size - 1) * step, mask=mask, other=0)
    return before, after


@triton.jit
def _box_mean(inner, ends, near, far):
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


def multi_crop_(
    outs: Sequence[Tensor], images: Sequence[Tensor], packed: Tensor, levels: Tensor
) -> None:
    """Write each of outs [N, B, 3, size, size], of several sizes; all are on one device.

    images: B uint8 [H, W, 3], the pixels of a row contiguous. packed: int32 [C, 14], all crops in
    the order of outs, on that device or on the CPU. levels: [3, 256], in the dtype of outs.
    """
    table, packed, words = crop_table(outs, images, packed, BAND, STRIP)
    scratch = torch.empty(words, dtype=torch.int32, device=table.device)
    largest = max(out.shape[-1] for out in outs)
    bands, parts = -(-largest // BAND), -(-largest // PART)
    # The interpreter is slow per tile, so it gets few large ones.
    rows, cols = (256, 256) if triton_interprets() else (16, 32)
    # AMD's compiler uses 32-bit offsets into tensors below 2 GiB.
    tensors = (table, packed, levels, scratch)
    signature = (levels.dtype, *alignment(*tensors), *(t.nbytes >> 31 == 0 for t in tensors))
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    with device_guard(table):
        launch(
            multi_crop_resize_kernel, (len(table) * bands, 1, 1), signature,
            (table, packed, scratch, bands),
            {
                "BAND": BAND, "STRIP": STRIP, "COEFS": 32 * NUM_WARPS, "ROWS": min(rows, 64),
                "COLS": min(cols, BAND),
            },
            **options, **backend_options(maxnreg=128),
        )  # fmt: skip
        launch(
            multi_crop_color_kernel, (len(table) * parts, 1, 1), signature,
            (table, packed, levels, scratch, parts),
            {"BAND": PART, "ROWS": min(rows, PART), "COLS": cols, "SUM_BAND": BAND},
            **options,
        )  # fmt: skip
        launch(
            multi_crop_blur_kernel, (len(table) * parts, 1, 1), signature,
            (table, packed, levels, scratch, parts),
            {"BAND": PART, "ROWS": rows, "COLS": min(cols, PART)},
            **options,
        )  # fmt: skip

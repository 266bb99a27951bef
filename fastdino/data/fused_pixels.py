"""The pixels of the fused crops on a CPU, compiled by Numba: the only file that imports it.

The arithmetic is that of fastdino_kernels.multi_crop_torch, where its equations stand; here it is
arranged so that LLVM vectorises every long loop. A crop is planar, [3, size, size] uint8, and an
image lies turned, [W, 3, H]: the resize along x then adds up whole columns, as the one along y
adds up rows. Numba widens integers to 64 bits: each step is cast back to keep the lanes narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from fastdino_kernels.crop_params import BLUR, FACTOR, FLAGS, FLIP, GRAY, JITTER, ORDER, SOLARIZE
from fastdino_kernels.multi_crop_torch import hue_ties
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

# These and the imported numbers are frozen into compiled code, whose cache looks at this file
# alone: where others change, clear it. Bit h: hue h comes out as h - 1 where it is exact.
_TIES = np.packbits(np.array(hue_ties(), np.uint8), bitorder="little").view(np.int32)
_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = (np.int32(word) for word in _TIES)
_HALF_GRAY, _HALF_BLUR = np.int32(1 << 15), np.uint32(1 << 23)
MAX_TAPS = 128  # above the box of a blur radius of 100
_ZERO, _TOP = np.float32(0), np.float32(255)


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(cache=True, nogil=True, error_model="numpy")(function)


@_compiled
def turn(image: Bytes, turned: Bytes) -> None:
    """Image [H, W, 3] to turned [W, 3, H], by blocks of rows that stay in the cache."""
    height, width, _ = image.shape
    for start in range(0, height, 64):
        block, strip = image[start : start + 64], turned[:, :, start : start + 64]
        rows = len(block)
        for x in range(width):
            for c in range(3):
                for y in range(rows):
                    strip[x, c, y] = block[y, x, c]


@_compiled
def crops_of_image(
    turned: Bytes,
    packed: Ints,
    floats: NDArray[np.float32],
    levels: NDArray[Any],
    bytes_: Bytes,
    sums: Ints,
    out: NDArray[Any],
) -> None:
    """Writes out [N, 3, size, size].

    turned: [W, 3, H]. packed, floats: [N, 14], CropParams.pack() as int32 and as fp32.
    levels: [3, 256], what a level of a channel becomes. bytes_, sums: scratch; see scratch_sizes.
    """
    size = out.shape[-1]
    plane = size * size
    rgb, other = bytes_[: 3 * plane], bytes_[3 * plane : 6 * plane]
    rest = bytes_[6 * plane :]
    for n in range(len(packed)):
        flags = packed[n, FLAGS]
        _resize(turned, packed[n], flags & FLIP, rest, sums, rgb.reshape(3, size, size))
        r, g, b = rgb[:plane], rgb[plane : 2 * plane], rgb[2 * plane :]
        if flags & JITTER:
            for k in range(ORDER, FACTOR):
                operation = packed[n, k]
                _jitter(operation, floats[n, FACTOR + operation], r, g, b)
        if flags & GRAY:
            _gray(r, g, b)
        if floats[n, BLUR] > 0:
            taps, near, far = blur_weights(floats[n, BLUR])
            for c in range(3):
                pixels = rgb[c * plane : (c + 1) * plane].reshape(size, size)
                _blur_rows(pixels, taps, near, far, rest, sums)
                _blur_columns(pixels, other[:plane].reshape(size, size), taps, near, far, sums)
        _write(rgb.reshape(3, plane), levels, flags & SOLARIZE, out[n].reshape(3, plane))


def scratch_sizes(height: int, size: int) -> tuple[int, int]:
    """Elements of bytes_ and sums for images of that height and crops of that size."""
    planes = 6 * size * size
    rows = max(6 * size * height, 2 * (size + 2 * (MAX_TAPS + 1)))
    return planes + rows, max(3 * height, size)


@_compiled
def _weights(length: int, size: int) -> tuple[Ints, Ints]:
    """(first [size], weights [size, taps]), taps padded with zeros to a multiple of 4."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    most = math.ceil(support) * 2 + 1
    first = np.empty(size, np.int32)
    weights = np.zeros((size, (most + 3) // 4 * 4), np.int32)
    exact = np.empty(most, np.float64)
    used = 0
    for i in range(size):
        center = (i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), length) - low
        total = 0.0
        for t in range(count):
            x = abs((t + low - center + 0.5) * (1.0 / stretch))
            if x < 1.0:
                exact[t] = (1.5 * x - 2.5) * x * x + 1
            elif x < 2.0:
                exact[t] = (((x - 5) * x + 8) * x - 4) * -0.5
            else:
                exact[t] = 0.0
            total += exact[t]
        for t in range(count):
            fixed = exact[t] / total * (1 << 22)
            weights[i, t] = int(fixed - 0.5) if fixed < 0 else int(fixed + 0.5)
            if weights[i, t] != 0:
                used = max(used, t + 1)
        first[i] = low
    return first, weights[:, : (used + 3) // 4 * 4]


@_compiled
def _resize(turned: Bytes, box: Ints, flip: int, rest: Bytes, sums: Ints, out: Bytes) -> None:
    """Along x from turned to columns, turned back to rows, then along y: out [3, size, size]."""
    size = out.shape[-1]
    top, left, height, width = box[0], box[1], box[2], box[3]
    columns = rest[: 3 * size * height].reshape(size, 3 * height)
    rows = rest[3 * size * height : 6 * size * height].reshape(3, height, size)
    first, weights = _weights(width, size)
    source = turned[left : left + width, :, top : top + height]
    for x in range(size):
        for c in range(3):
            _weigh(source[:, c], first[x], weights[x], sums[:height])
            _round(sums[:height], columns[x, c * height : (c + 1) * height])
    for c in range(3):
        _turn_back(columns[:, c * height : (c + 1) * height], flip, rows[c])
    first, weights = _weights(height, size)
    for c in range(3):
        for y in range(size):
            _weigh(rows[c], first[y], weights[y], sums[:size])
            _round(sums[:size], out[c, y])


@_compiled
def _weigh(lines: Bytes, first: int, weights: Ints, sums: Ints) -> None:
    """Sums [n] = sum_t weights[t] lines[first + t, :n]; a weight beyond the last line is 0."""
    n, last = len(sums), len(lines) - 1
    for i in range(n):
        sums[i] = 1 << 21
    for t in range(0, len(weights), 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        line0, line1 = lines[min(first + t, last)], lines[min(first + t + 1, last)]
        line2, line3 = lines[min(first + t + 2, last)], lines[min(first + t + 3, last)]
        for i in range(n):
            pair0 = np.int32(np.int32(w0 * np.int32(line0[i])) + np.int32(w1 * np.int32(line1[i])))
            pair1 = np.int32(np.int32(w2 * np.int32(line2[i])) + np.int32(w3 * np.int32(line3[i])))
            sums[i] = np.int32(sums[i] + np.int32(pair0 + pair1))


@_compiled
def _round(sums: Ints, out: Bytes) -> None:
    for i in range(len(sums)):
        out[i] = np.uint8(min(max(np.int32(sums[i] >> 22), np.int32(0)), np.int32(255)))


@_compiled
def _turn_back(columns: Bytes, flip: int, rows: Bytes) -> None:
    """Columns [size, height] to rows [height, size], mirrored where flip is not 0."""
    size, height = columns.shape
    for start in range(0, size, 32):
        stop = min(start + 32, size)
        for y in range(height):
            if flip:
                for x in range(start, stop):
                    rows[y, size - 1 - x] = columns[x, y]
            else:
                for x in range(start, stop):
                    rows[y, x] = columns[x, y]


@_compiled
def _jitter(operation: int, factor: float, r: Bytes, g: Bytes, b: Bytes) -> None:
    if operation == 0:
        for plane in (r, g, b):
            _blend_with(np.int32(0), plane, factor)
    elif operation == 1:
        total, pixels = 0, len(r)
        for i in range(pixels):
            total += _luma(r[i], g[i], b[i])
        mean = np.int32((2 * total + pixels) // (2 * pixels))
        for plane in (r, g, b):
            _blend_with(mean, plane, factor)
    elif operation == 2:
        for i in range(len(r)):
            gray = _luma(r[i], g[i], b[i])
            r[i] = _blend(gray, np.int32(r[i]), factor)
            g[i] = _blend(gray, np.int32(g[i]), factor)
            b[i] = _blend(gray, np.int32(b[i]), factor)
    else:
        _hue(np.int32(np.float64(factor) * 255), r, g, b)


@_compiled
def _luma(r: int, g: int, b: int) -> Any:
    weighed = np.int32(np.int32(r) * np.int32(19595)) + np.int32(np.int32(g) * np.int32(38470))
    weighed = np.int32(np.int32(weighed) + np.int32(np.int32(b) * np.int32(7471)))
    return np.int32(np.int32(weighed + _HALF_GRAY) >> 16)


@_compiled
def _blend(start: Any, end: Any, factor: Any) -> Any:
    moved = np.float32(start) + factor * np.float32(np.int32(end - start))
    return np.uint8(np.int32(min(max(moved, _ZERO), _TOP)))


@_compiled
def _blend_with(start: Any, plane: Bytes, factor: Any) -> None:
    for i in range(len(plane)):
        plane[i] = _blend(start, np.int32(plane[i]), factor)


@_compiled
def _gray(r: Bytes, g: Bytes, b: Bytes) -> None:
    for i in range(len(r)):
        gray = np.uint8(_luma(r[i], g[i], b[i]))
        r[i] = gray
        g[i] = gray
        b[i] = gray


@_compiled
def _tie(h: Any) -> Any:
    """Bit h of the table, without a look-up, which would keep the loop from being vectorised."""
    low = _bit(_T0, 0, h) | _bit(_T1, 1, h) | _bit(_T2, 2, h) | _bit(_T3, 3, h)
    high = _bit(_T4, 4, h) | _bit(_T5, 5, h) | _bit(_T6, 6, h) | _bit(_T7, 7, h)
    return np.int32(low | high)


@_compiled
def _bit(word: Any, k: int, h: Any) -> Any:
    return np.int32(np.int32(word >> np.int32(h & 31)) & np.int32(np.int32(h >> 5) == k))


@_compiled
def _hue(shift: Any, red: Bytes, green: Bytes, blue: Bytes) -> None:
    """Quotients in fp32: of integers below 2^24 they are exact or 1/1530 from a whole number."""
    for i in range(len(red)):
        r, g, b = np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
        v = max(max(r, g), b)
        c = np.int32(v - min(min(r, g), b))
        m = np.int32(4 * c + r - g)
        m = np.int32(2 * c + b - r) if v == g else m
        m = np.int32(g - b) if v == r else m
        m = np.int32(255 * np.int32(m + 6 * c if m < 0 else m))
        divisor = np.int32(6 * max(c, np.int32(1)))
        h = np.int32(np.float32(m) / np.float32(divisor))
        h = np.int32(h - _tie(h)) if np.int32(h * divisor) == m else h
        h = np.int32(np.int32(h + shift) & 255)
        s = np.int32(np.float32(np.int32(255 * c)) / np.float32(max(v, np.int32(1))))

        sector = np.int32(np.int32(h * 1542) >> 16)  # 6h // 255
        rest = np.int32(2 * h - 85 * sector)  # (6h % 255) / 3
        sector = np.int32(0) if sector == 6 else sector
        p = _level(np.int32(v * np.int32(255 - s)), np.float32(255))
        q = _level(np.int32(v * np.int32(21675 - s * rest)), np.float32(21675))
        t = _level(np.int32(v * np.int32(21675 - s * (85 - rest))), np.float32(21675))
        rising = t if sector & 1 == 0 else q  # the one channel that is neither v nor p
        red[i] = _pick(sector, np.int32(0), v, p, rising)
        green[i] = _pick(sector, np.int32(2), v, p, rising)
        blue[i] = _pick(sector, np.int32(4), v, p, rising)


@_compiled
def _level(value: Any, divisor: Any) -> Any:
    """Value/divisor, rounded."""
    return np.int32(np.float32(value) / divisor + np.float32(0.5))


@_compiled
def _pick(sector: Any, own: Any, v: Any, p: Any, between: Any) -> Any:
    """A channel's value: v in the two sectors around its own place, p in the two opposite ones."""
    away = np.int32(sector - own)
    away = np.int32(away + 6) if away < 0 else away
    value = p if away == 2 or away == 3 else between
    return np.uint8(v if away == 0 or away == 5 else value)


@_compiled
def blur_weights(radius: Any) -> tuple[int, Any, Any]:
    """(r, near, far): a box of 2r + 1 pixels of weight near between two of weight far, in 2^-24."""
    variance = np.float32(np.float32(radius * radius) / np.float32(3))
    length = np.float32(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(math.floor((np.float64(length) - 1.0) / 2.0))
    one, two = np.float32(1), np.float32(2)
    next_ = np.float32(whole + one)
    part = np.float32(two * whole + one) * np.float32(whole * next_ - np.float32(3) * variance)
    part = np.float32(part) / np.float32(np.float32(6) * np.float32(variance - next_ * next_))
    box = np.float32(whole + part)
    taps = int(box)
    near = np.uint32(np.float32(1 << 24) / np.float32(box * two + one))
    return taps, near, np.uint32(((1 << 24) - (2 * taps + 1) * np.int64(near)) // 2)


@_compiled
def _blur_rows(pixels: Bytes, taps: int, near: Any, far: Any, scratch: Bytes, sums: Ints) -> None:
    """Three box blurs of each row, in two copies of it with its ends repeated."""
    size, pad = len(pixels), taps + 1
    length = size + 2 * pad
    line, blurred = scratch[:length], scratch[length : 2 * length]
    for y in range(size):
        _copy(pixels[y], line[pad : pad + size])
        for _ in range(3):
            for k in range(pad):
                line[k], line[pad + size + k] = line[pad], line[pad + size - 1]
            out = blurred[pad : pad + size]
            before, here, after = line[:size], line[pad : pad + size], line[2 * pad :]
            if taps == 0:
                _box_of_1(before, here, after, near, far, out)
            elif taps == 1:
                _box_of_3(
                    before, line[1 : 1 + size], here, line[3 : 3 + size], after, near, far, out
                )
            else:
                _copy(line[1 : 1 + size], sums)
                for k in range(2, 2 * taps + 2):
                    _add(line[k : k + size], sums)
                _box_of_sums(before, sums, after, near, far, out)
            line, blurred = blurred, line
        _copy(line[pad : pad + size], pixels[y])


@_compiled
def _blur_columns(pixels: Bytes, other: Bytes, taps: int, near: Any, far: Any, sums: Ints) -> None:
    """Three box blurs of each column, row after row; `other` is scratch of the same shape."""
    last = len(pixels) - 1
    source, out = pixels, other
    for _ in range(3):
        for y in range(last + 1):
            before, after = source[max(y - taps - 1, 0)], source[min(y + taps + 1, last)]
            above, here, below = source[max(y - 1, 0)], source[y], source[min(y + 1, last)]
            if taps == 0:
                _box_of_1(before, here, after, near, far, out[y])
            elif taps == 1:
                _box_of_3(before, above, here, below, after, near, far, out[y])
            else:
                _copy(here, sums)
                for k in range(1, taps + 1):
                    _add(source[max(y - k, 0)], sums)
                    _add(source[min(y + k, last)], sums)
                _box_of_sums(before, sums, after, near, far, out[y])
        source, out = out, source
    for y in range(last + 1):
        _copy(source[y], pixels[y])


@_compiled
def _copy(source: Bytes, target: NDArray[Any]) -> None:
    for i in range(len(source)):
        target[i] = source[i]


@_compiled
def _box_of_1(before: Bytes, here: Bytes, after: Bytes, near: Any, far: Any, out: Bytes) -> None:
    for i in range(len(out)):
        ends = np.uint32(np.uint32(before[i]) + np.uint32(after[i]))
        out[i] = _box(np.uint32(here[i]), ends, near, far)


@_compiled
def _box_of_3(
    before: Bytes,
    left: Bytes,
    here: Bytes,
    right: Bytes,
    after: Bytes,
    near: Any,
    far: Any,
    out: Bytes,
) -> None:
    for i in range(len(out)):
        inner = np.uint32(np.uint32(left[i]) + np.uint32(here[i]) + np.uint32(right[i]))
        ends = np.uint32(np.uint32(before[i]) + np.uint32(after[i]))
        out[i] = _box(inner, ends, near, far)


@_compiled
def _box_of_sums(before: Bytes, sums: Ints, after: Bytes, near: Any, far: Any, out: Bytes) -> None:
    for i in range(len(out)):
        ends = np.uint32(np.uint32(before[i]) + np.uint32(after[i]))
        out[i] = _box(np.uint32(sums[i]), ends, near, far)


@_compiled
def _add(line: Bytes, sums: Ints) -> None:
    for i in range(len(line)):
        sums[i] = np.int32(sums[i] + np.int32(line[i]))


@_compiled
def _box(inner: Any, ends: Any, near: Any, far: Any) -> Any:
    total = np.uint32(np.uint32(near * inner) + np.uint32(far * ends))
    return np.uint8(np.uint32(total + _HALF_BLUR) >> np.uint32(24))


@_compiled
def _write(rgb: Bytes, levels: NDArray[Any], solarize: int, out: NDArray[Any]) -> None:
    for c in range(3):
        table = np.empty(256, levels.dtype)
        for level in range(256):
            table[level] = levels[c, 255 - level if solarize and level >= 128 else level]
        for i in range(rgb.shape[1]):
            out[c, i] = table[rgb[c, i]]

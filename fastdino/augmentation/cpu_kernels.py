"""Pixel loops of the fused crops on a CPU, compiled by Numba.

The arithmetic is that of fastdino_kernels.multi_crop_torch, which has the equations. The loops are
arranged so that LLVM vectorizes every long one. A crop is planar, [3, size, size] uint8. An image
is transposed, [3 W, H]: the resize along x then adds whole columns, as the one along y adds rows.
Numba widens integers to 64 bits, so each step is cast back to keep the lanes narrow. Functions
called for every line take offsets into arrays: creating a slice would cost as much as the line.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from fastdino_kernels.crop_params import BLUR, FACTOR, FLAGS, FLIP, GRAY, JITTER, ORDER, SOLARIZE
from fastdino_kernels.multi_crop_torch import hue_ties
from numba import njit
from numba.core.caching import FunctionCache
from numpy.typing import NDArray

from fastdino.terminal import print_err

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Words = NDArray[np.uint64]

# These and the imported constants are compiled in, but Numba's cache is keyed by this file alone:
# clear it after changing others. Bit h is set if an exact hue h becomes h - 1.
_TIES = np.packbits(np.array(hue_ties(), np.uint8), bitorder="little").view(np.int32)
_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = (np.int32(word) for word in _TIES)
_HALF_LEVEL, _HALF_GRAY = np.int32(1 << 21), np.int32(1 << 15)
_HALF_BLUR = np.uint32(1 << 23)
MAX_TAPS = 128  # more than the box of a blur radius of 100 needs
STRIP = 64  # rows transposed at a time: one cache line of the result
_2, _3, _4, _8, _16, _32 = (np.uint64(number) for number in (2, 3, 4, 8, 16, 32))
_LOW_8, _LOW_16 = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)
_LOW_32 = np.uint64(0x00000000FFFFFFFF)
_ZERO, _TOP = np.float32(0), np.float32(255)


def _compiled(function: Callable[..., Any]) -> Any:
    compiled = njit(nogil=True, error_model="numpy")(function)
    # Without a folder that can be written, as in a read-only container, each process compiles.
    with contextlib.suppress(RuntimeError):
        compiled.enable_caching()
        compiled._cache = _RepairedCache(function)
    return compiled


class _RepairedCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of a function, written again if it is damaged; Numba raises any error."""

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except Exception as error:
            print_err(
                f"warning: Numba's cache in {self.cache_path} is damaged ({error!r}) and is "
                "written again"
            )
            self.flush()
            return None


@_compiled
def transpose_image(image: Bytes, strip: Bytes, transposed: Bytes) -> None:
    """Transpose image [H, W, 3] to [3 W, H], flat, with both sides padded by up8().

    strip: scratch, STRIP lines of 3 W.
    """
    height, width, _ = image.shape
    lines, length = up8(3 * width), up8(height)
    words, out = strip.view(np.uint64), transposed.view(np.uint64)
    for start in range(0, height, STRIP):
        rows = min(STRIP, height - start)
        for y in range(rows):
            _copy(image[start + y].reshape(3 * width), strip[y * lines : y * lines + 3 * width])
        _transpose(words, up8(rows) // 8, lines // 8, out, length // 8, start // 8)


@_compiled
def up8(length: int) -> int:
    """Round up to a multiple of 8, so that lines are whole words."""
    return (length + 7) // 8 * 8


@_compiled
def crops_of_image(
    transposed: Bytes,
    packed: Ints,
    floats: NDArray[np.float32],
    levels: NDArray[Any],
    bytes_: Bytes,
    sums: Ints,
    out: NDArray[Any],
) -> None:
    """Write the crops out [N, 3, size, size] of one image.

    transposed: [3 W, H] from transpose_image(). packed, floats: [N, 14], CropParams.pack() as int32
    and as fp32. levels: [3, 256], the output value per channel and level. bytes_, sums: scratch of
    scratch_sizes().
    """
    size = out.shape[-1]
    plane = size * size
    rest, rgb = bytes_[: len(bytes_) - 3 * plane], bytes_[len(bytes_) - 3 * plane :]
    for n in range(len(packed)):
        flags = packed[n, FLAGS]
        resize(transposed, packed[n], flags & FLIP, rest, sums, rgb.reshape(3, size, size))
        r, g, b = rgb[:plane], rgb[plane : 2 * plane], rgb[2 * plane :]
        if flags & JITTER:
            for k in range(ORDER, FACTOR):
                operation = packed[n, k]
                jitter(operation, floats[n, FACTOR + operation], r, g, b)
        if flags & GRAY:
            gray(r, g, b)
        if floats[n, BLUR] > 0:
            blur(rgb.reshape(3, size, size), floats[n, BLUR], rest, sums)
        write(rgb.reshape(3, plane), levels, flags & SOLARIZE, out[n].reshape(3, plane))


def scratch_sizes(height: int, size: int) -> tuple[int, int]:
    """Return the elements of bytes_ and sums for an image's height and a crop's size.

    The last 3 size^2 bytes hold a crop; resize() and blur() use the others.
    """
    resized = 6 * up8(size) * up8(height)
    blurred = 2 * (size + 2 * (MAX_TAPS + 1)) ** 2
    return up8(max(resized, blurred)) + 3 * size * size, 2 * max(height, size)


@_compiled
def _weights(length: int, size: int) -> tuple[Ints, Ints]:
    """Return first [size] and weights [size, taps], zero-padded to an even number, at least 6."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    most = math.ceil(support) * 2 + 1
    first = np.empty(size, np.int32)
    weights = np.zeros((size, max(most + 1, 6)), np.int32)
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
    return first, weights[:, : max((used + 1) // 2 * 2, 6)]


@_compiled
def resize(transposed: Bytes, box: Ints, flip: int, rest: Bytes, sums: Ints, out: Bytes) -> None:
    """Resize a box bicubically to out [3, size, size]: along x, transpose, then along y.

    The intermediate columns are [3, size, height] and the rows [3, height, size], both padded by
    up8().
    """
    size = out.shape[-1]
    top, left, height, width = box[0], box[1], box[2], box[3]
    tall, wide = up8(height), up8(size)
    columns, rows = rest[: 3 * wide * tall], rest[3 * wide * tall : 6 * wide * tall]
    source, length = transposed.reshape(transposed.size), transposed.shape[1]
    first, weights = _weights(width, size)
    for x in range(size):
        for c in range(3):
            lines = (length * (3 * left + c) + top, 3 * length, first[x], width - 1)
            start = tall * (wide * c + (size - 1 - x if flip else x))
            _weigh(source, lines, weights, x, sums, columns, start, height)
    words, out_words = columns.view(np.uint64), rows.view(np.uint64)
    for c in range(3):
        start = c * wide * tall // 8
        _transpose(words[start:], wide // 8, tall // 8, out_words[start:], wide // 8, 0)
    first, weights = _weights(height, size)
    flat = out.reshape(out.size)
    for c in range(3):
        for y in range(size):
            lines = (c * wide * tall, wide, first[y], height - 1)
            _weigh(rows, lines, weights, y, sums, flat, size * (size * c + y), size)


@_compiled
def _weigh(
    source: Bytes,
    lines: tuple[int, int, int, int],
    weights: Ints,
    row: int,
    sums: Ints,
    out: Bytes,
    start: int,
    n: int,
) -> None:
    """Compute out[start : start + n] = sum_t weights[row, t] line[first + t], rounded to levels.

    lines: (start, stride, first, last): the lines of n bytes in source begin at start + i * stride.
    The taps, an even number of at least 6, are added in few passes, each over as many lines as LLVM
    still vectorizes.
    """
    taps, o, m = weights.shape[1], np.uint64(start), np.uint64(n)
    at, w = _six_lines(lines, 0), _six_weights(weights, row, 0)
    if taps == 6:
        _weigh_6(source, at, w, out, o, m)
        return
    if taps == 8:
        more = (_line(lines, 6), _line(lines, 7))
        _weigh_8(source, at, more, w, (weights[row, 6], weights[row, 7]), out, o, m)
        return
    if taps % 4 == 2:
        done = 4
        _begin_4(source, at, w, sums, m)
    else:
        done = 6
        _begin_6(source, at, w, sums, m)
    while taps - done > 6:
        _add_4(source, _six_lines(lines, done), _six_weights(weights, row, done), sums, m)
        done += 4
    at, w = _six_lines(lines, done), _six_weights(weights, row, done)
    _end_6(source, at, w, sums, out, o, m)


@_compiled
def _line(lines: tuple[int, int, int, int], t: int) -> Any:
    """Return the offset of line first + t, or of the last one beyond it, where weights are 0."""
    start, stride, first, last = lines
    return np.uint64(start + stride * min(first + t, last))


@_compiled
def _six_lines(lines: tuple[int, int, int, int], t: int) -> Any:
    a, b, c = _line(lines, t), _line(lines, t + 1), _line(lines, t + 2)
    return a, b, c, _line(lines, t + 3), _line(lines, t + 4), _line(lines, t + 5)


@_compiled
def _six_weights(weights: Ints, row: int, t: int) -> Any:
    p, q, r = weights[row, t], weights[row, t + 1], weights[row, t + 2]
    return p, q, r, weights[row, t + 3], weights[row, t + 4], weights[row, t + 5]


@_compiled
def _two(p: Any, a: Any, q: Any, b: Any) -> Any:
    """Compute p a + q b from weights p, q and levels a, b."""
    return np.int32(np.int32(p * np.int32(a)) + np.int32(q * np.int32(b)))


@_compiled
def _level_of(total: Any) -> Any:
    return np.uint8(min(max(np.int32(total >> 22), np.int32(0)), np.int32(255)))


@_compiled
def _weigh_6(s: Bytes, at: Any, weights: Any, out: Bytes, o: Any, n: Any) -> None:
    a, b, c, d, e, f = at
    p, q, r, u, v, w = weights
    for i in range(n):
        total = np.int32(_two(p, s[a + i], q, s[b + i]) + _two(r, s[c + i], u, s[d + i]))
        total = np.int32(total + np.int32(_two(v, s[e + i], w, s[f + i]) + _HALF_LEVEL))
        out[o + i] = _level_of(total)


@_compiled
def _weigh_8(
    s: Bytes, at: Any, more: Any, weights: Any, more_weights: Any, out: Bytes, o: Any, n: Any
) -> None:
    a, b, c, d, e, f = at
    g, h = more
    p, q, r, u, v, w = weights
    y, z = more_weights
    for i in range(n):
        total = np.int32(_two(p, s[a + i], q, s[b + i]) + _two(r, s[c + i], u, s[d + i]))
        rest = np.int32(_two(v, s[e + i], w, s[f + i]) + _two(y, s[g + i], z, s[h + i]))
        out[o + i] = _level_of(np.int32(np.int32(total + rest) + _HALF_LEVEL))


@_compiled
def _begin_4(s: Bytes, at: Any, weights: Any, sums: Ints, n: Any) -> None:
    a, b, c, d, _, _ = at
    p, q, r, u, _, _ = weights
    for i in range(n):
        total = np.int32(_two(p, s[a + i], q, s[b + i]) + _two(r, s[c + i], u, s[d + i]))
        sums[i] = np.int32(total + _HALF_LEVEL)


@_compiled
def _begin_6(s: Bytes, at: Any, weights: Any, sums: Ints, n: Any) -> None:
    a, b, c, d, e, f = at
    p, q, r, u, v, w = weights
    for i in range(n):
        total = np.int32(_two(p, s[a + i], q, s[b + i]) + _two(r, s[c + i], u, s[d + i]))
        sums[i] = np.int32(total + np.int32(_two(v, s[e + i], w, s[f + i]) + _HALF_LEVEL))


@_compiled
def _add_4(s: Bytes, at: Any, weights: Any, sums: Ints, n: Any) -> None:
    a, b, c, d, _, _ = at
    p, q, r, u, _, _ = weights
    for i in range(n):
        total = np.int32(_two(p, s[a + i], q, s[b + i]) + _two(r, s[c + i], u, s[d + i]))
        sums[i] = np.int32(sums[i] + total)


@_compiled
def _end_6(s: Bytes, at: Any, weights: Any, sums: Ints, out: Bytes, o: Any, n: Any) -> None:
    a, b, c, d, e, f = at
    p, q, r, u, v, w = weights
    for i in range(n):
        total = np.int32(_two(p, s[a + i], q, s[b + i]) + _two(r, s[c + i], u, s[d + i]))
        total = np.int32(total + np.int32(_two(v, s[e + i], w, s[f + i]) + sums[i]))
        out[o + i] = _level_of(total)


@_compiled
def _transpose(source: Words, down: int, across: int, out: Words, stride: int, start: int) -> None:
    """Transpose bytes [8 down, 8 across], in words of 8 bytes.

    The lines of the result begin at word `start` of out, `stride` words apart. Unsigned offsets
    avoid Numba's check for negative indices.
    """
    line, next_ = np.uint64(across), np.uint64(stride)
    for strip in range(0, down, 8):  # 64 bytes, one cache line
        for x in range(across):
            for y in range(strip, min(strip + 8, down)):
                i = np.uint64(8 * y * across + x)
                a, b = source[i], source[i + line]
                c, d = source[i + _2 * line], source[i + _3 * line]
                i += _4 * line
                e, f = source[i], source[i + line]
                g, h = source[i + _2 * line], source[i + _3 * line]
                a, e = _exchange(a, e, _32, _LOW_32)
                b, f = _exchange(b, f, _32, _LOW_32)
                c, g = _exchange(c, g, _32, _LOW_32)
                d, h = _exchange(d, h, _32, _LOW_32)
                a, c = _exchange(a, c, _16, _LOW_16)
                b, d = _exchange(b, d, _16, _LOW_16)
                e, g = _exchange(e, g, _16, _LOW_16)
                f, h = _exchange(f, h, _16, _LOW_16)
                a, b = _exchange(a, b, _8, _LOW_8)
                c, d = _exchange(c, d, _8, _LOW_8)
                e, f = _exchange(e, f, _8, _LOW_8)
                g, h = _exchange(g, h, _8, _LOW_8)
                i = np.uint64(8 * x * stride + start + y)
                out[i], out[i + next_], out[i + _2 * next_], out[i + _3 * next_] = a, b, c, d
                i += _4 * next_
                out[i], out[i + next_], out[i + _2 * next_], out[i + _3 * next_] = e, f, g, h


@_compiled
def _exchange(a: Any, b: Any, shift: Any, low: Any) -> Any:
    """Swap the high halves of a's parts with the low halves of b's (Warren, Hacker's Delight)."""
    moved = ((a >> shift) ^ b) & low
    return a ^ (moved << shift), b ^ moved


@_compiled
def jitter(operation: int, factor: float, r: Bytes, g: Bytes, b: Bytes) -> None:
    """Apply one of the four color operations, numbered as in CropParams, to three planes."""
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
            luma = _luma(r[i], g[i], b[i])
            r[i] = _blend(luma, np.int32(r[i]), factor)
            g[i] = _blend(luma, np.int32(g[i]), factor)
            b[i] = _blend(luma, np.int32(b[i]), factor)
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
def gray(r: Bytes, g: Bytes, b: Bytes) -> None:
    """Replace three planes by their luma."""
    for i in range(len(r)):
        luma = np.uint8(_luma(r[i], g[i], b[i]))
        r[i] = luma
        g[i] = luma
        b[i] = luma


@_compiled
def _tie(h: Any) -> Any:
    """Return bit h of the table without a lookup, which would prevent vectorizing the loop."""
    low = _bit(_T0, 0, h) | _bit(_T1, 1, h) | _bit(_T2, 2, h) | _bit(_T3, 3, h)
    high = _bit(_T4, 4, h) | _bit(_T5, 5, h) | _bit(_T6, 6, h) | _bit(_T7, 7, h)
    return np.int32(low | high)


@_compiled
def _bit(word: Any, k: int, h: Any) -> Any:
    return np.int32(np.int32(word >> np.int32(h & 31)) & np.int32(np.int32(h >> 5) == k))


@_compiled
def _hue(shift: Any, red: Bytes, green: Bytes, blue: Bytes) -> None:
    """Shift the hue as Pillow does.

    Quotients are fp32: for integers below 2^24 they are exact or at least 1/1530 from an integer.
    """
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
        rising = t if sector & 1 == 0 else q  # value of the channel that is neither v nor p
        red[i] = _pick(sector, np.int32(0), v, p, rising)
        green[i] = _pick(sector, np.int32(2), v, p, rising)
        blue[i] = _pick(sector, np.int32(4), v, p, rising)


@_compiled
def _level(value: Any, divisor: Any) -> Any:
    """Divide and round."""
    return np.int32(np.float32(value) / divisor + np.float32(0.5))


@_compiled
def _pick(sector: Any, own: Any, v: Any, p: Any, between: Any) -> Any:
    """Return a channel's value: v in the two sectors next to its own, p in the two opposite."""
    away = np.int32(sector - own)
    away = np.int32(away + 6) if away < 0 else away
    value = p if away == 2 or away == 3 else between
    return np.uint8(v if away == 0 or away == 5 else value)


@_compiled
def blur(rgb: Bytes, radius: Any, rest: Bytes, sums: Ints) -> None:
    """Apply Pillow's Gaussian blur to [3, size, size]: three box blurs along x, three along y.

    A plane is padded with its edge pixels and blurred as one long line, whose neighbors are 1 or a
    row apart. The padding is rewritten after each blur.
    """
    size = rgb.shape[1]
    taps, near, far = blur_weights(radius)
    edge = taps + 1
    side = size + 2 * edge
    here, there = rest[: side * side], rest[side * side : 2 * side * side]
    top, bottom = edge * side, (edge + size) * side
    for plane in rgb:
        for y in range(size):
            start = (edge + y) * side + edge
            _copy(plane[y], here[start : start + size])
        for _ in range(3):
            for start in range(top, bottom, side):
                for k in range(edge):
                    here[start + k] = here[start + edge]
                    here[start + edge + size + k] = here[start + edge + size - 1]
            _box_blur(here, there, top + edge, bottom - edge, 1, taps, near, far, sums)
            here, there = there, here
        for _ in range(3):
            for k in range(0, top, side):
                _copy(here[top : top + side], here[k : k + side])
                _copy(here[bottom - side : bottom], here[bottom + k : bottom + k + side])
            _box_blur(here, there, top, bottom, side, taps, near, far, sums)
            here, there = there, here
        for y in range(size):
            start = (edge + y) * side + edge
            _copy(here[start : start + size], plane[y])


@_compiled
def blur_weights(radius: Any) -> tuple[int, Any, Any]:
    """Return (r, near, far): 2r + 1 pixels of weight near between two of weight far, in 2^-24."""
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
def _box_blur(
    line: Bytes,
    out: Bytes,
    start: int,
    stop: int,
    step: int,
    taps: int,
    near: Any,
    far: Any,
    sums: Ints,
) -> None:
    """Blur to out[start:stop]: 2 taps + 1 neighbors of weight near, `step` apart, and 2 of far."""
    ends = (taps + 1) * step
    before, after = line[start - ends : stop - ends], line[start + ends : stop + ends]
    here, result = line[start:stop], out[start:stop]
    if taps == 0:
        _box_of_sums(before, here, after, near, far, result)
    elif taps == 1:
        left, right = line[start - step : stop - step], line[start + step : stop + step]
        _box_of_3(before, left, here, right, after, near, far, result)
    else:
        for i in range(0, len(here), len(sums)):
            j = min(i + len(sums), len(here))
            _copy(here[i:j], sums)
            for k in range(step, taps * step + 1, step):
                _add(line[start + i - k : start + j - k], sums)
                _add(line[start + i + k : start + j + k], sums)
            _box_of_sums(before[i:j], sums, after[i:j], near, far, result[i:j])


@_compiled
def _copy(source: Bytes, target: NDArray[Any]) -> None:
    for i in range(len(source)):
        target[i] = source[i]


@_compiled
def _box_of_sums(
    before: Bytes, sums: Bytes | Ints, after: Bytes, near: Any, far: Any, out: Bytes
) -> None:
    for i in range(len(out)):
        ends = np.uint32(np.uint32(before[i]) + np.uint32(after[i]))
        out[i] = _box(np.uint32(sums[i]), ends, near, far)


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
def _add(line: Bytes, sums: Ints) -> None:
    for i in range(len(line)):
        sums[i] = np.int32(sums[i] + np.int32(line[i]))


@_compiled
def _box(inner: Any, ends: Any, near: Any, far: Any) -> Any:
    total = np.uint32(np.uint32(near * inner) + np.uint32(far * ends))
    return np.uint8(np.uint32(total + _HALF_BLUR) >> np.uint32(24))


@_compiled
def write(rgb: Bytes, levels: NDArray[Any], solarize: int, out: NDArray[Any]) -> None:
    """Solarize if asked to, and convert the levels [3, pixels] to output values."""
    for c in range(3):
        table = np.empty(256, levels.dtype)
        for level in range(256):
            table[level] = levels[c, 255 - level if solarize and level >= 128 else level]
        for i in range(rgb.shape[1]):
            out[c, i] = table[rgb[c, i]]

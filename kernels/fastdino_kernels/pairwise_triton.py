"""Triton kernels of the cross-entropy between teacher and student crops; pairwise.py calls them.

With z = (s - max s)/student_temp and u = (t - c - max(t - c))/teacher_temp, both divided by ln 2
so that exp2 can be used:

    forward   reads every logit once. A program processes one chunk of the prototypes for a few
              images. Relative to the maxima of its chunk, it writes each row's maximum and sum of
              exp2, the cross terms x_qv = sum_k exp2(u_qk) z_vk, and the teacher's column sum.
    finish    merges the chunks of a row, as in an online softmax, and sums up.
    backward  reads every logit once more and writes g * (mass * softmax(z_v) - sum_q P_q).

Bytes at N = (S + T)*B*K logits of w bytes: forward N*w, backward N*w + S*B*K*w. The intermediate
(2T + (2 + T)*S)*B fp32 values per chunk are 1.4 % of the forward's bytes at S = 10, T = 2, bf16.

No float is added atomically, so the same input gives the same bits. The maximum is subtracted
before scaling, and cross terms are relative to it, so logits of 1e4 and more lose no digits to
cancellation.

Legend: S crops of the student (index v), T crops of the teacher (q), B images (b), K prototypes,
chunk: BLOCK prototypes, group: the images of one program of the forward pass.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import device_guard
from .kernel_launch import alignment, launch
from .pairwise_arguments import Crops, PairwiseOptions

# A program is a single warp: a reduction needs no shared memory or barrier. Its 128 registers per
# thread (tests hold them) let an SM of an H100 run 16 programs, so that all of them are one wave.
FORWARD_BLOCK, FORWARD_WARPS = 512, 1
# One load of 16 bytes per thread and row: 1024 prototypes of half precision, 512 of fp32.
BACKWARD_BYTES, BACKWARD_WARPS = 2048, 4
# Each group of images writes its column sums [K], which are added later. So use only as many groups
# as keep a GPU busy: one wave of an H100, and at most 4 MB of column sums.
FORWARD_PROGRAMS, MAX_GROUPS = 2048, 128
# With one crop of each, a thread has 96 registers, and an SM of an H100 runs 20 programs.
SINGLE_CROP_PROGRAMS = 2560
# Without column sums, as many groups as a launch allows in its second dimension.
MAX_ROWS_OF_PROGRAMS = 1 << 15
FINISH_BLOCK, FINISH_WARPS = 1024, 4
# Groups and columns that one program of the finish adds up at a time.
SUM_GROUPS, SUM_COLUMNS = 16, 64

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LANES = tl.constexpr(32)


@triton.jit
def _log2_scale(temp, IS_TENSOR: tl.constexpr):
    """Return 1/(temp ln 2), which turns a logit into an exponent of 2."""
    if IS_TENSOR:
        temp = tl.load(temp).to(tl.float32)
    return LOG2_E / temp


@triton.jit
def _load(row, first, prototypes, EVEN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Load [BLOCK] elements of a row as fp32, 0 beyond the last prototype.

    ALIGNED: the row's address and bytes are multiples of 16, so accesses are 128 bits wide.
    """
    row, left = _row_from(row, first, prototypes, ALIGNED)
    i = tl.arange(0, BLOCK)
    if EVEN:
        x = tl.load(row + i)
    else:
        x = tl.load(row + i, mask=i < left, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(row, x, first, prototypes, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    """Store what _load loads, rounded once."""
    row, left = _row_from(row, first, prototypes, ALIGNED)
    i = tl.arange(0, x.shape[0])
    x = x.to(row.dtype.element_ty)
    if EVEN:
        tl.store(row + i, x)
    else:
        tl.store(row + i, x, mask=i < left)


@triton.jit
def _row_from(row, first, prototypes, ALIGNED: tl.constexpr):
    """Return the address of the prototype `first` and the number of those from there on."""
    row += first
    left = prototypes - first
    if ALIGNED:
        # The compiler must know that both are multiples of a vector's elements.
        VECTOR: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
        row = tl.multiple_of(row, 16)
        left = left // VECTOR * VECTOR
    return row, left


@triton.jit
def _load_chunk(
    row, first, prototypes, wanted,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load a chunk as stored, 0 beyond the last prototype or if not wanted; see _quarters.

    Returns a tuple: two halves of the chunk as pairs of prototypes in int32 if they are ALIGNED and
    of half precision, two halves if they are ALIGNED and fp32, four quarters otherwise.
    """
    row, left = _row_from(row, first, prototypes, ALIGNED)
    if ALIGNED and row.dtype.element_ty.primitive_bitwidth == 16:
        row = row.to(tl.pointer_type(tl.int32))
        i = tl.arange(0, BLOCK // 4)
        left = left // 8 * 4
        chunk = (
            _load_part(row, i, left, wanted, EVEN),
            _load_part(row + BLOCK // 4, i, left - BLOCK // 4, wanted, EVEN),
        )
    elif ALIGNED:
        i = tl.arange(0, BLOCK // 2)
        chunk = (
            _load_part(row, i, left, wanted, EVEN),
            _load_part(row + BLOCK // 2, i, left - BLOCK // 2, wanted, EVEN),
        )
    else:
        i = 2 * tl.arange(0, BLOCK // 4)
        chunk = (
            _load_part(row, i, left, wanted, EVEN),
            _load_part(row, i + 1, left, wanted, EVEN),
            _load_part(row + BLOCK // 2, i, left - BLOCK // 2, wanted, EVEN),
            _load_part(row + BLOCK // 2, i + 1, left - BLOCK // 2, wanted, EVEN),
        )
    return chunk


@triton.jit
def _load_part(row, i, left, wanted, EVEN: tl.constexpr):
    if EVEN:
        x = tl.load(row + i, mask=wanted, other=0)
    else:
        x = tl.load(row + i, mask=(i < left) & wanted, other=0)
    return x


@triton.jit
def _quarters(chunk, DTYPE: tl.constexpr):
    """Return a chunk's even and odd prototypes, of its first and second half, as fp32 (a tuple).

    A thread then holds neighbours of a 16-byte vector in all four, and unpacking a pair of bf16 is
    one instruction for each.
    """
    if len(chunk) == 4:
        quarters = (
            chunk[0].to(tl.float32), chunk[1].to(tl.float32),
            chunk[2].to(tl.float32), chunk[3].to(tl.float32),
        )  # fmt: skip
    else:
        even, odd = _even_and_odd(chunk[0], DTYPE)
        even2, odd2 = _even_and_odd(chunk[1], DTYPE)
        quarters = (even, odd, even2, odd2)
    return quarters


@triton.jit
def _even_and_odd(half, DTYPE: tl.constexpr):
    if half.dtype != tl.int32:
        even, odd = tl.split(tl.reshape(half.to(tl.float32), [half.shape[0] // 2, 2]))
    elif DTYPE == tl.bfloat16:
        even = (half << 16).to(tl.float32, bitcast=True)
        odd = (half & -65536).to(tl.float32, bitcast=True)
    else:
        even = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (half >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _load_columns(
    row, first, prototypes, EVEN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Load the quarters of a chunk of fp32 values [K]."""
    a = _load(row, first, prototypes, EVEN, ALIGNED, BLOCK // 2)
    b = _load(row, first + BLOCK // 2, prototypes, EVEN, ALIGNED, BLOCK // 2)
    return _quarters((a, b), tl.float32)


@triton.jit
def _store_columns(row, x, first, prototypes, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    """Store the quarters of a chunk as fp32 values [K]."""
    HALF: tl.constexpr = 2 * x[0].shape[0]
    a, b = tl.reshape(tl.join(x[0], x[1]), [HALF]), tl.reshape(tl.join(x[2], x[3]), [HALF])
    _store(row, a, first, prototypes, EVEN, ALIGNED)
    _store(row, b, first + HALF, prototypes, EVEN, ALIGNED)


@triton.jit
def _per_lane(x, VECTOR: tl.constexpr):
    """Arrange a quarter by the lane that holds an element, if it holds VECTOR neighbours."""
    return tl.reshape(x, [x.shape[0] // (LANES * VECTOR), LANES, VECTOR])


@triton.jit
def _lane_sums(x, VECTOR: tl.constexpr):
    """Return the sums [LANES] of a quarter's elements in each lane."""
    return tl.sum(tl.sum(_per_lane(x, VECTOR), 2), 0)


@triton.jit
def _maximum(x, masks, EVEN: tl.constexpr, VECTOR: tl.constexpr):
    """Return the largest logit of a chunk's quarters, 0 if all are -inf."""
    if not EVEN:
        x = (
            tl.where(masks[0], x[0], float("-inf")), tl.where(masks[1], x[1], float("-inf")),
            tl.where(masks[2], x[2], float("-inf")), tl.where(masks[3], x[3], float("-inf")),
        )  # fmt: skip
    m = tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3]))
    m = tl.max(tl.max(_per_lane(m, VECTOR), 2), 0)
    # A warp finds the maximum of integers in one instruction. These have the order of the floats,
    # and the mapping is its own inverse.
    bits = m.to(tl.int32, bitcast=True)
    bits = tl.max(bits ^ ((bits >> 31) & 0x7FFFFFFF), 0)
    m = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _exp2(x, mask, EVEN: tl.constexpr):
    """Return exp2(x), 0 beyond the last prototype."""
    if not EVEN:
        x = tl.where(mask, x, float("-inf"))
    return tl.exp2(x)


@triton.jit
def _sum_of_four(values, first: tl.constexpr, lane):
    """Return [LANES] with the sum over lanes of one of four [LANES]: see _slot.

    Two values at a time change places between lanes, so that the sums of all four take little more
    than those of one.
    """
    x = _exchange(values[first], values[first + 1], lane, 16)
    y = _exchange(values[first + 2], values[first + 3], lane, 16)
    x = _exchange(x, y, lane, 8)
    x += tl.gather(x, lane ^ 4, 0)
    x += tl.gather(x, lane ^ 2, 0)
    x += tl.gather(x, lane ^ 1, 0)
    return x


@triton.jit
def _exchange(a, b, lane, BIT: tl.constexpr):
    """Add the partner's a to a in lanes whose BIT is 0, and the partner's b to b in the others."""
    upper = (lane & BIT) != 0
    kept, sent = tl.where(upper, b, a), tl.where(upper, a, b)
    return kept + tl.gather(sent, lane ^ BIT, 0)


@triton.jit
def _slot(lane):
    """Return which of the four sums of _sum_of_four a lane has."""
    return ((lane >> 3) & 1) * 2 + (lane >> 4)


@triton.jit(do_not_specialize=["batch"])
def pairwise_forward_kernel(
    student, teacher, center, partials, column_sums, center_used, arrived,
    student_temp, teacher_temp, batch, prototypes,
    student_stride_v, student_stride_b, teacher_stride_q, teacher_stride_b,
    S: tl.constexpr, T: tl.constexpr, CENTERED: tl.constexpr,
    STUDENT_TEMP_TENSOR: tl.constexpr, TEACHER_TEMP_TENSOR: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Compute one chunk of prototypes for every groups-th image; grid (chunks, groups).

    partials: [B, chunks, 2T + (2 + T)*S]: maximum and sum of each teacher crop, then maximum, sum
    and T cross terms of each student crop. CENTERED: the teacher has logits; otherwise
    probabilities, whose "maximum" is 0, whose sum is their mass, and which need no center and no
    column sum. VECTOR: neighbours of a quarter in one thread, which only decides the speed.
    """
    chunk, groups = tl.program_id(0), tl.num_programs(1)
    first = chunk * BLOCK
    lane = tl.arange(0, LANES)
    slot = _slot(lane)
    writes = (lane & 7) == 0  # one of the lanes with the same slot
    k = first + 2 * tl.arange(0, BLOCK // 4)
    masks = (
        k < prototypes, k + 1 < prototypes,
        k + BLOCK // 2 < prototypes, k + BLOCK // 2 + 1 < prototypes,
    )  # fmt: skip
    student_scale = _log2_scale(student_temp, STUDENT_TEMP_TENSOR)
    if CENTERED:
        teacher_scale = _log2_scale(teacher_temp, TEACHER_TEMP_TENSOR)
        c = _load_columns(center, first, prototypes, EVEN, ALIGNED, BLOCK)
        zero = tl.zeros([BLOCK // 4], tl.float32)
        column_sum = (zero, zero, zero, zero)
        if tl.program_id(1) == 0:
            # The caller may update the center before the backward pass, which needs the old one.
            _store_columns(center_used, c, first, prototypes, EVEN, ALIGNED)
            if chunk == 0:
                tl.store(arrived, 0)

    VALUES: tl.constexpr = 2 * T + (2 + T) * S
    b = tl.program_id(1)
    while b < batch:
        out = partials + (b.to(tl.int64) * tl.num_programs(0) + chunk) * VALUES
        row = teacher + b.to(tl.int64) * teacher_stride_b
        rows = ()
        for _ in tl.static_range(T):
            rows = rows + (_load_chunk(row, first, prototypes, True, EVEN, ALIGNED, BLOCK),)
            row += teacher_stride_q
        row = student + b.to(tl.int64) * student_stride_b
        ahead = _load_chunk(row, first, prototypes, True, EVEN, ALIGNED, BLOCK)
        probs = ()
        for q in tl.static_range(T):
            t = _quarters(rows[q], teacher.dtype.element_ty)
            if CENTERED:
                column_sum = (
                    column_sum[0] + t[0], column_sum[1] + t[1],
                    column_sum[2] + t[2], column_sum[3] + t[3],
                )  # fmt: skip
                t = (t[0] - c[0], t[1] - c[1], t[2] - c[2], t[3] - c[3])
                top = _maximum(t, masks, EVEN, VECTOR)
                p = ()
                for j in tl.static_range(4):
                    p = p + (_exp2((t[j] - top) * teacher_scale, masks[j], EVEN),)
                tl.store(out + 2 * q, top)
            else:
                p = t
            tl.store(out + 2 * q + 1, tl.sum((p[0] + p[1]) + (p[2] + p[3]), 0))
            probs = probs + (p,)

        out += 2 * T
        # A loop that is not unrolled: the compiler would move the load of an unrolled one to where
        # its result is needed.
        for v in tl.range(S, loop_unroll_factor=1):
            s = _quarters(ahead, student.dtype.element_ty)
            row += student_stride_v
            ahead = _load_chunk(row, first, prototypes, v + 1 < S, EVEN, ALIGNED, BLOCK)
            m = _maximum(s, masks, EVEN, VECTOR)
            z = ()
            for j in tl.static_range(4):
                z = z + ((s[j] - m) * student_scale,)
            e = _exp2(z[0], masks[0], EVEN)
            for j in tl.static_range(1, 4):
                e += _exp2(z[j], masks[j], EVEN)
            values = (tl.where(lane == 0, m, 0.0), _lane_sums(e, VECTOR))
            for q in tl.static_range(T):
                cross = probs[q][0] * z[0]
                for j in tl.static_range(1, 4):
                    cross += probs[q][j] * z[j]
                values = values + (_lane_sums(cross, VECTOR),)
            nothing = tl.zeros([LANES], tl.float32)
            values = values + (nothing, nothing, nothing)
            for i in tl.static_range(0, 2 + T, 4):
                sums = _sum_of_four(values, i, lane)
                tl.store(out + i + slot, sums, mask=writes & (i + slot < 2 + T))
            out += 2 + T
        b += groups

    if CENTERED:
        sums = column_sums + tl.program_id(1).to(tl.int64) * prototypes
        _store_columns(sums, column_sum, first, prototypes, EVEN, ALIGNED)


@triton.jit
def _merged(chunks, scale, mask):
    """Return (m_c - M) * scale and the sums of exp2 of a row's chunks c; M and L of the whole row.

    chunks: addresses of their maxima, each followed by the sum.
    """
    total = tl.load(chunks + 1, mask=mask, other=0.0)
    m = tl.load(chunks, mask=mask, other=float("-inf"))
    # A chunk of only -inf has sum 0: it must not set the maximum.
    m = tl.where(total == 0.0, float("-inf"), m)
    M = tl.max(m, 0)
    below = (m - M) * scale
    return below, total, M, tl.sum(tl.where(mask, tl.exp2(below) * total, 0.0), 0)


@triton.jit(do_not_specialize=["batch", "groups", "weights_stride_v", "weights_stride_b"])
def pairwise_finish_kernel(
    partials, column_sums, weights, rows, stats, teacher_sum, loss, arrived,
    student_temp, teacher_temp, divisor, batch, prototypes, chunks, groups,
    weights_stride_v, weights_stride_b,
    S: tl.constexpr, T: tl.constexpr, CENTERED: tl.constexpr, STUDENT_TEMP_TENSOR: tl.constexpr,
    TEACHER_TEMP_TENSOR: tl.constexpr, DIVISOR_TENSOR: tl.constexpr, WEIGHTED: tl.constexpr,
    IGNORE_DIAGONAL: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, SUM_GROUPS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute rows[v, b] and the row's stats in program (v, b), column sums in those after them.

    stats: [2, S + T, B], students first: largest logit and sum of exp2 (teacher probabilities: 0
    and their mass). ROWS: the result is the rows; otherwise, the program that arrives last adds
    them up, in their order, for the loss.
    """
    program = tl.program_id(0)
    if program >= S * batch:
        k = (program - S * batch) * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
        inside = k < prototypes
        total = tl.zeros([SUM_GROUPS, SUM_COLUMNS], tl.float32)
        group = tl.arange(0, SUM_GROUPS)
        while tl.min(group, 0) < groups:
            part = column_sums + group.to(tl.int64)[:, None] * prototypes + k
            total += tl.load(part, mask=(group < groups)[:, None] & inside, other=0.0)
            group += SUM_GROUPS
        tl.store(teacher_sum + k, tl.sum(total, 0), mask=inside)
        return

    v = program // batch
    b = program % batch
    c = tl.arange(0, CHUNKS)
    mask = c < chunks
    VALUES: tl.constexpr = 2 * T + (2 + T) * S
    teachers = partials + (b.to(tl.int64) * chunks + c) * VALUES
    students = teachers + 2 * T + v * (2 + T)
    scale = _log2_scale(student_temp, STUDENT_TEMP_TENSOR)
    below, _, M, L = _merged(students, scale, mask)
    tl.store(stats + v * batch + b, M)
    tl.store(stats + (S + T + v) * batch + b, L)
    below = tl.where(mask, below, 0.0)
    value = 0.0
    for q in tl.static_range(T):
        cross = tl.load(students + 2 + q, mask=mask, other=0.0)
        if CENTERED:
            scale = _log2_scale(teacher_temp, TEACHER_TEMP_TENSOR)
            depth, total, M, mass = _merged(teachers + 2 * q, scale, mask)
            weight = tl.where(mask, tl.exp2(depth), 0.0)
            cross_entropy = tl.log2(L) - tl.sum(weight * (cross + total * below), 0) / mass
        else:
            M = 0.0
            total = tl.load(teachers + 2 * q + 1, mask=mask, other=0.0)
            mass = tl.sum(total, 0)
            cross_entropy = mass * tl.log2(L) - tl.sum(cross + total * below, 0)
        if v == 0:
            tl.store(stats + (S + q) * batch + b, M)
            tl.store(stats + (S + T + S + q) * batch + b, mass)
        if IGNORE_DIAGONAL:
            value += tl.where(v == q, 0.0, cross_entropy)
        else:
            value += cross_entropy
    value *= LN_2
    if WEIGHTED:
        value *= tl.load(weights + v * weights_stride_v + b * weights_stride_b)
    tl.store(rows + v * batch + b, value)

    if not ROWS:
        if DIVISOR_TENSOR:
            divisor = tl.load(divisor)
        # A thread stores its row before it increments the counter, so the last one sees all rows
        # (reading past the L1 cache).
        before = tl.atomic_add(arrived, 1)
        if before == S * batch - 1:
            everything = tl.zeros([BLOCK], tl.float32)
            i = tl.arange(0, BLOCK)
            while tl.min(i, 0) < S * batch:
                inside = i < S * batch
                everything += tl.load(rows + i, mask=inside, other=0.0, cache_modifier=".cg")
                i += BLOCK
            tl.store(loss, tl.sum(everything, 0) / divisor)


@triton.jit(do_not_specialize=[
    "batch", "grad_rows_stride_v", "grad_rows_stride_b", "weights_stride_v", "weights_stride_b",
])  # fmt: skip
def pairwise_backward_kernel(
    grad_rows, weights, student, teacher, center, stats, grad,
    student_temp, teacher_temp, scale, batch, prototypes,
    grad_rows_stride_v, grad_rows_stride_b, weights_stride_v, weights_stride_b,
    student_stride_v, student_stride_b, teacher_stride_q, teacher_stride_b,
    grad_stride_v, grad_stride_b,
    S: tl.constexpr, T: tl.constexpr, CENTERED: tl.constexpr, IGNORE_DIAGONAL: tl.constexpr,
    STUDENT_TEMP_TENSOR: tl.constexpr, TEACHER_TEMP_TENSOR: tl.constexpr,
    DIVISOR_TENSOR: tl.constexpr, WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one chunk of prototypes for one image; grid (chunks, rows, rows of rows).

    The last image comes first: the forward pass read it last, so part of it may still be in the L2
    cache. `grad` may be `student` itself: each element is read before the same thread writes it.
    scale: 1/divisor, or the divisor if it is a tensor.
    """
    b = batch - 1 - (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1))
    if b < 0:
        return
    first = tl.program_id(0) * BLOCK
    student_scale = _log2_scale(student_temp, STUDENT_TEMP_TENSOR)
    if DIVISOR_TENSOR:
        scale = 1.0 / tl.load(scale)
    if CENTERED:
        teacher_scale = _log2_scale(teacher_temp, TEACHER_TEMP_TENSOR)
        c = _load(center, first, prototypes, EVEN, ALIGNED, BLOCK)
    probs = ()
    masses = ()
    sums = stats + (S + T) * batch + b
    base = teacher + b.to(tl.int64) * teacher_stride_b
    for q in tl.static_range(T):
        p = _load(base, first, prototypes, EVEN, ALIGNED, BLOCK)
        mass = tl.load(sums + (S + q) * batch)
        if CENTERED:
            maximum = tl.load(stats + (S + q) * batch + b)
            p = tl.exp2((p - c - maximum) * teacher_scale) * (1.0 / mass)
            mass = 1.0
        probs = probs + (p,)
        masses = masses + (mass,)
        base += teacher_stride_q
    base = student + b.to(tl.int64) * student_stride_b
    out = grad + b.to(tl.int64) * grad_stride_b
    for v in tl.static_range(S):
        target = tl.zeros([BLOCK], tl.float32)
        target_mass = 0.0
        for q in tl.static_range(T):
            if not (IGNORE_DIAGONAL and q == v):
                target += probs[q]
                target_mass += masses[q]
        s = _load(base, first, prototypes, EVEN, ALIGNED, BLOCK)
        z = (s - tl.load(stats + v * batch + b)) * student_scale
        share = target_mass / tl.load(sums + v * batch)
        g = tl.load(grad_rows + v * grad_rows_stride_v + b * grad_rows_stride_b)
        # d rows_v / d s_v = 1/student_temp * (mass * softmax(z_v) - sum_q P_q)
        g = g.to(tl.float32) * scale * (student_scale * LN_2)
        if WEIGHTED:
            g *= tl.load(weights + v * weights_stride_v + b * weights_stride_b)
        value = g * (share * tl.exp2(z) - target)  # rounded once: the scale is included
        _store(out, value, first, prototypes, EVEN, ALIGNED)
        base += student_stride_v
        out += grad_stride_v


def forward(crops: Crops, options: PairwiseOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of the operator pairwise_forward, by two launches."""
    student, teacher, center = map(_unit_stride, crops[:3])
    S, T, B, K = crops.sizes()
    centered = center is not None
    block = FORWARD_BLOCK
    chunks = _ceil_div(K, block)
    aligned = _are_aligned(student, teacher, center)
    groups = forward_groups(crops) if centered else min(B, MAX_ROWS_OF_PROGRAMS)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    rows, stats, loss = empty(S, B), empty(2, S + T, B), empty()
    teacher_sum, center_used = (empty(K), empty(K)) if centered else (empty(0), empty(0))
    partials = empty(B, chunks, 2 * T + (2 + T) * S)
    column_sums = empty(groups, K) if centered and groups > 1 else teacher_sum
    arrived = torch.empty((), dtype=torch.int32, device=student.device)
    sum_programs = _ceil_div(K, SUM_COLUMNS) if groups > 1 and centered else 0
    temps, divisor = (options.student_temp, options.teacher_temp), _divisor(crops, options)
    flags = {"S": S, "T": T, "CENTERED": centered, **_temperature_flags(options)}
    signature = _signature(student, teacher, center, crops.weights, *temps, divisor)
    with device_guard(student):
        launch(
            pairwise_forward_kernel, (chunks, groups, 1), signature,
            (student, teacher, center, partials, column_sums, center_used, arrived, *temps, B, K,
             *student.stride()[:2], *teacher.stride()[:2]),
            {**flags, "EVEN": K % block == 0, "ALIGNED": aligned, "BLOCK": block,
             "VECTOR": 8 // student.element_size() if aligned else 1},
            num_warps=FORWARD_WARPS,
        )  # fmt: skip
        launch(
            pairwise_finish_kernel, (S * B + sum_programs, 1, 1), signature,
            (partials, column_sums, crops.weights, rows, stats, teacher_sum, loss, arrived, *temps,
             divisor, B, K, chunks, groups, *_strides(crops.weights)),
            {**flags, **_row_flags(crops, divisor), "IGNORE_DIAGONAL": options.ignore_diagonal,
             "ROWS": crops.returns_rows(options), "CHUNKS": _power_of_2(chunks),
             "BLOCK": FINISH_BLOCK, "SUM_GROUPS": SUM_GROUPS, "SUM_COLUMNS": SUM_COLUMNS},
            num_warps=FINISH_WARPS,
        )  # fmt: skip
    return (rows if crops.returns_rows(options) else loss), teacher_sum, center_used, stats


def backward(
    grad: Tensor,
    grad_result: Tensor,
    crops: Crops,
    stats: Tensor,
    options: PairwiseOptions,
) -> None:
    """Write the result of the operator pairwise_backward to `grad`, which may be the student."""
    target = grad
    if grad.stride(-1) != 1:  # in place over logits that had to be copied: rare
        grad = torch.empty(crops.student.shape, dtype=grad.dtype, device=grad.device)
    student, teacher, center = map(_unit_stride, crops[:3])
    S, T, B, K = crops.sizes()
    block = min(BACKWARD_BYTES // student.element_size(), _power_of_2(K))
    rows = min(B, MAX_ROWS_OF_PROGRAMS)
    strides = grad_result.stride() if crops.returns_rows(options) else (0, 0)
    temps, divisor = (options.student_temp, options.teacher_temp), _divisor(crops, options)
    scale = divisor if isinstance(divisor, Tensor) else 1.0 / divisor
    tensors = (grad_result, crops.weights, student, teacher, center, stats, grad)
    signature = _signature(*tensors, *temps, divisor)
    with device_guard(student):
        launch(
            pairwise_backward_kernel, (_ceil_div(K, block), rows, _ceil_div(B, rows)), signature,
            (*tensors, *temps, scale, B, K, *strides, *_strides(crops.weights),
             *student.stride()[:2], *teacher.stride()[:2], *grad.stride()[:2]),
            {"S": S, "T": T, "CENTERED": center is not None,
             "IGNORE_DIAGONAL": options.ignore_diagonal, **_temperature_flags(options),
             **_row_flags(crops, divisor), "EVEN": K % block == 0,
             "ALIGNED": _are_aligned(student, teacher, center, grad), "BLOCK": block},
            num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    if grad is not target:
        target.copy_(grad)


def forward_groups(crops: Crops) -> int:
    """Return the number of groups of images whose column sums the forward pass writes."""
    S, T, B, K = crops.sizes()
    programs = SINGLE_CROP_PROGRAMS if S == T == 1 else FORWARD_PROGRAMS
    return min(B, MAX_GROUPS, max(1, programs // _ceil_div(K, FORWARD_BLOCK)))


def _signature(*tensors: Tensor | float | None) -> Hashable:
    """Return what the specialisation of the kernels depends on, besides their constants."""
    layouts = [
        (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else type(x) for x in tensors
    ]
    return (*layouts, *alignment(*tensors))


def _temperature_flags(options: PairwiseOptions) -> dict[str, bool]:
    return {
        "STUDENT_TEMP_TENSOR": isinstance(options.student_temp, Tensor),
        "TEACHER_TEMP_TENSOR": isinstance(options.teacher_temp, Tensor),
    }


def _divisor(crops: Crops, options: PairwiseOptions) -> float | Tensor:
    divisor = crops.divisor(options)
    return divisor if isinstance(divisor, Tensor) else float(divisor)


def _row_flags(crops: Crops, divisor: float | Tensor) -> dict[str, bool]:
    return {
        "DIVISOR_TENSOR": isinstance(divisor, Tensor),
        "WEIGHTED": crops.weights is not None,
    }


def _strides(weights: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if weights is None else weights.stride()


def _are_aligned(*tensors: Tensor | None) -> bool:
    """Return True if all rows [K] start and end at multiples of 16 bytes."""
    return all(
        tensor is None
        or (
            tensor.data_ptr() % 16 == 0
            and tensor.shape[-1] * tensor.element_size() % 16 == 0
            and all(step * tensor.element_size() % 16 == 0 for step in tensor.stride()[:-1])
        )
        for tensor in tensors
    )


def _ceil_div(a: int, b: int) -> int:  # triton.cdiv costs microseconds per call
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def _unit_stride(tensor: Any) -> Any:
    """Return a tensor whose last dimension is contiguous; None unchanged."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()

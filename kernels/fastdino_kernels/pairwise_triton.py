"""Triton kernels of the cross-entropy between teacher and student crops; pairwise.py calls them.

With z = (s - max s)/student_temp and u = (t - c - max(t - c))/teacher_temp, both divided by ln 2
so that exp2 can be used:

    forward   reads every logit once. A program processes one chunk of the prototypes for a few
              images. Relative to the maxima of its chunk, it writes each row's maximum and sum of
              exp2, the cross terms x_qv = sum_k exp2(u_qk) z_vk, and the teacher's column sum.
    finish    merges the chunks of a row, as in an online softmax, and sums up.
    backward  reads every logit once more and writes g * (mass * softmax(z_v) - sum_q P_q).

Bytes at N = (S + T)*B*K logits of w bytes: forward N*w, backward N*w + S*B*K*w. The intermediate
(2T + 2S + T*S)*B fp32 values per chunk are 1.4 % of the forward's bytes at S = 10, T = 2, bf16.

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
from .pairwise_arguments import Crops, PairwiseOptions, pair_count

# A program is a single warp: a reduction is then five shuffles, with no shared memory or barrier.
FORWARD_BLOCK, FORWARD_WARPS = 512, 1
# One load of 16 bytes per thread and row: 1024 prototypes of half precision, 512 of fp32.
BACKWARD_BYTES, BACKWARD_WARPS = 2048, 4
# Each group of images writes its column sums [K], which are added later. So use only as many groups
# as keep a GPU busy: one wave of an H100, and at most 4 MB of column sums.
FORWARD_PROGRAMS, MAX_GROUPS = 2048, 128
# Without column sums, as many groups as a launch allows in its second dimension.
MAX_ROWS_OF_PROGRAMS = 1 << 15
FINISH_BLOCK, FINISH_WARPS = 1024, 4
# Groups and columns that one program of the finish adds up at a time.
SUM_GROUPS, SUM_COLUMNS = 16, 64

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log2_scale(temp, IS_TENSOR: tl.constexpr):
    """Return 1/(temp ln 2), which turns a logit into an exponent of 2."""
    if IS_TENSOR:
        temp = tl.load(temp).to(tl.float32)
    return LOG2_E / temp


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    """Load as fp32, 0 beyond the last prototype; EVEN loads are unmasked and 128 bits wide."""
    if EVEN:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _below_maximum(x, scale, mask, EVEN: tl.constexpr):
    """Return (x - m) * scale and m, the largest logit of the chunk, or 0 if all are -inf."""
    if EVEN:
        m = tl.max(x, 0)
    else:
        m = tl.max(tl.where(mask, x, float("-inf")), 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    return (x - m) * scale, m


@triton.jit
def _exp2_and_sum(x, mask, EVEN: tl.constexpr):
    """Return exp2(x), 0 beyond the last prototype, and its sum."""
    e = tl.exp2(x)
    if not EVEN:
        e = tl.where(mask, e, 0.0)
    return e, tl.sum(e, 0)


@triton.jit(do_not_specialize=["batch"])
def pairwise_forward_kernel(
    student, teacher, center, partials, column_sums, center_used, arrived,
    student_temp, teacher_temp, batch, prototypes,
    student_stride_v, student_stride_b, teacher_stride_q, teacher_stride_b,
    S: tl.constexpr, T: tl.constexpr, CENTERED: tl.constexpr,
    STUDENT_TEMP_TENSOR: tl.constexpr, TEACHER_TEMP_TENSOR: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one chunk of prototypes for every groups-th image; grid (chunks, groups).

    partials: [2T + 2S + T*S, B, chunks]: teacher maxima, teacher sums, student maxima, student
    sums, cross terms. CENTERED: the teacher has logits; otherwise probabilities, whose "maximum"
    is 0, whose sum is their mass, and which need no center and no column sum.
    """
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    k = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = k < prototypes
    student_scale = _log2_scale(student_temp, STUDENT_TEMP_TENSOR)
    if CENTERED:
        teacher_scale = _log2_scale(teacher_temp, TEACHER_TEMP_TENSOR)
        c = _load(center + k, mask, EVEN)
        column_sum = tl.zeros([BLOCK], tl.float32)

    b = tl.program_id(1)
    while b < batch:
        out = partials + b.to(tl.int64) * chunks + chunk
        row = batch.to(tl.int64) * chunks
        # Each row is loaded before the results of the previous one are stored: the compiler, which
        # cannot rule out that they overlap, would not move the load ahead of the store.
        base = teacher + b.to(tl.int64) * teacher_stride_b
        ahead = _load(base + k, mask, EVEN)
        probs = ()
        for q in tl.static_range(T):
            t = ahead
            if q + 1 < T:
                base += teacher_stride_q
            else:
                base = student + b.to(tl.int64) * student_stride_b
            ahead = _load(base + k, mask, EVEN)
            if CENTERED:
                column_sum += t
                u, m = _below_maximum(t - c, teacher_scale, mask, EVEN)
                p, total = _exp2_and_sum(u, mask, EVEN)
                tl.store(out + q * row, m)
            else:
                p, total = t, tl.sum(t, 0)
            tl.store(out + (T + q) * row, total)
            probs = probs + (p,)
        for v in tl.static_range(S):
            z, m = _below_maximum(ahead, student_scale, mask, EVEN)
            if v + 1 < S:
                base += student_stride_v
                ahead = _load(base + k, mask, EVEN)
            _, total = _exp2_and_sum(z, mask, EVEN)
            tl.store(out + (2 * T + v) * row, m)
            tl.store(out + (2 * T + S + v) * row, total)
            for q in tl.static_range(T):
                cross = tl.sum(probs[q] * z, 0)
                tl.store(out + (2 * T + 2 * S + q * S + v) * row, cross)
        b += tl.num_programs(1)

    if CENTERED:
        tl.store(column_sums + tl.program_id(1).to(tl.int64) * prototypes + k, column_sum, mask)
        if tl.program_id(1) == 0:
            # The caller may update the center before the backward pass, which needs the old one.
            tl.store(center_used + k, c, mask)
            if chunk == 0:
                tl.store(arrived, 0)


@triton.jit
def _merged(maxima, sums, scale, c, mask):
    """Return (m_c - M) * scale and sums of exp2 of a row's chunks c; M and L of the whole row."""
    total = tl.load(sums + c, mask=mask, other=0.0)
    m = tl.load(maxima + c, mask=mask, other=float("-inf"))
    # A chunk of only -inf has sum 0: it must not set the maximum.
    m = tl.where(total == 0.0, float("-inf"), m)
    M = tl.max(m, 0)
    below = (m - M) * scale
    return below, total, M, tl.sum(tl.where(mask, tl.exp2(below) * total, 0.0), 0)


@triton.jit(do_not_specialize=["batch", "groups"])
def pairwise_finish_kernel(
    partials, column_sums, rows, stats, teacher_sum, loss, arrived,
    student_temp, teacher_temp, batch, prototypes, chunks, groups, pairs,
    S: tl.constexpr, T: tl.constexpr, CENTERED: tl.constexpr, STUDENT_TEMP_TENSOR: tl.constexpr,
    TEACHER_TEMP_TENSOR: tl.constexpr, IGNORE_DIAGONAL: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, SUM_GROUPS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute rows[v, b] and the row's stats in program (v, b), column sums in those after them.

    stats: [2, S + T, B], students first: largest logit and sum of exp2 (teacher probabilities: 0
    and their mass). The program that arrives last adds up the rows, in their order, for the loss.
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
    base = partials + b.to(tl.int64) * chunks
    row = batch.to(tl.int64) * chunks
    scale = _log2_scale(student_temp, STUDENT_TEMP_TENSOR)
    below, _, M, L = _merged(base + (2 * T + v) * row, base + (2 * T + S + v) * row, scale, c, mask)
    tl.store(stats + v * batch + b, M)
    tl.store(stats + (S + T + v) * batch + b, L)
    below = tl.where(mask, below, 0.0)
    value = 0.0
    for q in tl.static_range(T):
        cross = tl.load(base + (2 * T + 2 * S + q * S + v) * row + c, mask=mask, other=0.0)
        if CENTERED:
            scale = _log2_scale(teacher_temp, TEACHER_TEMP_TENSOR)
            depth, total, M, mass = _merged(base + q * row, base + (T + q) * row, scale, c, mask)
            weight = tl.where(mask, tl.exp2(depth), 0.0)
            cross_entropy = tl.log2(L) - tl.sum(weight * (cross + total * below), 0) / mass
        else:
            M = 0.0
            total = tl.load(base + (T + q) * row + c, mask=mask, other=0.0)
            mass = tl.sum(total, 0)
            cross_entropy = mass * tl.log2(L) - tl.sum(cross + total * below, 0)
        if v == 0:
            tl.store(stats + (S + q) * batch + b, M)
            tl.store(stats + (S + T + S + q) * batch + b, mass)
        if IGNORE_DIAGONAL:
            value += tl.where(v == q, 0.0, cross_entropy)
        else:
            value += cross_entropy
    tl.store(rows + v * batch + b, value * LN_2)

    if CENTERED:
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
            tl.store(loss, tl.sum(everything, 0) / pairs)


@triton.jit(do_not_specialize=["batch", "grad_rows_stride_v", "grad_rows_stride_b"])
def pairwise_backward_kernel(
    grad_rows, student, teacher, center, stats, grad,
    student_temp, teacher_temp, scale, batch, prototypes,
    grad_rows_stride_v, grad_rows_stride_b, student_stride_v, student_stride_b,
    teacher_stride_q, teacher_stride_b, grad_stride_v, grad_stride_b,
    S: tl.constexpr, T: tl.constexpr, CENTERED: tl.constexpr, IGNORE_DIAGONAL: tl.constexpr,
    STUDENT_TEMP_TENSOR: tl.constexpr, TEACHER_TEMP_TENSOR: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one chunk of prototypes for one image; grid (chunks, rows, rows of rows).

    The last image comes first: the forward pass read it last, so part of it may still be in the L2
    cache. `grad` may be `student` itself: each element is read before the same thread writes it.
    """
    b = batch - 1 - (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1))
    if b < 0:
        return
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < prototypes
    student_scale = _log2_scale(student_temp, STUDENT_TEMP_TENSOR)
    if CENTERED:
        teacher_scale = _log2_scale(teacher_temp, TEACHER_TEMP_TENSOR)
        c = _load(center + k, mask, EVEN)
    probs = ()
    masses = ()
    sums = stats + (S + T) * batch + b
    base = teacher + b.to(tl.int64) * teacher_stride_b
    for q in tl.static_range(T):
        p = _load(base + k, mask, EVEN)
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
        z = _load(base + k, mask, EVEN) - tl.load(stats + v * batch + b)
        share = target_mass / tl.load(sums + v * batch)
        g = tl.load(grad_rows + v * grad_rows_stride_v + b * grad_rows_stride_b)
        # d rows_v / d s_v = 1/student_temp * (mass * softmax(z_v) - sum_q P_q)
        g = g.to(tl.float32) * scale * (student_scale * LN_2)
        value = g * (share * tl.exp2(z * student_scale) - target)
        value = value.to(grad.dtype.element_ty)  # the only rounding: the scale is included
        if EVEN:
            tl.store(out + k, value)
        else:
            tl.store(out + k, value, mask=mask)
        base += student_stride_v
        out += grad_stride_v


def forward(crops: Crops, options: PairwiseOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of the operator pairwise_forward, by two launches."""
    student, teacher, center = map(_unit_stride, crops)
    S, T, B, K = crops.sizes()
    centered = center is not None
    block = min(FORWARD_BLOCK, _power_of_2(K))
    chunks = _ceil_div(K, block)
    groups = min(B, MAX_ROWS_OF_PROGRAMS)
    if centered:
        groups = min(B, MAX_GROUPS, max(1, FORWARD_PROGRAMS // chunks))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    rows, stats, loss = empty(S, B), empty(2, S + T, B), empty()
    teacher_sum, center_used = (empty(K), empty(K)) if centered else (empty(0), empty(0))
    partials = empty(2 * T + 2 * S + T * S, B, chunks)
    column_sums = empty(groups, K) if centered and groups > 1 else teacher_sum
    arrived = torch.empty((), dtype=torch.int32, device=student.device)
    pairs = pair_count(S, T, options.ignore_diagonal)
    sum_programs = _ceil_div(K, SUM_COLUMNS) if groups > 1 and centered else 0
    temps = options.student_temp, options.teacher_temp
    flags = {"S": S, "T": T, "CENTERED": centered, **_temperature_flags(options)}
    signature = _signature(student, teacher, center, *temps)
    with device_guard(student):
        launch(
            pairwise_forward_kernel, (chunks, groups, 1), signature,
            (student, teacher, center, partials, column_sums, center_used, arrived, *temps, B, K,
             *student.stride()[:2], *teacher.stride()[:2]),
            {**flags, "EVEN": K % block == 0, "BLOCK": block},
            num_warps=FORWARD_WARPS,
        )  # fmt: skip
        launch(
            pairwise_finish_kernel, (S * B + sum_programs, 1, 1), signature,
            (partials, column_sums, rows, stats, teacher_sum, loss, arrived, *temps, B, K, chunks,
             groups, float(pairs * B)),
            {**flags, "IGNORE_DIAGONAL": options.ignore_diagonal, "CHUNKS": _power_of_2(chunks),
             "BLOCK": FINISH_BLOCK, "SUM_GROUPS": SUM_GROUPS, "SUM_COLUMNS": SUM_COLUMNS},
            num_warps=FINISH_WARPS,
        )  # fmt: skip
    return (loss if centered else rows), teacher_sum, center_used, stats


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
    student, teacher, center = map(_unit_stride, crops)
    S, T, B, K = crops.sizes()
    block = min(BACKWARD_BYTES // student.element_size(), _power_of_2(K))
    rows = min(B, MAX_ROWS_OF_PROGRAMS)
    strides = (0, 0) if center is not None else grad_result.stride()
    temps = options.student_temp, options.teacher_temp
    signature = _signature(student, teacher, center, *temps, grad_result, stats, grad)
    with device_guard(student):
        launch(
            pairwise_backward_kernel, (_ceil_div(K, block), rows, _ceil_div(B, rows)), signature,
            (grad_result, student, teacher, center, stats, grad, *temps, 1.0 / crops.terms(options),
             B, K, *strides, *student.stride()[:2], *teacher.stride()[:2], *grad.stride()[:2]),
            {"S": S, "T": T, "CENTERED": center is not None,
             "IGNORE_DIAGONAL": options.ignore_diagonal, **_temperature_flags(options),
             "EVEN": K % block == 0, "BLOCK": block},
            num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    if grad is not target:
        target.copy_(grad)


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


def _ceil_div(a: int, b: int) -> int:  # triton.cdiv costs microseconds per call
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def _unit_stride(tensor: Any) -> Any:
    """Return a tensor whose last dimension is contiguous; None unchanged."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()

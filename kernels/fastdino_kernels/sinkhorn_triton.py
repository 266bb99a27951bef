# mypy: disable-error-code="no-untyped-def"
"""The passes of Sinkhorn-Knopp in Triton; sinkhorn.py calls them.

Each pass reads the logits once. All exponents are of 2, with x/(temp ln 2).

    columns   a program owns BLOCK columns and a group of rows: each thread has columns of its own,
              so that their running maxima and sums need no communication.
    rows      a program owns ROWS rows: each lane keeps a running maximum and sum of its own per
              row, merged once at the end. A chunk of the center serves all ROWS rows.
    masses    as columns, with the rows' maxima and sums known; it adds up probabilities, or
              writes them.
    merge     merges the results of the groups of rows.

Bytes with w bytes per logit: a pass reads N*K*w; the results of the groups add less than 4 %. No
float is added atomically, so the same input gives the same bits.

Legend: N rows (b), K prototypes (k).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import device_guard

# Bytes of a row that the program processes at a time: 16 per thread.
BLOCK_BYTES, WARPS = 2048, 4
COLUMN_ROWS = 4  # rows of a tile of columns; more amortise the running sums' rescaling
MAX_ROWS = 8  # most rows of a program of the rows pass, with which it reads the center once
# Programs that keep a GPU busy: about one wave of an H100.
COLUMN_PROGRAMS, ROW_PROGRAMS = 1024, 400
MAX_GROUPS = 64  # most groups of rows, which one program merges
MERGE_BLOCK, MERGE_WARPS = 64, 4


@triton.jit
def _load_scale(scale, IS_TENSOR: tl.constexpr):
    """Return 1/(temp ln 2), which turns a logit into an exponent of 2."""
    if IS_TENSOR:
        scale = tl.load(scale)
    return scale


@triton.jit
def _or_zero(m):
    """Replace -inf by 0, so that -inf minus the maximum is -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _load_tile(teacher, b, k, stop, prototypes, stride):
    """Load rows b [ROWS] and columns k [BLOCK] as fp32, -inf beyond the last row or column."""
    inside = (b < stop)[:, None] & (k < prototypes)[None, :]
    pointers = teacher + b.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "group_rows"])
def sinkhorn_columns_kernel(
    teacher, maxima, sums, scale, rows, group_rows, prototypes, stride,
    SCALE_TENSOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute maxima and sums [groups, K] of the columns of one group; grid (chunks, groups)."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = _load_scale(scale, SCALE_TENSOR)
    first = tl.program_id(1) * group_rows
    stop = tl.minimum(first + group_rows, rows)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    while first < stop:
        x = _load_tile(teacher, first + tl.arange(0, ROWS), k, stop, prototypes, stride)
        new = tl.maximum(m, tl.max(x, 0))
        shift = _or_zero(new)
        total = total * tl.exp2((m - shift) * scale)
        total += tl.sum(tl.exp2((x - shift[None, :]) * scale), 0)
        m = new
        first += ROWS
    out = tl.program_id(1).to(tl.int64) * prototypes + k
    tl.store(maxima + out, m, k < prototypes)
    tl.store(sums + out, total, k < prototypes)


@triton.jit(do_not_specialize=["groups"])
def sinkhorn_merge_kernel(
    maxima, sums, largest, result, scale, groups, prototypes,
    SCALE_TENSOR: tl.constexpr, WITH_MAXIMA: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the sums [groups, K], relative to maxima [groups, K] or to a common value."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.arange(0, GROUPS)
    inside = (group < groups)[:, None] & (k < prototypes)[None, :]
    offsets = group.to(tl.int64)[:, None] * prototypes + k[None, :]
    total = tl.load(sums + offsets, mask=inside, other=0.0)
    if WITH_MAXIMA:
        m = tl.load(maxima + offsets, mask=inside, other=float("-inf"))
        new = tl.max(m, 0)
        tl.store(largest + k, new, k < prototypes)
        scale = _load_scale(scale, SCALE_TENSOR)
        total = total * tl.exp2((m - _or_zero(new)[None, :]) * scale)
    tl.store(result + k, tl.sum(total, 0), k < prototypes)


@triton.jit(do_not_specialize=["rows"])
def sinkhorn_rows_kernel(
    teacher, center, stats, scale, rows, prototypes, stride,
    SCALE_TENSOR: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Compute stats [2, N] of ROWS rows: the largest x - center, and the sum of exp2 below it."""
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = teacher + tl.minimum(b, rows - 1).to(tl.int64)[:, None, None] * stride
    lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    scale = _load_scale(scale, SCALE_TENSOR)
    m = tl.full([ROWS, LANES], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, prototypes, LANES * VECTOR):
        k = start + lane
        inside = k < prototypes
        c = tl.load(center + k, mask=inside, other=0.0)
        x = tl.load(base + k[None, :, :], mask=inside[None, :, :], other=float("-inf"))
        x = x.to(tl.float32) - c[None, :, :]
        new = tl.maximum(m, tl.max(x, 2))
        shift = _or_zero(new)
        total = total * tl.exp2((m - shift) * scale)
        total += tl.sum(tl.exp2((x - shift[:, :, None]) * scale), 2)
        m = new
    largest = _or_zero(tl.max(m, 1))
    total = tl.sum(total * tl.exp2((m - largest[:, None]) * scale), 1)
    tl.store(stats + b, largest, b < rows)
    tl.store(stats + rows + b, total, b < rows)


@triton.jit(do_not_specialize=["rows", "group_rows"])
def sinkhorn_masses_kernel(
    teacher, center, stats, out, scale, rows, group_rows, prototypes, stride,
    SCALE_TENSOR: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute softmax((x - center)/temp) of one group of rows; grid (chunks, groups).

    out: with WRITE the probabilities [N, K], otherwise their column sums [groups, K].
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.load(center + k, mask=k < prototypes, other=0.0)
    scale = _load_scale(scale, SCALE_TENSOR)
    first = tl.program_id(1) * group_rows
    stop = tl.minimum(first + group_rows, rows)
    mass = tl.zeros([BLOCK], tl.float32)
    while first < stop:
        b = first + tl.arange(0, ROWS)
        x = _load_tile(teacher, b, k, stop, prototypes, stride)
        largest = tl.load(stats + b, mask=b < stop, other=0.0)
        total = tl.load(stats + rows + b, mask=b < stop, other=1.0)
        p = tl.exp2((x - c[None, :] - largest[:, None]) * scale) * (1.0 / total)[:, None]
        if WRITE:
            pointers = out + b.to(tl.int64)[:, None] * prototypes + k[None, :]
            tl.store(pointers, p, mask=(b < stop)[:, None] & (k < prototypes)[None, :])
        else:
            mass += tl.sum(p, 0)
        first += ROWS
    if not WRITE:
        group = tl.program_id(1).to(tl.int64) * prototypes
        tl.store(out + group + k, mass, k < prototypes)


def columns(teacher: Tensor, temp: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the results of the operator sinkhorn_columns, by two launches."""
    teacher = _unit_stride(teacher)
    launch, groups, group_rows = _column_launch(teacher)
    K, scale = teacher.shape[1], _log2_scale(temp)
    maxima, sums = _fp32(teacher, groups, K), _fp32(teacher, groups, K)
    with device_guard(teacher):
        sinkhorn_columns_kernel[launch.pop("grid")](
            teacher, maxima, sums, scale, len(teacher), group_rows, K, teacher.stride(0),
            SCALE_TENSOR=isinstance(scale, Tensor), ROWS=COLUMN_ROWS, **launch,
        )  # fmt: skip
    return _merge(maxima, sums, scale)


def masses(teacher: Tensor, center: Tensor, temp: float | Tensor) -> Tensor:
    """Return the result of the operator sinkhorn_masses, by three launches."""
    teacher = _unit_stride(teacher)
    scale = _log2_scale(temp)
    _, groups, _ = _column_launch(teacher)
    sums = _fp32(teacher, groups, teacher.shape[1])
    _launch_masses(teacher, center, sums, scale, write=False)
    return _merge(None, sums, scale)[1]


def write_probabilities(
    probs: Tensor, teacher: Tensor, center: Tensor, temp: float | Tensor
) -> None:
    """Write the result of the operator sinkhorn_probabilities to `probs`, by two launches."""
    _launch_masses(_unit_stride(teacher), center, probs, _log2_scale(temp), write=True)


def _launch_masses(
    teacher: Tensor, center: Tensor, out: Tensor, scale: float | Tensor, *, write: bool
) -> None:
    N, K = teacher.shape
    stats = _fp32(teacher, 2, N)
    launch, _, group_rows = _column_launch(teacher)
    vector = 16 // teacher.element_size()
    most = MAX_ROWS if K % vector == 0 else 2  # narrow loads take many registers
    rows = min(most, _power_of_2(max(1, N // ROW_PROGRAMS)))
    lanes = max(1, launch["BLOCK"] // vector)
    flags = {"SCALE_TENSOR": isinstance(scale, Tensor)}
    with device_guard(teacher):
        sinkhorn_rows_kernel[(_ceil_div(N, rows),)](
            teacher, center, stats, scale, N, K, teacher.stride(0), **flags,
            ROWS=rows, LANES=lanes, VECTOR=vector, num_warps=WARPS,
        )  # fmt: skip
        sinkhorn_masses_kernel[launch.pop("grid")](
            teacher, center, stats, out, scale, N, group_rows, K, teacher.stride(0), **flags,
            WRITE=write, ROWS=COLUMN_ROWS, **launch,
        )  # fmt: skip


def _column_launch(teacher: Tensor) -> tuple[dict[str, Any], int, int]:
    """Return the launch of a program per chunk of columns and group of rows, groups, group rows."""
    N, K = teacher.shape
    block = min(BLOCK_BYTES // teacher.element_size(), _power_of_2(K))
    chunks = _ceil_div(K, block)
    tiles = _ceil_div(N, COLUMN_ROWS)
    groups = min(tiles, MAX_GROUPS, max(1, COLUMN_PROGRAMS // chunks))
    group_tiles = _ceil_div(tiles, groups)
    groups = _ceil_div(tiles, group_tiles)
    launch = {"grid": (chunks, groups), "BLOCK": block, "num_warps": WARPS}
    return launch, groups, group_tiles * COLUMN_ROWS


def _merge(maxima: Tensor | None, sums: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Merge [groups, K] sums, and their maxima if there are any, to [K]."""
    groups, K = sums.shape
    if groups == 1:
        return (sums if maxima is None else maxima)[0], sums[0]
    largest, result = _fp32(sums, K), _fp32(sums, K)
    with device_guard(sums):
        sinkhorn_merge_kernel[(_ceil_div(K, MERGE_BLOCK),)](
            maxima, sums, largest, result, scale, groups, K,
            SCALE_TENSOR=isinstance(scale, Tensor), WITH_MAXIMA=maxima is not None,
            GROUPS=_power_of_2(groups), BLOCK=MERGE_BLOCK, num_warps=MERGE_WARPS,
        )  # fmt: skip
    return largest, result


def _log2_scale(temp: float | Tensor) -> float | Tensor:
    return 1 / (temp * math.log(2))


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _ceil_div(a: int, b: int) -> int:  # triton.cdiv costs microseconds per call
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def _unit_stride(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

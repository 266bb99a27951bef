# mypy: disable-error-code="no-untyped-def"
"""Clipping by norm in three launches over a PointerTable of gradients, without atomics.

1. sum_squares_kernel: one fp32 number per chunk.
2. norms_kernel, one program per tensor, or total_norm_kernel, one program: norms and factors.
3. scale_kernel: a chunk whose factor is 1 is neither read nor written.

Bytes per parameter, for fp32: 4 for the norms, and 8 more only if the gradient is clipped.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pointer_table, reference
from .chunk_triton import NUMEL, PART, ROW, find_chunk, find_tensor, load_chunk, store_chunk
from .dispatch import device_guard
from .pointer_table import PointerTable

# 32 elements per thread: 128 bytes of fp32 loads in flight per thread, at 48 registers.
CHUNK = 8192
NUM_WARPS = 8
# Sums of chunks that one program adds at a time, and its warps.
TENSOR_PARTIALS, TENSOR_WARPS = 1024, 4
TOTAL_PARTIALS, TOTAL_WARPS = 8192, 16

POSITION = tl.constexpr(pointer_table.POSITION)
EPS = tl.constexpr(reference.CLIP_EPS)


@triton.jit
def sum_squares_kernel(rows, owners, partials, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    """Set partials[chunk] to the sum of squares of one chunk."""
    _, row, start, left = find_chunk(rows, owners, CHUNK)
    grad, code = find_tensor(row, 0)
    if (left >= CHUNK) & (grad % 16 == 0):
        g = load_chunk(grad, code, start, left, DTYPE, CHUNK, True)
        total = tl.sum(g * g, axis=0)
    else:
        sums = tl.zeros([PART], tl.float32)
        part = 0
        while part < tl.minimum(left, CHUNK):
            g = load_chunk(grad, code, start + part, left - part, DTYPE, PART, False)
            sums += g * g
            part += PART
        total = tl.sum(sums, axis=0)
    tl.store(partials + tl.program_id(0), total)


@triton.jit
def norms_kernel(
    rows, partials, norms, factors, max_norm, CHUNK: tl.constexpr, PARTIALS: tl.constexpr
):
    """Set norms[position] and factors[row] of one gradient; a NaN norm has factor 1."""
    tensor = tl.program_id(0)
    row = rows + tensor.to(tl.int64) * ROW
    first = tl.load(row)
    norm = _root_of_sum(partials + first, tl.cdiv(tl.load(row + NUMEL), CHUNK), PARTIALS)
    factor = tl.div_rn(max_norm, norm + EPS)
    tl.store(norms + tl.load(row + POSITION), norm)
    tl.store(factors + tensor, tl.where(factor < 1, factor, 1.0))


@triton.jit(do_not_specialize=["count"])
def total_norm_kernel(partials, count, norm_out, factors, max_norm, PARTIALS: tl.constexpr):
    """Compute the global norm and its factor, in one program; the factor of NaN is NaN."""
    norm = _root_of_sum(partials, count, PARTIALS)
    factor = tl.div_rn(max_norm, norm + EPS)
    tl.store(norm_out, norm)
    tl.store(factors, tl.where(factor >= 1, 1.0, factor))


@triton.jit
def _root_of_sum(partials, count, PARTIALS: tl.constexpr):
    sums = tl.zeros([PARTIALS], tl.float32)
    offsets = tl.arange(0, PARTIALS)
    start = 0
    while start < count:
        sums += tl.load(partials + start + offsets, mask=start + offsets < count, other=0.0)
        start += PARTIALS
    return tl.sqrt_rn(tl.sum(sums, axis=0))


@triton.jit
def scale_kernel(
    rows, owners, factors, EACH: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):
    """Multiply one chunk by factors[row] (EACH) or factors[0], in fp32, rounded once."""
    owner, row, start, left = find_chunk(rows, owners, CHUNK)
    factor = tl.load(factors + owner if EACH else factors)
    if factor != 1:
        grad, code = find_tensor(row, 0)
        if (left >= CHUNK) & (grad % 16 == 0):
            g = load_chunk(grad, code, start, left, DTYPE, CHUNK, True)
            store_chunk(g * factor, grad, code, start, left, DTYPE, CHUNK, True)
        else:
            part = 0
            while part < tl.minimum(left, CHUNK):
                g = load_chunk(grad, code, start + part, left - part, DTYPE, PART, False)
                store_chunk(g * factor, grad, code, start + part, left - part, DTYPE, PART, False)
                part += PART


def launch_clip(table: PointerTable, norms: Tensor, max_norm: float) -> None:
    """Clip each gradient by its own norm and write the norm to norms[position] (fp32)."""
    factors = launch_norms(table, norms, max_norm)
    if not math.isinf(max_norm):
        launch_scale(table, factors)


def launch_norms(table: PointerTable, norms: Tensor, max_norm: float) -> Tensor:
    """Write only the norms, as launch_clip does; return the factors [rows] (fp32)."""
    factors = torch.empty(len(table.rows), dtype=torch.float32, device=norms.device)
    with device_guard(table.rows):
        partials = _sum_squares(table)
        norms_kernel[(len(table.rows),)](
            table.rows, partials, norms, factors, float(max_norm),
            CHUNK=CHUNK, PARTIALS=TENSOR_PARTIALS, num_warps=TENSOR_WARPS,
        )  # fmt: skip
    return factors


def launch_scale(table: PointerTable, factors: Tensor) -> None:
    """Multiply each gradient by its factor, of [rows] (fp32)."""
    with device_guard(table.rows):
        _scale(table, factors, each=True)


def launch_global_clip(table: PointerTable, max_norm: float) -> Tensor:
    """Clip all gradients by the global norm and return it (0-d, fp32)."""
    total, factor = torch.empty(2, dtype=torch.float32, device=table.rows.device).unbind()
    with device_guard(table.rows):
        partials = _sum_squares(table)
        total_norm_kernel[(1,)](
            partials, len(partials), total, factor, float(max_norm),
            PARTIALS=TOTAL_PARTIALS, num_warps=TOTAL_WARPS,
        )  # fmt: skip
        if not math.isinf(max_norm):
            _scale(table, factor, each=False)
    return total


def _sum_squares(table: PointerTable) -> Tensor:
    chunks = len(table.owners)
    partials = torch.empty(chunks, dtype=torch.float32, device=table.rows.device)
    if chunks:
        sum_squares_kernel[(chunks,)](
            table.rows, table.owners, partials,
            DTYPE=table.codes[0], CHUNK=CHUNK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return partials


def _scale(table: PointerTable, factors: Tensor, *, each: bool) -> None:
    if len(table.owners) == 0:
        return
    scale_kernel[(len(table.owners),)](
        table.rows, table.owners, factors,
        EACH=each, DTYPE=table.codes[0], CHUNK=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip

# mypy: disable-error-code="no-untyped-def"
"""Clipping by norm in three launches over tables of gradients, without atomics.

1. sum_squares_kernel: one fp32 number per chunk.
2. norms_kernel: norms and factors; one program per tensor, or a single one for the global norm.
3. scale_kernel: a chunk whose factor is 1 is neither read nor written.

Bytes per parameter, for fp32: 4 for the norms, and 8 more only if the gradient is clipped.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .chunk_triton import PART, find_chunk, find_tensor, load_chunk, store_chunk
from .dispatch import device_guard
from .tensor_lists import Tables

# 32 elements per thread: 128 bytes of fp32 loads in flight per thread, at 48 registers.
CHUNK = 8192
NUM_WARPS = 8
# Sums of chunks that one program adds at a time, and its warps.
PARTIALS, TENSOR_WARPS = 1024, 4
TOTAL_PARTIALS, TOTAL_WARPS = 8192, 16

EPS = tl.constexpr(reference.CLIP_EPS)


@triton.jit
def sum_squares_kernel(
    rows, owners, words, partials, flag, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):
    """Set partials[chunk] to the sum of squares of one chunk, and flag [], if given, to 0."""
    owner, start, left = find_chunk(rows, owners, CHUNK)
    grad, code = find_tensor(words, owner, 0, 1)
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
    if flag is not None:
        tl.store(flag, 0)


@triton.jit(do_not_specialize=["chunks"])
def norms_kernel(
    rows, partials, chunks, norms, factors, max_norm,
    EACH: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Set norms[i] and factors[i] of one gradient (EACH), or norms[0] and factors[0] of all."""
    index = tl.program_id(0)
    norm = norm_of(rows, partials, chunks, index, EACH, CHUNK, PARTIALS)
    tl.store(norms + index, norm)
    tl.store(factors + index, clip_factor(norm, max_norm, EACH))


@triton.jit
def norm_of(
    rows, partials, chunks, index, EACH: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr
):
    """Return the norm of one gradient, or that of all `chunks` unless EACH."""
    count = chunks
    if EACH:
        row = rows + index.to(tl.int64) * 2
        partials += tl.load(row)
        count = tl.cdiv(tl.load(row + 1), CHUNK)
    sums = tl.zeros([PARTIALS], tl.float32)
    offsets = tl.arange(0, PARTIALS)
    start = 0
    while start < count:
        sums += tl.load(partials + start + offsets, mask=start + offsets < count, other=0.0)
        start += PARTIALS
    return tl.sqrt_rn(tl.sum(sums, axis=0))


@triton.jit
def clip_factor(norm, max_norm, EACH: tl.constexpr):
    """Return min(1, max_norm/(norm + 1e-6)); for NaN 1 if EACH, else NaN."""
    factor = tl.div_rn(tl.cast(max_norm, tl.float32), norm + EPS)
    if EACH:
        factor = tl.where(factor < 1, factor, 1.0)
    else:
        factor = tl.where(factor >= 1, 1.0, factor)
    return factor


@triton.jit
def scale_kernel(
    rows, owners, words, factors, EACH: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):
    """Multiply one chunk by its tensor's factor (EACH) or factors[0], in fp32, rounded once."""
    owner, start, left = find_chunk(rows, owners, CHUNK)
    factor = tl.load(factors + owner if EACH else factors)
    if factor != 1:
        grad, code = find_tensor(words, owner, 0, 1)
        if (left >= CHUNK) & (grad % 16 == 0):
            g = load_chunk(grad, code, start, left, DTYPE, CHUNK, True)
            store_chunk(g * factor, grad, code, start, left, DTYPE, CHUNK, True)
        else:
            part = 0
            while part < tl.minimum(left, CHUNK):
                g = load_chunk(grad, code, start + part, left - part, DTYPE, PART, False)
                store_chunk(g * factor, grad, code, start + part, left - part, DTYPE, PART, False)
                part += PART


def launch_clip(tables: Tables, max_norm: float, *, each: bool) -> Tensor:
    """Clip n gradients by their norms [n] (fp32), or by the global norm [], and return it."""
    chunks, words = tables.chunks, tables.pointers.words
    with device_guard(words):
        partials = launch_sum_squares(tables)
        both = torch.empty((2, len(words) if each else 1), dtype=torch.float32, device=words.device)
        norms, factors = both.unbind()
        norms_kernel[(len(norms),)](
            chunks.rows, partials, len(partials), norms, factors, max_norm, EACH=each, CHUNK=CHUNK,
            PARTIALS=PARTIALS if each else TOTAL_PARTIALS,
            num_warps=TENSOR_WARPS if each else TOTAL_WARPS,
        )  # fmt: skip
        if not math.isinf(max_norm):
            launch_scale(tables, factors, each=each)
    return norms if each else norms[0]


def launch_sum_squares(tables: Tables, flag: Tensor | None = None) -> Tensor:
    """Return the sum of squares of each chunk, fp32 [chunks]; set flag [], if given, to 0."""
    chunks, pointers = tables.chunks, tables.pointers
    count = len(chunks.owners)
    partials = torch.empty(count, dtype=torch.float32, device=pointers.words.device)
    sum_squares_kernel[(count,)](
        chunks.rows, chunks.owners, pointers.words, partials, flag,
        DTYPE=pointers.codes[0], CHUNK=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return partials


def launch_scale(tables: Tables, factors: Tensor, *, each: bool) -> None:
    """Multiply each gradient by its factor, of [n] (fp32) or [1]."""
    chunks, pointers = tables.chunks, tables.pointers
    scale_kernel[(len(chunks.owners),)](
        chunks.rows, chunks.owners, pointers.words, factors,
        EACH=each, DTYPE=pointers.codes[0], CHUNK=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip

# mypy: disable-error-code="no-untyped-def"
"""Access to one chunk of a list of tensors (pointer_table.py), shared by the kernels.

A program owns one chunk: CHUNK elements of one tensor, fewer at the tensor's end. A whole chunk at
16-byte aligned addresses is accessed at once, 128 bits at a time. Any other chunk is processed in
masked parts of PART elements, without alignment. Offsets are 64-bit. Arithmetic is fp32.
"""

import triton
import triton.language as tl

from . import pointer_table

CODE_BITS = tl.constexpr(pointer_table.CODE_BITS)
CODE_MASK = tl.constexpr((1 << pointer_table.CODE_BITS) - 1)
FP32 = tl.constexpr(pointer_table.FP32)
BF16 = tl.constexpr(pointer_table.BF16)
FP16 = tl.constexpr(pointer_table.FP16)

PART = tl.constexpr(1024)


@triton.jit
def find_chunk(rows, owners, CHUNK: tl.constexpr):
    """Return (index of the tensor, first element, elements from there to the tensor's end)."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = (chunk - tl.load(rows + owner * 2)) * CHUNK  # int64, like everything in the tables
    return owner, start, tl.load(rows + owner * 2 + 1) - start


@triton.jit
def find_tensor(words, index, ROLE: tl.constexpr, ROLES: tl.constexpr):
    """Return (address, dtype code) of a tensor; the address is 0 if there is none."""
    word = tl.load(words + index * ROLES + ROLE)
    return word >> CODE_BITS, word & CODE_MASK


@triton.jit
def load_chunk(
    address, code, start, left, DTYPE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr
):
    """Load [CHUNK] as fp32, 0 beyond the tensor's end unless WHOLE; `code` resolves MIXED."""
    if DTYPE == FP32:
        values = _load(address, start, left, tl.float32, CHUNK, WHOLE)
    elif DTYPE == BF16:
        values = _load(address, start, left, tl.bfloat16, CHUNK, WHOLE)
    elif DTYPE == FP16:
        values = _load(address, start, left, tl.float16, CHUNK, WHOLE)
    elif code == FP32:
        values = _load(address, start, left, tl.float32, CHUNK, WHOLE)
    elif code == BF16:
        values = _load(address, start, left, tl.bfloat16, CHUNK, WHOLE)
    else:
        values = _load(address, start, left, tl.float16, CHUNK, WHOLE)
    return values


@triton.jit
def store_chunk(
    values, address, code, start, left,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store [CHUNK] fp32 values, rounded once; return the stored values as fp32."""
    if DTYPE == FP32:
        stored = _store(values, address, start, left, tl.float32, CHUNK, WHOLE)
    elif DTYPE == BF16:
        stored = _store(values, address, start, left, tl.bfloat16, CHUNK, WHOLE)
    elif DTYPE == FP16:
        stored = _store(values, address, start, left, tl.float16, CHUNK, WHOLE)
    elif code == FP32:
        stored = _store(values, address, start, left, tl.float32, CHUNK, WHOLE)
    elif code == BF16:
        stored = _store(values, address, start, left, tl.bfloat16, CHUNK, WHOLE)
    else:
        stored = _store(values, address, start, left, tl.float16, CHUNK, WHOLE)
    return stored


@triton.jit
def _load(address, start, left, DTYPE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    offsets = tl.arange(0, CHUNK)
    if WHOLE:
        # Accesses through a pointer from a table are vectorised only with this hint.
        pointer = tl.multiple_of(pointer, 16)
        values = tl.load(pointer + start + offsets)
    else:
        values = tl.load(pointer + start + offsets, mask=offsets < left, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(
    values, address, start, left, DTYPE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr
):
    pointer = address.to(tl.pointer_type(DTYPE))
    offsets = tl.arange(0, CHUNK)
    rounded = values.to(DTYPE)
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + start + offsets, rounded)
    else:
        tl.store(pointer + start + offsets, rounded, mask=offsets < left)
    return rounded.to(tl.float32)

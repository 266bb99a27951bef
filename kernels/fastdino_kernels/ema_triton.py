# mypy: disable-error-code="no-untyped-def"
"""The EMA as one kernel over tables of pointers.

Bytes per parameter: fp32 reads 4 + 4 and writes 4: 12, the minimum. A bf16 shadow in the same pass
makes it 14; a separate cast would make it 18.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chunk_triton import PART, find_chunk, find_tensor, load_chunk, store_chunk
from .dispatch import device_guard
from .tensor_lists import Tables

# 16 elements per thread: 128 bytes of fp32 loads in flight per thread, at 64 registers.
CHUNK = 4096
NUM_WARPS = 8


@triton.jit
def ema_kernel(
    rows, owners, words, weight, keep, momentum,
    TEACHER: tl.constexpr, SHADOW: tl.constexpr, STUDENT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one teacher.

    weight = 1 - keep, unless `momentum` [] is given, which replaces both. TEACHER, SHADOW and
    STUDENT are the dtype codes of the words' roles; SHADOW is None if there is no such role.
    """
    scale, near_teacher = ema_scale(weight, keep, momentum)
    owner, start, left = find_chunk(rows, owners, CHUNK)
    ROLES: tl.constexpr = 2 if SHADOW is None else 3
    teacher, teacher_code = find_tensor(words, owner, 0, ROLES)
    student, student_code = find_tensor(words, owner, ROLES - 1, ROLES)
    shadow, shadow_code = find_tensor(words, owner, 1, ROLES)  # the student without a shadow
    if (left >= CHUNK) & ((teacher | student | shadow) % 16 == 0):
        t = load_chunk(teacher, teacher_code, start, left, TEACHER, CHUNK, True)
        s = load_chunk(student, student_code, start, left, STUDENT, CHUNK, True)
        t = blend(t, s, scale, near_teacher)
        t = store_chunk(t, teacher, teacher_code, start, left, TEACHER, CHUNK, True)
        if SHADOW is not None:
            store_chunk(t, shadow, shadow_code, start, left, SHADOW, CHUNK, True)
    else:
        part = 0  # Triton 3.6 cannot interpret `for` over a range of runtime length
        while part < tl.minimum(left, CHUNK):
            t = load_chunk(teacher, teacher_code, start + part, left - part, TEACHER, PART, False)
            s = load_chunk(student, student_code, start + part, left - part, STUDENT, PART, False)
            t = blend(t, s, scale, near_teacher)
            t = store_chunk(
                t, teacher, teacher_code, start + part, left - part, TEACHER, PART, False
            )
            if SHADOW is not None:
                store_chunk(t, shadow, shadow_code, start + part, left - part, SHADOW, PART, False)
            part += PART


@triton.jit
def ema_scale(weight, keep, momentum):
    """Return the arguments of blend for (1 - m, m), or for `momentum` [] if it is given."""
    if momentum is not None:
        m = tl.load(momentum).to(tl.float64)
        weight = (1.0 - m).to(tl.float32)
        keep = m.to(tl.float32)
    else:
        # The interpreter treats a float that fp32 cannot represent as fp64.
        weight = tl.cast(weight, tl.float32)
        keep = tl.cast(keep, tl.float32)
    near_teacher = weight < 0.5
    return tl.where(near_teacher, weight, -keep), near_teacher


@triton.jit
def blend(t, s, scale, near_teacher):
    """Return m*t + (1 - m)*s, from the nearer end, so that both ends are exact to the bit.

    scale: 1 - m from the teacher, -m from the student.
    """
    base = tl.where(near_teacher, t, s)
    return tl.where(scale == 0, base, base + scale * (s - t))


def launch_ema(tables: Tables, momentum: float | Tensor) -> None:
    """Update every teacher.

    Args:
        tables: of the roles teacher, shadow (optional) and student, in chunks of CHUNK.
        momentum: a float, or a 0-d floating-point tensor on the tables' device.
    """
    chunks, pointers = tables.chunks, tables.pointers
    on_device = isinstance(momentum, Tensor)
    teacher, *shadow, student = pointers.codes
    with device_guard(pointers.words):
        ema_kernel[(len(chunks.owners),)](
            chunks.rows, chunks.owners, pointers.words,
            0.0 if on_device else float(1 - momentum),
            0.0 if on_device else float(momentum),
            momentum if on_device else None,
            TEACHER=teacher, SHADOW=shadow[0] if shadow else None, STUDENT=student, CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )  # fmt: skip

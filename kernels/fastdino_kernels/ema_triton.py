# mypy: disable-error-code="no-untyped-def"
"""The EMA as one kernel over a PointerTable, roles teacher, student and (optionally) shadow.

Bytes a parameter: fp32 reads 4 + 4 and writes 4: 12, the floor; a bf16 shadow in the same pass
makes 14, where a cast afterwards would make 18.
"""

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import device_guard
from .pointer_table import PointerTable
from .triton_chunk import PART, find_chunk, find_tensor, load_chunk, store_chunk

# 16 elements a thread: 128 bytes of fp32 loads in flight in each, at 64 registers.
CHUNK = 4096
NUM_WARPS = 8


@triton.jit
def ema_kernel(
    rows,
    owners,
    weight,
    keep,
    momentum,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    SHADOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one teacher: weight = 1 - keep, or both from `momentum` [] where it is given.

    TEACHER, STUDENT, SHADOW are dtype codes; SHADOW is None where there is no shadow.
    """
    weight, keep = ema_weights(weight, keep, momentum)
    _, row, start, left = find_chunk(rows, owners, CHUNK)
    teacher, teacher_code = find_tensor(row, 0)
    student, student_code = find_tensor(row, 1)
    shadow, shadow_code = find_tensor(row, 2)
    # The shadow's address is 0 where there is none.
    if (left >= CHUNK) & ((teacher | student | shadow) % 16 == 0):
        t = load_chunk(teacher, teacher_code, start, left, TEACHER, CHUNK, True)
        s = load_chunk(student, student_code, start, left, STUDENT, CHUNK, True)
        t = blend(t, s, weight, keep)
        t = store_chunk(t, teacher, teacher_code, start, left, TEACHER, CHUNK, True)
        if SHADOW is not None:
            store_chunk(t, shadow, shadow_code, start, left, SHADOW, CHUNK, True)
    else:
        part = 0  # `for` over a range of runtime length is more than Triton 3.6 can interpret
        while part < tl.minimum(left, CHUNK):
            t = load_chunk(teacher, teacher_code, start + part, left - part, TEACHER, PART, False)
            s = load_chunk(student, student_code, start + part, left - part, STUDENT, PART, False)
            t = blend(t, s, weight, keep)
            t = store_chunk(
                t, teacher, teacher_code, start + part, left - part, TEACHER, PART, False
            )
            if SHADOW is not None:
                store_chunk(t, shadow, shadow_code, start + part, left - part, SHADOW, PART, False)
            part += PART


@triton.jit
def ema_weights(weight, keep, momentum):
    """(1 - m, m) in fp32: as given, or from `momentum` [] where it is given."""
    if momentum is not None:
        m = tl.load(momentum).to(tl.float64)
        weight = (1.0 - m).to(tl.float32)
        keep = m.to(tl.float32)
    else:
        # The interpreter takes a float that fp32 cannot hold for fp64.
        weight = tl.cast(weight, tl.float32)
        keep = tl.cast(keep, tl.float32)
    return weight, keep


@triton.jit
def blend(t, s, weight, keep):
    """keep*t + weight*s, from the nearer end, so that both ends are exact to the bit."""
    near_teacher = weight < 0.5
    base = tl.where(near_teacher, t, s)
    scale = tl.where(near_teacher, weight, -keep)
    return tl.where(scale == 0, base, base + scale * (s - t))


def launch_ema(table: PointerTable, momentum: float | Tensor) -> None:
    """Updates every tensor of the table.

    Args:
        table: of 2 roles (teacher, student) or 3 (shadow), in chunks of CHUNK.
        momentum: a float, or a 0-d floating-point tensor on the table's device.
    """
    if len(table.owners) == 0:
        return
    on_device = isinstance(momentum, Tensor)
    teacher, student, shadow = (*table.codes, None)[:3]
    with device_guard(table.rows):
        ema_kernel[(len(table.owners),)](
            table.rows,
            table.owners,
            0.0 if on_device else float(1 - momentum),
            0.0 if on_device else float(momentum),
            momentum if on_device else None,
            TEACHER=teacher,
            STUDENT=student,
            SHADOW=shadow,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )

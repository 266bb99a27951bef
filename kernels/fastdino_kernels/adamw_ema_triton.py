# mypy: disable-error-code="no-untyped-def"
"""Clip, AdamW, EMA and low-precision copies as one kernel over PointerTables, without atomics.

Before it, next to clip_triton's two launches for the norms:

1. decide_kernel, one program: whether this step happens. Omitted if nothing can prevent it.
2. prepare_kernel, once per group of parameters: step counts, and NUMBERS for each parameter.
3. adamw_ema_kernel: one chunk of all tensors of one parameter.

Bytes per parameter, in fp32: parameter, gradient, both moments and teacher are read, all but the
gradient are written: 36, plus 2 for each bf16 copy. A parameter without a gradient: 12, as in the
EMA.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pointer_table, reference
from .adamw_ema_arguments import Call, Group
from .chunk_triton import (
    CODE_MASK,
    CODES,
    PART,
    ROW,
    find_chunk,
    find_tensor,
    load_chunk,
    store_chunk,
)
from .dispatch import backend_options, device_guard
from .ema_triton import blend, ema_weights
from .pointer_table import PointerTable

# 8 elements per thread of five tensors: 160 bytes of fp32 loads in flight per thread.
CHUNK = 2048
NUM_WARPS = 8
# Three programs per multiprocessor. Without a limit ptxas aims at 64 registers, and spills.
MAX_REGISTERS = 80
# Norms, or parameters, that one program processes at a time, with 4 warps.
NORMS, PARAMETERS = 1024, 128

# The roles of the table; the gradients have a table of their own, as they move more often.
ROLES = ("parameter", "exp_avg", "exp_avg_sq", "teacher", "shadow", "teacher_shadow")
_CODES = [f"{role.upper()}_CODE" for role in (*ROLES, "gradient")]
PARAMETER, EXP_AVG, EXP_AVG_SQ, TEACHER, SHADOW, TEACHER_SHADOW = map(tl.constexpr, range(6))
ABSENT = tl.constexpr(pointer_table.ABSENT)
CLIP_EPS = tl.constexpr(reference.CLIP_EPS)
UNIT_EPS = tl.constexpr(reference.UNIT_EPS)

# Results of prepare_kernel for each parameter: fp32 [n, NUMBERS].
NUMBERS = tl.constexpr(8)
FACTOR = tl.constexpr(0)  # of the gradient: clip factor / loss scale
DECAY = tl.constexpr(1)  # lr * weight_decay
STEP_SIZE = tl.constexpr(2)  # lr / (1 - beta1^step)
ROOT_SCALE = tl.constexpr(3)  # 1 / sqrt(1 - beta2^step)
EPS = tl.constexpr(4)
WEIGHT1 = tl.constexpr(5)  # 1 - beta1
WEIGHT2 = tl.constexpr(6)  # 1 - beta2

# Results of decide_kernel.
NOTHING, AVERAGE, ALL = map(tl.constexpr, range(3))


@triton.jit(do_not_specialize=["count"])
def decide_kernel(norms, count, skip, found_inf, refused, decision, BLOCK: tl.constexpr):
    """Set decision[0]: NOTHING if skip != 0, else AVERAGE (only the EMA) if found_inf != 0.

    With `refused`, also NOTHING if a norm is not finite and found_inf is 0; this adds 1 to
    `refused`. skip, found_inf and refused may be None.
    """
    nothing = tl.cast(0, tl.int32)
    overflow = tl.cast(0, tl.int32)
    if skip is not None:
        nothing = (tl.load(skip) != 0).to(tl.int32)
    if found_inf is not None:
        overflow = (tl.load(found_inf) != 0).to(tl.int32)
    if refused is not None:
        offsets = tl.arange(0, BLOCK)
        bad = tl.zeros([BLOCK], tl.int32)
        start = 0
        while start < count:
            norm = tl.load(norms + start + offsets, mask=start + offsets < count, other=0.0)
            bad = tl.where(tl.abs(norm) < float("inf"), bad, 1)  # NaN is not <
            start += BLOCK
        any_bad = tl.max(bad, axis=0) * (1 - overflow)
        before = tl.load(refused)
        tl.store(refused, before + any_bad.to(before.dtype))
        nothing = tl.maximum(nothing, any_bad)
    tl.store(decision, tl.where(nothing != 0, NOTHING, tl.where(overflow != 0, AVERAGE, ALL)))


@triton.jit(do_not_specialize=["first", "count"])
def prepare_kernel(
    rows, gradients, steps, norms, decision, grad_scale, numbers, first, count,
    lr, lr_tensor, weight_decay, weight_decay_tensor,
    weight1, weight2, log2_beta1, log2_beta2, eps, max_norm, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a step of each parameter first..first+count that has a gradient; store its NUMBERS.

    lr and weight_decay are numbers, unless the 0-d tensors are given; norms and max_norm, decision
    and grad_scale may be None too. 1 - beta^step is computed in fp64, as fp32 keeps four digits of
    1 - 0.999.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = first + lane
    inside = lane < count
    # Both have role 0, whose code is in the lowest bits.
    parameter = tl.load(rows + index * ROW + CODES, mask=inside, other=ABSENT) & CODE_MASK
    gradient = tl.load(gradients + index * ROW + CODES, mask=inside, other=ABSENT) & CODE_MASK
    moves = inside & (parameter != ABSENT) & (gradient != ABSENT)
    if decision is not None:
        moves = moves & (tl.load(decision) == ALL)
    step = tl.load(steps + index, mask=moves, other=0.0) + 1
    tl.store(steps + index, step, mask=moves)

    factor = tl.full([BLOCK], 1.0, tl.float32)
    if max_norm is not None:
        norm = tl.load(norms + index, mask=moves, other=0.0)
        clip = tl.div_rn(tl.cast(max_norm, tl.float32), norm + CLIP_EPS)
        factor = tl.where(clip < 1, clip, factor)
    if grad_scale is not None:
        factor = tl.div_rn(factor, tl.zeros([BLOCK], tl.float32) + tl.load(grad_scale))
    rate = _number(lr, lr_tensor)
    decay = rate * _number(weight_decay, weight_decay_tensor)
    correction1 = 1 - tl.exp2(step.to(tl.float64) * log2_beta1)
    correction2 = 1 - tl.exp2(step.to(tl.float64) * log2_beta2)
    row = numbers + index * NUMBERS
    tl.store(row + FACTOR, factor, mask=moves)
    tl.store(row + DECAY, decay, mask=moves)
    tl.store(row + STEP_SIZE, rate / correction1, mask=moves)
    tl.store(row + ROOT_SCALE, 1 / tl.sqrt(correction2), mask=moves)
    tl.store(row + EPS, eps, mask=moves)
    tl.store(row + WEIGHT1, weight1, mask=moves)
    tl.store(row + WEIGHT2, weight2, mask=moves)


@triton.jit
def _number(value, tensor):
    """Return `tensor` [] if it is given, else the number, in fp64."""
    if tensor is not None:
        number = tl.load(tensor).to(tl.float64)
    else:
        number = tl.cast(value, tl.float64)
    return number


@triton.jit(do_not_specialize=["unit_rows"])
def adamw_ema_kernel(
    rows, owners, gradients, numbers, decision, weight, keep, momentum, unit_rows,
    PARAMETER_CODE: tl.constexpr, GRADIENT_CODE: tl.constexpr, EXP_AVG_CODE: tl.constexpr,
    EXP_AVG_SQ_CODE: tl.constexpr, TEACHER_CODE: tl.constexpr, SHADOW_CODE: tl.constexpr,
    TEACHER_SHADOW_CODE: tl.constexpr, UNIT_COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one parameter and of all tensors that belong to it.

    The codes are dtype codes, None if no tensor has that role. weight, keep and momentum are as in
    ema_kernel. unit_rows: the row of the table whose teacher's copy has rows of norm 1, of
    UNIT_COLUMNS elements, which divide PART; None if there is no such row.
    """
    choice = ALL
    if decision is not None:
        choice = tl.load(decision)
    if choice != NOTHING:
        weight, keep = ema_weights(weight, keep, momentum)
        owner, row, start, left = find_chunk(rows, owners, CHUNK)
        gradient_row = gradients + owner * ROW
        number = numbers + owner * NUMBERS
        unit = False
        if UNIT_COLUMNS is not None:
            unit = owner == unit_rows
        together, _ = find_tensor(gradient_row, 0)
        moves = (together != 0) & (choice == ALL)
        for role in tl.static_range(6):
            address, _ = find_tensor(row, role)
            together = together | address  # a missing tensor has address 0
        if (left >= CHUNK) & (together % 16 == 0):
            _update(
                row, gradient_row, number, moves, weight, keep, start, left,
                PARAMETER_CODE, GRADIENT_CODE, EXP_AVG_CODE, EXP_AVG_SQ_CODE, TEACHER_CODE,
                SHADOW_CODE, TEACHER_SHADOW_CODE, UNIT_COLUMNS, unit, CHUNK, True,
            )  # fmt: skip
        else:
            part = 0
            while part < tl.minimum(left, CHUNK):
                _update(
                    row, gradient_row, number, moves, weight, keep, start + part, left - part,
                    PARAMETER_CODE, GRADIENT_CODE, EXP_AVG_CODE, EXP_AVG_SQ_CODE, TEACHER_CODE,
                    SHADOW_CODE, TEACHER_SHADOW_CODE, UNIT_COLUMNS, unit, PART, False,
                )  # fmt: skip
                part += PART


@triton.jit
def _update(
    row, gradient_row, number, moves, weight, keep, start, left,
    PARAMETER_CODE: tl.constexpr, GRADIENT_CODE: tl.constexpr,
    EXP_AVG_CODE: tl.constexpr, EXP_AVG_SQ_CODE: tl.constexpr, TEACHER_CODE: tl.constexpr,
    SHADOW_CODE: tl.constexpr, TEACHER_SHADOW_CODE: tl.constexpr,
    UNIT_COLUMNS: tl.constexpr, unit,
    SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Update SIZE elements from `start`; the parameter itself only if it `moves`."""
    parameter, code = find_tensor(row, PARAMETER)
    p = load_chunk(parameter, code, start, left, PARAMETER_CODE, SIZE, WHOLE)
    if TEACHER_CODE is not None:
        teacher, teacher_code = find_tensor(row, TEACHER)
        t = p
        if teacher != 0:  # loaded here, so that all loads are in flight at once
            t = load_chunk(teacher, teacher_code, start, left, TEACHER_CODE, SIZE, WHOLE)
    if GRADIENT_CODE is not None:
        if moves:
            p = _adamw(
                p, row, gradient_row, number, start, left,
                GRADIENT_CODE, EXP_AVG_CODE, EXP_AVG_SQ_CODE, SIZE, WHOLE,
            )  # fmt: skip
            p = store_chunk(p, parameter, code, start, left, PARAMETER_CODE, SIZE, WHOLE)
    if SHADOW_CODE is not None:
        shadow, shadow_code = find_tensor(row, SHADOW)
        if shadow != 0:
            store_chunk(p, shadow, shadow_code, start, left, SHADOW_CODE, SIZE, WHOLE)
    if TEACHER_CODE is not None:
        if teacher != 0:
            t = blend(t, p, weight, keep)
            t = store_chunk(t, teacher, teacher_code, start, left, TEACHER_CODE, SIZE, WHOLE)
            if TEACHER_SHADOW_CODE is not None:
                copy, copy_code = find_tensor(row, TEACHER_SHADOW)
                if copy != 0:
                    if UNIT_COLUMNS is not None:
                        if unit:
                            t = _unit_rows(t, UNIT_COLUMNS, SIZE)
                    store_chunk(t, copy, copy_code, start, left, TEACHER_SHADOW_CODE, SIZE, WHOLE)


@triton.jit
def _unit_rows(t, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """Divide each row of COLUMNS values by its norm; rows beyond the tensor's end are 0."""
    rows = tl.reshape(t, [SIZE // COLUMNS, COLUMNS])
    norms = tl.sqrt_rn(tl.sum(rows * rows, axis=1, keep_dims=True))
    norms = tl.maximum(norms, UNIT_EPS)
    return tl.reshape(tl.div_rn(rows, tl.broadcast_to(norms, rows.shape)), [SIZE])


@triton.jit
def _adamw(
    p, row, gradient_row, number, start, left,
    GRADIENT_CODE: tl.constexpr, EXP_AVG_CODE: tl.constexpr, EXP_AVG_SQ_CODE: tl.constexpr,
    SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the new parameter and store the moments."""
    gradient, code = find_tensor(gradient_row, 0)
    exp_avg, m_code = find_tensor(row, EXP_AVG)
    exp_avg_sq, v_code = find_tensor(row, EXP_AVG_SQ)
    g = load_chunk(gradient, code, start, left, GRADIENT_CODE, SIZE, WHOLE)
    m = load_chunk(exp_avg, m_code, start, left, EXP_AVG_CODE, SIZE, WHOLE)
    v = load_chunk(exp_avg_sq, v_code, start, left, EXP_AVG_SQ_CODE, SIZE, WHOLE)
    # Loaded before the stores, which may alias them: the compiler would not reorder.
    factor = tl.load(number + FACTOR)
    decay = tl.load(number + DECAY)
    step_size = tl.load(number + STEP_SIZE)
    root_scale = tl.load(number + ROOT_SCALE)
    eps = tl.load(number + EPS)
    weight1 = tl.load(number + WEIGHT1)
    weight2 = tl.load(number + WEIGHT2)
    g = g * factor
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    store_chunk(m, exp_avg, m_code, start, left, EXP_AVG_CODE, SIZE, WHOLE)
    store_chunk(v, exp_avg_sq, v_code, start, left, EXP_AVG_SQ_CODE, SIZE, WHOLE)
    p -= decay * p
    return p - step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)


def launch_adamw_ema(table: PointerTable, gradients: PointerTable, call: Call) -> Tensor | None:
    """Update all tensors of the table; others are neither updated nor counted.

    Args:
        table: a row for each of the call's parameters, of ROLES, in chunks of CHUNK; a row without
            tensors for a parameter that is updated elsewhere.
        gradients: of one role, a row for each parameter.
        call: on the table's device.

    Returns: the result of decide_kernel, int32 [1]; None if there was nothing to decide.
    """
    with device_guard(table.rows):
        decision = _decide(call)
        numbers = torch.empty(
            (len(table.rows), NUMBERS.value), dtype=torch.float32, device=call.steps.device
        )
        for group in call.groups:
            _prepare(table, gradients, numbers, decision, call, group)
        if len(table.owners) == 0:
            return decision
        on_device = isinstance(call.momentum, Tensor)
        unit_columns = None
        if call.unit_rows is not None:
            unit_columns = call.tensors.parameters[call.unit_rows].shape[1]
        codes = dict(zip(_CODES, (*table.codes, *gradients.codes), strict=True))
        adamw_ema_kernel[(len(table.owners),)](
            table.rows, table.owners, gradients.rows, numbers, decision,
            0.0 if on_device else float(1 - call.momentum),
            0.0 if on_device else float(call.momentum),
            call.momentum if on_device else None,
            call.unit_rows, **codes, UNIT_COLUMNS=unit_columns, CHUNK=CHUNK,
            num_warps=NUM_WARPS, **backend_options(maxnreg=MAX_REGISTERS),
        )  # fmt: skip
    return decision


def _decide(call: Call) -> Tensor | None:
    if call.skip is None and call.found_inf is None and call.refused_steps is None:
        return None
    decision = torch.empty(1, dtype=torch.int32, device=call.steps.device)
    decide_kernel[(1,)](
        call.norms,
        0 if call.norms is None else len(call.norms),
        _as_bytes(call.skip),
        _as_bytes(call.found_inf),
        call.refused_steps,
        decision,
        BLOCK=NORMS,
    )
    return decision


def _as_bytes(flag: Tensor | None) -> Tensor | None:
    return flag.view(torch.uint8) if flag is not None and flag.dtype == torch.bool else flag


def _prepare(
    table: PointerTable,
    gradients: PointerTable,
    numbers: Tensor,
    decision: Tensor | None,
    call: Call,
    group: Group,
) -> None:
    if group.count == 0:
        return
    max_norm = None if call.max_norm is None or math.isinf(call.max_norm) else float(call.max_norm)
    prepare_kernel[(triton.cdiv(group.count, PARAMETERS),)](
        table.rows, gradients.rows, call.steps, None if max_norm is None else call.norms, decision,
        call.grad_scale, numbers, group.first, group.count,
        *_number_or_tensor(group.lr), *_number_or_tensor(group.weight_decay),
        1 - group.beta1, 1 - group.beta2, _log2(group.beta1), _log2(group.beta2), group.eps,
        max_norm, BLOCK=PARAMETERS,
    )  # fmt: skip


def _number_or_tensor(value: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (value, None)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf

# mypy: disable-error-code="no-untyped-def"
"""Clip, AdamW, EMA and low-precision copies as one kernel over tables of pointers, without atomics.

1. sum_squares_kernel of clip_triton.py, if the norms are not known.
2. prepare_kernel, one program per parameter: its norm, and the NUMBERS of its step.
3. adamw_ema_kernel, one program per chunk of all tensors of one parameter.

Bytes per parameter, in fp32: parameter, gradient, both moments and teacher are read, all but the
gradient are written: 36, plus 2 for each bf16 copy. A parameter without a gradient: 12, as in the
EMA.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import clip_triton, reference
from .adamw_ema_arguments import Call
from .chunk_triton import PART, find_chunk, find_tensor, load_chunk, store_chunk
from .clip_triton import clip_factor, launch_sum_squares, norm_of
from .dispatch import backend_options, device_guard
from .ema_triton import blend, ema_scale
from .pointer_table import thread_cache, upload
from .tensor_lists import Tables, present

# 8 elements per thread of five tensors: 160 bytes of fp32 loads in flight per thread.
CHUNK = 2048
NUM_WARPS = 8
# Three programs per multiprocessor. Without a limit ptxas aims at 64 registers, and spills.
MAX_REGISTERS = 80

# Columns of the words; the gradients have a table of their own, as they move more often.
PARAMETER, EXP_AVG, EXP_AVG_SQ, TEACHER, SHADOW, TEACHER_SHADOW, STEP, GROUP = map(
    tl.constexpr, range(8)
)
ROLES = tl.constexpr(8)
UNIT_EPS = tl.constexpr(reference.UNIT_EPS)

# Hyperparameters of each group, fp64 [groups, HYPER], and the results of prepare_kernel for each
# parameter, fp32 [n, NUMBERS]. Both have EPS, WEIGHT1 = 1 - beta1 and WEIGHT2.
HYPER, NUMBERS = tl.constexpr(7), tl.constexpr(8)
LR, DECAY, LOG2_BETA1, LOG2_BETA2, EPS, WEIGHT1, WEIGHT2 = map(tl.constexpr, range(7))
FACTOR = tl.constexpr(0)  # of the gradient: clip factor / loss scale
SHRINK = tl.constexpr(1)  # lr * weight_decay
STEP_SIZE = tl.constexpr(2)  # lr / (1 - beta1^step)
ROOT_SCALE = tl.constexpr(3)  # 1 / sqrt(1 - beta2^step)
COUNT = tl.constexpr(7)  # the new step count


@triton.jit(do_not_specialize=["chunks"])
def prepare_kernel(
    rows, partials, chunks, words, gradients, hyper, norms, flag, grad_scale, numbers, max_norm,
    EACH: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Compute the NUMBERS of one parameter's step, which is not counted yet.

    With `partials` also store its norm, or that of all gradients unless EACH, in norms; else the
    norms are given, or None. Set flag [], if given, to 1 if the norm is not finite. grad_scale and
    max_norm may be None. 1 - beta^step is computed in fp64, as fp32 keeps four digits of 1 - 0.999.
    """
    index = tl.program_id(0)
    place = 0
    if EACH:
        place = index
    norm = 0.0
    if partials is not None:
        norm = norm_of(rows, partials, chunks, index, EACH, CHUNK, PARTIALS)
        if grad_scale is not None:
            norm = tl.div_rn(norm, tl.load(grad_scale).to(tl.float32))
        tl.store(norms + place, norm)
    elif norms is not None:
        norm = tl.load(norms + place)
    if flag is not None:
        tl.store(flag, 1, mask=(tl.abs(norm) < float("inf")) == 0)  # NaN is not <
    factor = 1.0
    if max_norm is not None:
        factor = clip_factor(norm, max_norm, EACH)
    if grad_scale is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale).to(tl.float32))

    count = 1.0
    address, _ = find_tensor(words, index, STEP, ROLES)
    if address != 0:
        count = tl.load(address.to(tl.pointer_type(tl.float32))) + 1
    h = hyper + tl.load(words + index * ROLES + GROUP) * HYPER
    rate = tl.load(h + LR)
    correction1 = 1 - tl.exp2(count.to(tl.float64) * tl.load(h + LOG2_BETA1))
    correction2 = 1 - tl.exp2(count.to(tl.float64) * tl.load(h + LOG2_BETA2))
    number = numbers + index * NUMBERS
    tl.store(number + FACTOR, factor)
    tl.store(number + SHRINK, rate * tl.load(h + DECAY))
    tl.store(number + STEP_SIZE, rate / correction1)
    tl.store(number + ROOT_SCALE, 1 / tl.sqrt(correction2))
    tl.store(number + EPS, tl.load(h + EPS))
    tl.store(number + WEIGHT1, tl.load(h + WEIGHT1))
    tl.store(number + WEIGHT2, tl.load(h + WEIGHT2))
    tl.store(number + COUNT, count)


@triton.jit
def _may_change(skip, found_inf, flag, refused):
    """Return (update the teacher, update the parameter); program 0 counts a refused step."""
    nothing = tl.cast(0, tl.int32)
    overflow = tl.cast(0, tl.int32)
    if skip is not None:
        nothing = (tl.load(skip) != 0).to(tl.int32)
    if found_inf is not None:
        overflow = (tl.load(found_inf) != 0).to(tl.int32)
    if refused is not None:
        refuses = tl.load(flag) * (1 - overflow)
        if tl.program_id(0) == 0:
            before = tl.load(refused)
            tl.store(refused, before + refuses.to(before.dtype))
        nothing = tl.maximum(nothing, refuses)
    return nothing == 0, (nothing | overflow) == 0


@triton.jit(do_not_specialize=["unit_rows"])
def adamw_ema_kernel(
    rows, owners, words, gradients, numbers, skip, found_inf, flag, refused,
    weight, keep, momentum, unit_rows,
    PARAMETER_CODE: tl.constexpr, EXP_AVG_CODE: tl.constexpr, EXP_AVG_SQ_CODE: tl.constexpr,
    TEACHER_CODE: tl.constexpr, SHADOW_CODE: tl.constexpr, TEACHER_SHADOW_CODE: tl.constexpr,
    GRADIENT_CODE: tl.constexpr, UNIT_COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one parameter and of all tensors that belong to it.

    The codes are dtype codes, None if no tensor has that role. Flags and `refused` are as in
    adamw_ema_update_, or None; flag [] is prepare_kernel's. weight, keep and momentum are as in
    ema_kernel. unit_rows: the index of the parameter whose teacher's copy has rows of norm 1, of
    UNIT_COLUMNS elements, which divide PART; None if there is no such parameter.
    """
    changes, moves = _may_change(skip, found_inf, flag, refused)
    if changes:
        scale, near_teacher = ema_scale(weight, keep, momentum)
        owner, start, left = find_chunk(rows, owners, CHUNK)
        number = numbers + owner * NUMBERS
        unit = False
        if UNIT_COLUMNS is not None:
            unit = owner == unit_rows
        word = tl.load(gradients + owner)
        moves = moves & (word != 0)
        together, _ = find_tensor(gradients, owner, 0, 1)
        for role in tl.static_range(6):
            address, _ = find_tensor(words, owner, role, ROLES)
            together = together | address  # a missing tensor has address 0
        if moves & (start == 0):
            step, _ = find_tensor(words, owner, STEP, ROLES)
            tl.store(step.to(tl.pointer_type(tl.float32)), tl.load(number + COUNT))
        if (left >= CHUNK) & (together % 16 == 0):
            _update(
                words, gradients, owner, number, moves, scale, near_teacher, start, left,
                PARAMETER_CODE, GRADIENT_CODE, EXP_AVG_CODE, EXP_AVG_SQ_CODE, TEACHER_CODE,
                SHADOW_CODE, TEACHER_SHADOW_CODE, UNIT_COLUMNS, unit, CHUNK, True,
            )  # fmt: skip
        else:
            part = 0
            while part < tl.minimum(left, CHUNK):
                _update(
                    words, gradients, owner, number, moves, scale, near_teacher, start + part,
                    left - part,
                    PARAMETER_CODE, GRADIENT_CODE, EXP_AVG_CODE, EXP_AVG_SQ_CODE, TEACHER_CODE,
                    SHADOW_CODE, TEACHER_SHADOW_CODE, UNIT_COLUMNS, unit, PART, False,
                )  # fmt: skip
                part += PART


@triton.jit
def _update(
    words, gradients, owner, number, moves, scale, near_teacher, start, left,
    PARAMETER_CODE: tl.constexpr, GRADIENT_CODE: tl.constexpr,
    EXP_AVG_CODE: tl.constexpr, EXP_AVG_SQ_CODE: tl.constexpr, TEACHER_CODE: tl.constexpr,
    SHADOW_CODE: tl.constexpr, TEACHER_SHADOW_CODE: tl.constexpr,
    UNIT_COLUMNS: tl.constexpr, unit,
    SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Update SIZE elements from `start`; the parameter itself only if it `moves`."""
    parameter, code = find_tensor(words, owner, PARAMETER, ROLES)
    p = load_chunk(parameter, code, start, left, PARAMETER_CODE, SIZE, WHOLE)
    if TEACHER_CODE is not None:
        teacher, teacher_code = find_tensor(words, owner, TEACHER, ROLES)
        t = p
        if teacher != 0:  # loaded here, so that all loads are in flight at once
            t = load_chunk(teacher, teacher_code, start, left, TEACHER_CODE, SIZE, WHOLE)
    if GRADIENT_CODE is not None:
        if moves:
            p = _adamw(
                p, words, gradients, owner, number, start, left,
                GRADIENT_CODE, EXP_AVG_CODE, EXP_AVG_SQ_CODE, SIZE, WHOLE,
            )  # fmt: skip
            p = store_chunk(p, parameter, code, start, left, PARAMETER_CODE, SIZE, WHOLE)
    if SHADOW_CODE is not None:
        shadow, shadow_code = find_tensor(words, owner, SHADOW, ROLES)
        if shadow != 0:
            store_chunk(p, shadow, shadow_code, start, left, SHADOW_CODE, SIZE, WHOLE)
    if TEACHER_CODE is not None:
        if teacher != 0:
            t = blend(t, p, scale, near_teacher)
            t = store_chunk(t, teacher, teacher_code, start, left, TEACHER_CODE, SIZE, WHOLE)
            if TEACHER_SHADOW_CODE is not None:
                copy, copy_code = find_tensor(words, owner, TEACHER_SHADOW, ROLES)
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
    p, words, gradients, owner, number, start, left,
    GRADIENT_CODE: tl.constexpr, EXP_AVG_CODE: tl.constexpr, EXP_AVG_SQ_CODE: tl.constexpr,
    SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the new parameter and store the moments."""
    gradient, code = find_tensor(gradients, owner, 0, 1)
    exp_avg, m_code = find_tensor(words, owner, EXP_AVG, ROLES)
    exp_avg_sq, v_code = find_tensor(words, owner, EXP_AVG_SQ, ROLES)
    g = load_chunk(gradient, code, start, left, GRADIENT_CODE, SIZE, WHOLE)
    m = load_chunk(exp_avg, m_code, start, left, EXP_AVG_CODE, SIZE, WHOLE)
    v = load_chunk(exp_avg_sq, v_code, start, left, EXP_AVG_SQ_CODE, SIZE, WHOLE)
    # Loaded before the stores, which may alias them: the compiler would not reorder.
    factor = tl.load(number + FACTOR)
    shrink = tl.load(number + SHRINK)
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
    p -= shrink * p
    return p - step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)


def launch_adamw_ema(
    state: Tables, gradients: Tables, call: Call, norms: Tensor | None
) -> Tensor | None:
    """Update all tensors.

    Args:
        state: tables of the words' columns, in chunks of CHUNK.
        gradients: tables of one role, in chunks of clip_triton.CHUNK.
        call: the options, on the tables' device.
        norms: of the gradients, if they are known.

    Returns: the norms, which are measured if they are needed.
    """
    device, count = state.pointers.words.device, len(call.steps)
    if norms is not None:
        norms = norms.float().contiguous()
    with device_guard(state.pointers.words):
        flag = partials = None
        measures = call.needs_norms and norms is None
        if call.refused_steps is not None:
            make = torch.empty if measures else torch.zeros  # the measuring kernel sets it to 0
            flag = make((), dtype=torch.int32, device=device)
        if measures:
            partials = launch_sum_squares(gradients, flag)
            shape = (count,) if call.each else ()
            norms = torch.empty(shape, dtype=torch.float32, device=device)
        numbers = torch.empty((count, NUMBERS.value), dtype=torch.float32, device=device)
        max_norm = None if call.max_norm in (None, math.inf) else call.max_norm
        prepare_kernel[(count,)](
            gradients.chunks.rows, partials, 0 if partials is None else len(partials),
            state.pointers.words, gradients.pointers.words, _hyperparameters(call, device),
            norms, flag, call.grad_scale, numbers, max_norm,
            EACH=call.each, CHUNK=clip_triton.CHUNK, PARTIALS=clip_triton.PARTIALS,
            num_warps=clip_triton.TENSOR_WARPS,
        )  # fmt: skip
        on_device = isinstance(call.momentum, Tensor)
        columns = None
        if call.unit_rows is not None:
            columns = present([call.lists["parameters"]])[call.unit_rows].shape[1]
        *codes, _steps = state.pointers.codes
        adamw_ema_kernel[(len(state.chunks.owners),)](
            state.chunks.rows, state.chunks.owners, state.pointers.words, gradients.pointers.words,
            numbers, _as_bytes(call.skip), _as_bytes(call.found_inf), flag, call.refused_steps,
            0.0 if on_device else float(1 - call.momentum),
            0.0 if on_device else float(call.momentum),
            call.momentum if on_device else None, call.unit_rows,
            *codes, gradients.pointers.codes[0], columns, CHUNK,
            num_warps=NUM_WARPS, **backend_options(maxnreg=MAX_REGISTERS),
        )  # fmt: skip
    return norms


def _as_bytes(flag: Tensor | None) -> Tensor | None:
    return flag.view(torch.uint8) if flag is not None and flag.dtype == torch.bool else flag


def _hyperparameters(call: Call, device: torch.device) -> Tensor:
    """Return the hyperparameters of all groups, uploaded only if a number changed."""
    values: list[float] = []
    tensors: list[tuple[int, Tensor]] = []
    for group in call.groups:
        for value in (group.lr, group.weight_decay):
            if isinstance(value, Tensor):
                tensors.append((len(values), value))
            values.append(0.0 if isinstance(value, Tensor) else value)
        betas = group.beta1, group.beta2
        values += [math.log2(beta) if beta > 0 else -math.inf for beta in betas]
        values += [group.eps, 1 - group.beta1, 1 - group.beta2]
    # A table that is written belongs to its tensors: calls with others may run at the same time.
    key = values, [tensor.data_ptr() for _, tensor in tensors]
    # A schedule makes a table in each step, which must not displace those of the tensors.
    cache = thread_cache("hyperparameters")
    table: Tensor = cache.get(key, device, lambda: upload(values, device, "d"))
    if tensors:
        torch._foreach_copy_([table[i] for i, _ in tensors], [value for _, value in tensors])
    return table

"""adamw_ema_update_ by PyTorch's fused AdamW and multi-tensor operations, on any device.

Scaled gradients are written to new memory. On a CPU the host reads the flags, and a refused step
costs nothing. On other devices nothing is read back, and flags select the old values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .adamw_ema_arguments import Call, Group
from .clip import clip_factors
from .dispatch import compute_dtype
from .ema import torch_ema_
from .memory import are_flat
from .tensor_lists import Lists, present

ROWS_OF_A_BLOCK = 256  # 256 kB in fp32 for 256 features


def torch_adamw_ema_(call: Call, local: Lists, norms: Tensor | None) -> None:
    """Update checked tensors.

    Args:
        call: the options.
        local: the lists of the call, with the shards of DTensors.
        norms: of the gradients; None if they are not needed.
    """
    overflow = None if call.found_inf is None else call.found_inf != 0
    nothing = None if call.skip is None else call.skip != 0
    if call.refused_steps is not None:
        assert norms is not None
        bad = ~norms.isfinite().all()
        bad = bad if overflow is None else bad & ~overflow
        call.refused_steps.add_(bad)
        nothing = bad if nothing is None else nothing | bad
    moves = True
    if reads_flags(local):
        if nothing is not None and nothing:
            return
        moves = overflow is None or not overflow
        overflow = nothing = None
    if moves:
        flags = [flag for flag in (overflow, nothing) if flag is not None]
        _move(call, local, norms, torch.stack(flags).any().float() if flags else None)
    _average(local, call.momentum, call.unit_rows, nothing)


def reads_flags(local: Lists) -> bool:
    """Return True if the host can read flags without waiting for a device."""
    return present(local.values())[0].is_cpu


def _move(call: Call, local: Lists, norms: Tensor | None, stays: Tensor | None) -> None:
    """Scale the gradients and step AdamW, group by group; nothing changes if `stays` is 1."""
    parameters, exp_avgs, exp_avg_sqs, *_, gradients = local.values()
    factors = _factors(call, norms)
    first = 0
    for group in call.groups:
        rows = range(first, first + group.count)
        first += group.count
        indices = [i for i in rows if gradients[i] is not None]
        lists = (parameters, gradients, exp_avgs, exp_avg_sqs, call.steps)
        p, g, m, v, steps = (present([[some[i] for i in indices]]) for some in lists)
        g = [x.resolve_neg() for x in g]  # not supported by the fused operator
        if not indices:
            continue
        if factors is not None:
            # Wide first: half times a 0-d fp32 tensor would round the tensor to half.
            g = [x.to(compute_dtype(*four)) for x, *four in zip(g, g, p, m, v)]
            g = list(torch._foreach_mul(g, [factors[i] for i in indices]))
        counted = torch.ones_like(steps[0]) if stays is None else 1 - stays
        torch._foreach_add_(steps, [counted] * len(steps))
        _adamw(list(zip(p, g, m, v, steps)), group, stays)


def _factors(call: Call, norms: Tensor | None) -> Sequence[Tensor] | None:
    """Return the factor [] of each gradient, clip factor / loss scale; None if all are 1."""
    n, factors = len(call.steps), None
    if call.max_norm is not None and norms is not None:
        factors = clip_factors(norms, call.max_norm, each=call.each)
    if call.grad_scale is not None:
        ones = torch.ones_like(call.grad_scale)
        factors = (ones if factors is None else factors) / call.grad_scale
    if factors is None or (factors.is_cpu and bool((factors == 1).all())):
        return None
    return factors.expand(n).unbind()


def _adamw(rows: Sequence[tuple[Tensor, ...]], group: Group, stays: Tensor | None) -> None:
    """Run one multi-tensor update per dtype; tensors that do not match are copied back after it.

    Args:
        rows: (parameter, gradient, exp_avg, exp_avg_sq, step), the step already counted.
        group: their hyperparameters.
        stays: if it is 1, no tensor changes.
    """
    by_dtype: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
    back: list[tuple[Tensor, Tensor]] = []
    for *four, step in rows:
        work, dtype, flat = four, four[0].dtype, are_flat(four)
        alike = len({x.dtype for x in four}) == 1
        if not alike or not flat:
            dtype = dtype if alike else compute_dtype(*four)
            work = [x.to(dtype) if flat else x.to(dtype).contiguous() for x in four]
            back += [(four[i], work[i]) for i in (0, 2, 3) if work[i] is not four[i]]
        by_dtype.setdefault(dtype, []).append((*work, step))
    for some in by_dtype.values():
        _fused(*map(list, zip(*some)), group=group, stays=stays)
    if back:
        torch._foreach_copy_([x for x, _ in back], [w for _, w in back])


def _fused(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    group: Group,
    stays: Tensor | None,
) -> None:
    lr, weight_decay = group.lr, group.weight_decay
    if isinstance(weight_decay, Tensor):  # not supported by the operator
        decay = 1 - lr * weight_decay
        kept = decay if stays is None else torch.where(stays != 0, torch.ones_like(decay), decay)
        torch._foreach_mul_(parameters, kept.to(compute_dtype(parameters[0])))
        weight_decay = 0.0
    torch._fused_adamw_(
        parameters, gradients, exp_avgs, exp_avg_sqs, [], steps,
        lr=lr.float() if isinstance(lr, Tensor) else lr,
        beta1=group.beta1, beta2=group.beta2, weight_decay=weight_decay, eps=group.eps,
        amsgrad=False, maximize=False, found_inf=stays,
    )  # fmt: skip


def _copy_unit_rows(copy: Tensor | None, teacher: Tensor) -> None:
    """Write the rows of a teacher divided by their norms, on a CPU in blocks for its caches."""
    if copy is None:
        return
    step = ROWS_OF_A_BLOCK if teacher.device.type == "cpu" else len(teacher)
    for part, rows in zip(copy.split(step), teacher.split(step)):
        part.copy_(reference.unit_rows(rows.to(compute_dtype(rows))))


def _average(
    local: Lists, momentum: float | Tensor, unit_rows: int | None, nothing: Tensor | None
) -> None:
    """Update teachers and copies, or keep all their values if `nothing` is true."""
    parameters, _, _, teachers, shadows, teacher_shadows, _ = local.values()
    written = present([teachers, shadows, teacher_shadows])
    before = [] if nothing is None else [x.clone() for x in written]
    pairs = [(t, p) for t, p in zip(teachers, parameters) if t is not None]
    torch_ema_([t for t, _ in pairs], [p for _, p in pairs if p is not None], momentum)
    copied = [*zip(shadows, parameters), *zip(teacher_shadows, teachers)]
    if unit_rows is not None and (teacher := teachers[unit_rows]) is not None:
        copied[len(shadows) + unit_rows] = (None, None)
        _copy_unit_rows(teacher_shadows[unit_rows], teacher)
    both = [pair for pair in copied if pair[0] is not None]
    if both:
        copies, originals = (present([some]) for some in zip(*both))
        torch._foreach_copy_(copies, originals)
    if nothing is not None and written:
        kept = [torch.where(nothing, b, x) for b, x in zip(before, written)]
        torch._foreach_copy_(written, kept)

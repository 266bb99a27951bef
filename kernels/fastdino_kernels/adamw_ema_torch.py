"""adamw_ema_update_ by PyTorch's fused AdamW and multi-tensor operations, on any device.

Gradients that have to be scaled are so into memory of their own. (A slice at a time, through a
buffer that stays in the cache, is slower on a CPU: many small operations wait for its threads.)
On a CPU the host may read what it likes, and a refused step costs nothing. Elsewhere nothing is
read, and flags select what stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .adamw_ema_call import Call, Group, Tensors
from .dispatch import compute_dtype
from .ema import torch_ema_


def update_on_host(call: Call, gaps: Sequence[int]) -> None:
    """The update of tensors on a CPU.

    Args:
        call: what to update, and by what.
        gaps: indices of parameters of whose tensors not all are dense and laid out alike.
    """
    averages, moves = _decide_on_host(call)
    if moves:
        factors = _factors_on_host(call)
        for group in call.groups:
            lr, weight_decay = float(group.lr), float(group.weight_decay)
            group = replace(group, lr=lr, weight_decay=weight_decay)
            _adamw_on_host(call, group, factors, frozenset(gaps))
    if averages:
        _average(call.tensors, float(call.momentum), call.unit_rows)


def _decide_on_host(call: Call) -> tuple[bool, bool]:
    """(whether the teacher is averaged, whether the parameters move)."""
    overflow = call.found_inf is not None and bool(call.found_inf)
    if call.refused_steps is not None and not overflow:
        assert call.norms is not None
        if not bool(torch.isfinite(call.norms).all()):
            call.refused_steps.add_(1)
            return False, False
    averages = call.skip is None or not bool(call.skip)
    return averages, averages and not overflow


def _factors_on_host(call: Call) -> list[float]:
    """What each gradient is to be multiplied by."""
    scale = 1.0 if call.grad_scale is None else call.grad_scale.item()
    if call.max_norm is None or call.norms is None:
        return [1 / scale] * len(call.steps)
    clips = [call.max_norm / (norm + reference.CLIP_EPS) for norm in call.norms.tolist()]
    return [(clip if clip < 1 else 1.0) / scale for clip in clips]  # NaN is not < 1


def _adamw_on_host(
    call: Call, group: Group, factors: Sequence[float], gaps: frozenset[int]
) -> None:
    indices = _moving(call.tensors, group)
    steps = _count_steps(call.steps, indices)
    quadruples = dict(_quadruples(call.tensors, indices))
    gradients = {i: g for i, (_, g, _, _) in quadruples.items()}
    scaled = [i for i in indices if factors[i] != 1]
    if scaled:
        wide = [gradients[i].to(compute_dtype(*quadruples[i])) for i in scaled]
        products = torch._foreach_mul(wide, [factors[i] for i in scaled])
        gradients.update(zip(scaled, products, strict=True))
    _adamw(call.tensors, indices, list(gradients.values()), group, steps, gaps)


def update_on_device(call: Call, gaps: Sequence[int], rows: Sequence[int] | None = None) -> None:
    """The update with nothing read back to the host.

    Args:
        call: what to update, and by what.
        gaps: as in update_on_host.
        rows: the parameters to update; all by default.
    """
    overflow = None if call.found_inf is None else call.found_inf != 0
    nothing = None if call.skip is None else call.skip != 0
    if call.refused_steps is not None:
        assert call.norms is not None
        bad = ~torch.isfinite(call.norms).all()
        bad = bad if overflow is None else bad & ~overflow
        call.refused_steps.add_(bad)
        nothing = bad if nothing is None else nothing | bad
    flags = [flag for flag in (overflow, nothing) if flag is not None]
    stays = torch.stack(flags).any().float() if flags else None
    rows = range(len(call.tensors.parameters)) if rows is None else rows
    for group in call.groups:
        indices = [i for i in _moving(call.tensors, group) if i in rows]
        _adamw_on_device(call, group, indices, frozenset(gaps), stays)
    unit = call.unit_rows
    unit = None if unit is None or unit not in rows else list(rows).index(unit)
    _average(call.tensors.take(rows), call.momentum, unit, nothing)


def _adamw_on_device(
    call: Call, group: Group, indices: Sequence[int], gaps: frozenset[int], stays: Tensor | None
) -> None:
    steps = _count_steps(call.steps, indices, stays)
    gradients = [g for _, (_, g, _, _) in _quadruples(call.tensors, indices)]
    factors = _factors_on_device(call, indices)
    if factors is not None and indices:
        # The factors are fp32: half times such a 0-d tensor would round it to half first.
        wide = [g.to(compute_dtype(g)) for g in gradients]
        gradients = list(torch._foreach_mul(wide, factors))
    _adamw(call.tensors, indices, gradients, group, steps, gaps, stays)


def _factors_on_device(call: Call, indices: Sequence[int]) -> list[Tensor] | None:
    """What each gradient is to be multiplied by; None: by 1."""
    factors = None
    if call.max_norm is not None and call.norms is not None:
        clips = call.max_norm / (call.norms + reference.CLIP_EPS)
        factors = torch.where(clips < 1, clips, torch.ones_like(clips))
    if call.grad_scale is not None:
        ones = torch.ones_like(call.steps) if factors is None else factors
        factors = ones / call.grad_scale
    if factors is None:
        return None
    parts = factors.unbind()
    return [parts[i] for i in indices]


def _moving(tensors: Tensors, group: Group) -> list[int]:
    """The parameters of a group that have a gradient."""
    everyone = range(group.first, group.first + group.count)
    return [i for i in everyone if tensors.gradients[i] is not None]


def _quadruples(
    tensors: Tensors, indices: Sequence[int]
) -> list[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """(index, (parameter, gradient, exp_avg, exp_avg_sq)) of parameters that have a gradient."""
    found = []
    for i in indices:
        g, m, v = tensors.gradients[i], tensors.exp_avgs[i], tensors.exp_avg_sqs[i]
        assert g is not None
        assert m is not None
        assert v is not None
        found.append((i, (tensors.parameters[i], g, m, v)))
    return found


def _count_steps(
    steps: Tensor, indices: Sequence[int], stays: Tensor | None = None
) -> dict[int, Tensor]:
    """One step more for each index, but for 0 where `stays` is 1; index -> its count."""
    views = steps.unbind()
    counted = {i: views[i] for i in indices}
    if counted and stays is None:
        torch._foreach_add_(list(counted.values()), 1)
    elif counted:
        assert stays is not None
        torch._foreach_add_(list(counted.values()), 1 - stays)
    return counted


def _adamw(
    tensors: Tensors,
    indices: Sequence[int],
    gradients: Sequence[Tensor],
    group: Group,
    steps: dict[int, Tensor],
    gaps: frozenset[int],
    stays: Tensor | None = None,
) -> None:
    """One multi-tensor update for each dtype; what does not fit is copied there and back."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], ...]] = {}
    back: list[tuple[Tensor, Tensor]] = []
    for (i, (p, _, m, v)), g in zip(_quadruples(tensors, indices), gradients, strict=True):
        work, dtype = [p, g, m, v], p.dtype
        alike = len({p.dtype, g.dtype, m.dtype, v.dtype}) == 1
        if not alike or i in gaps:
            dtype = dtype if alike else compute_dtype(p, g, m, v)
            work = [x.to(dtype).contiguous() if i in gaps else x.to(dtype) for x in work]
            replaced = zip((p, m, v), (work[0], *work[2:]), strict=True)
            back += [(x, w) for x, w in replaced if w is not x]
        lists = by_dtype.setdefault(dtype, ([], [], [], [], []))
        for some, tensor in zip(lists, (*work, steps[i]), strict=True):
            some.append(tensor)
    for lists in by_dtype.values():
        _fused(lists, group, stays)
    if back:
        torch._foreach_copy_([x for x, _ in back], [w for _, w in back])


def _fused(lists: tuple[list[Tensor], ...], group: Group, stays: Tensor | None = None) -> None:
    """torch._fused_adamw_ over (parameters, gradients, exp_avgs, exp_avg_sqs, steps)."""
    parameters, gradients, exp_avgs, exp_avg_sqs, steps = lists
    lr, weight_decay = group.lr, group.weight_decay
    if isinstance(weight_decay, Tensor):  # which the operator does not take
        decay = 1 - lr * weight_decay
        kept = decay if stays is None else torch.where(stays != 0, torch.ones_like(decay), decay)
        torch._foreach_mul_(parameters, kept.to(compute_dtype(parameters[0])))
        weight_decay = 0.0
    torch._fused_adamw_(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr.float() if isinstance(lr, Tensor) else lr,
        beta1=group.beta1,
        beta2=group.beta2,
        weight_decay=weight_decay,
        eps=group.eps,
        amsgrad=False,
        maximize=False,
        found_inf=stays,
    )


def _copies(tensors: Tensors, unit_rows: int | None) -> list[tuple[Tensor, Tensor]]:
    """(copy, what it is a copy of), of teachers as they are now."""
    sources = list(tensors.teachers)
    if unit_rows is not None:
        teacher = sources[unit_rows]
        assert teacher is not None
        sources[unit_rows] = reference.unit_rows(teacher.to(compute_dtype(teacher)))
    copied = ((tensors.shadows, tensors.parameters), (tensors.teacher_shadows, sources))
    return [
        (copy, source)
        for copies, sources in copied
        for copy, source in zip(copies, sources, strict=True)
        if copy is not None and source is not None
    ]


def _average(
    tensors: Tensors,
    momentum: float | Tensor,
    unit_rows: int | None,
    nothing: Tensor | None = None,
) -> None:
    """The EMA and the copies; all stays as it was where `nothing` is true."""
    averaged = [i for i, t in enumerate(tensors.teachers) if t is not None]
    teachers = [t for t in tensors.teachers if t is not None]
    copies = (*tensors.shadows, *tensors.teacher_shadows)
    written = [*teachers, *(copy for copy in copies if copy is not None)]
    before = [] if nothing is None else [x.clone() for x in written]
    torch_ema_(teachers, [tensors.parameters[i] for i in averaged], momentum)
    pairs = _copies(tensors, unit_rows)
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [source for _, source in pairs])
    if nothing is not None and written:
        kept = [torch.where(nothing, b, x) for b, x in zip(before, written, strict=True)]
        torch._foreach_copy_(written, kept)


def update_by_reference(call: Call) -> None:
    """The plain equations, parameter by parameter, with host reads; half precision in fp32."""
    averages, moves = _decide_on_host(call)
    tensors = call.tensors
    factors = _factors_on_host(call) if moves else []
    for group in call.groups if moves else ():
        for i, quadruple in _quadruples(tensors, _moving(tensors, group)):
            wide = compute_dtype(*quadruple)
            p, g, m, v = (x.to(wide) for x in quadruple)
            call.steps[i] += 1
            after = reference.adamw(
                p, g * factors[i], m, v, call.steps[i].item(),
                lr=group.lr, betas=(group.beta1, group.beta2), eps=group.eps,
                weight_decay=group.weight_decay,
            )  # fmt: skip
            for x, value in zip((quadruple[0], *quadruple[2:]), after, strict=True):
                x.copy_(value)
    if not averages:
        return
    for p, t in zip(tensors.parameters, tensors.teachers, strict=True):
        if t is not None:
            wide = compute_dtype(t, p)
            t.copy_(reference.ema_update([t.to(wide)], [p.to(wide)], call.momentum)[0])
    for copy, source in _copies(tensors, call.unit_rows):
        copy.copy_(source)

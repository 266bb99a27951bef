"""adamw_ema_update_ by PyTorch's fused AdamW and multi-tensor operations, on any device.

Scaled gradients are written to new memory. (Scaling a slice at a time, in a buffer that stays in
the cache, is slower on a CPU: many small operations wait for its threads.) On a CPU the host reads
flags, and a refused step costs nothing. On other devices nothing is read back, and flags select the
old values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import reference
from .adamw_ema_arguments import Call, Group, Tensors
from .dispatch import compute_dtype
from .ema import torch_ema_


def update_on_host(call: Call, gaps: Sequence[int]) -> None:
    """Update tensors on a CPU.

    Args:
        call: the tensors and options.
        gaps: indices of parameters with a tensor that is not dense or has another layout.
    """
    averages, moves = _decide_on_host(call)
    if moves:
        factors = _factors_on_host(call)
        for group in call.groups:
            lr, weight_decay = float(group.lr), float(group.weight_decay)
            group = replace(group, lr=lr, weight_decay=weight_decay)
            _update_group(call, group, _moving(call.tensors, group), factors, frozenset(gaps))
    if averages:
        _average(call.tensors, float(call.momentum), call.unit_rows)


def _decide_on_host(call: Call) -> tuple[bool, bool]:
    """Return (update the teacher, update the parameters)."""
    overflow = call.found_inf is not None and bool(call.found_inf)
    if call.refused_steps is not None and not overflow:
        assert call.norms is not None
        if not bool(torch.isfinite(call.norms).all()):
            call.refused_steps.add_(1)
            return False, False
    averages = call.skip is None or not bool(call.skip)
    return averages, averages and not overflow


def _factors_on_host(call: Call) -> dict[int, float]:
    """Map the indices of the gradients to scale to their factors."""
    scale = 1.0 if call.grad_scale is None else call.grad_scale.item()
    factors = [1 / scale] * len(call.steps)
    if call.max_norm is not None and call.norms is not None:
        clips = [call.max_norm / (norm + reference.CLIP_EPS) for norm in call.norms.tolist()]
        factors = [(clip if clip < 1 else 1.0) / scale for clip in clips]  # NaN is not < 1
    return {i: factor for i, factor in enumerate(factors) if factor != 1}


def update_on_device(call: Call, gaps: Sequence[int], rows: Sequence[int] | None = None) -> None:
    """Update tensors on any device, reading nothing back to the host.

    Args:
        call: the tensors and options.
        gaps: as in update_on_host.
        rows: indices of the parameters to update; all by default.
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
    factors = _factors_on_device(call)
    for group in call.groups:
        indices = [i for i in _moving(call.tensors, group) if i in rows]
        _update_group(call, group, indices, factors, frozenset(gaps), stays)
    unit = call.unit_rows
    unit = None if unit is None or unit not in rows else list(rows).index(unit)
    _average(call.tensors.take(rows), call.momentum, unit, nothing)


def _factors_on_device(call: Call) -> dict[int, Tensor]:
    """Map the indices of the gradients to scale to their fp32 factors []."""
    factors = None
    if call.max_norm is not None and call.norms is not None:
        clips = call.max_norm / (call.norms + reference.CLIP_EPS)
        factors = torch.where(clips < 1, clips, torch.ones_like(clips))
    if call.grad_scale is not None:
        ones = torch.ones_like(call.steps) if factors is None else factors
        factors = ones / call.grad_scale
    return {} if factors is None else dict(enumerate(factors.unbind()))


def _update_group(
    call: Call,
    group: Group,
    indices: Sequence[int],
    factors: Mapping[int, Any],
    gaps: frozenset[int],
    stays: Tensor | None = None,
) -> None:
    """Scale gradients by their factors and step AdamW; nothing changes if `stays` is 1."""
    steps = _count_steps(call.steps, indices, stays)
    quadruples = {i: _quadruple(call.tensors, i) for i in indices}
    scaled = [i for i in indices if i in factors]
    if scaled:
        # Wide first: half times a 0-d fp32 tensor would round the tensor to half.
        wide = [quadruples[i][1].to(compute_dtype(*quadruples[i])) for i in scaled]
        products = torch._foreach_mul(wide, [factors[i] for i in scaled])
        for i, gradient in zip(scaled, products, strict=True):
            p, _, m, v = quadruples[i]
            quadruples[i] = (p, gradient, m, v)
    _adamw(quadruples, group, steps, gaps, stays)


def _moving(tensors: Tensors, group: Group) -> list[int]:
    """Return the indices of a group's parameters that have a gradient."""
    indices = range(group.first, group.first + group.count)
    return [i for i in indices if tensors.gradients[i] is not None]


def _quadruple(tensors: Tensors, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (parameter, gradient, exp_avg, exp_avg_sq) of a parameter with a gradient."""
    g, m, v = tensors.gradients[i], tensors.exp_avgs[i], tensors.exp_avg_sqs[i]
    assert g is not None
    assert m is not None
    assert v is not None
    return tensors.parameters[i], g, m, v


def _count_steps(
    steps: Tensor, indices: Sequence[int], stays: Tensor | None = None
) -> dict[int, Tensor]:
    """Add one step for each index, or 0 if `stays` is 1; return index -> its count."""
    views = steps.unbind()
    counted = {i: views[i] for i in indices}
    if counted and stays is None:
        torch._foreach_add_(list(counted.values()), 1)
    elif counted:
        assert stays is not None
        torch._foreach_add_(list(counted.values()), 1 - stays)
    return counted


def _adamw(
    quadruples: Mapping[int, tuple[Tensor, Tensor, Tensor, Tensor]],
    group: Group,
    steps: Mapping[int, Tensor],
    gaps: frozenset[int],
    stays: Tensor | None = None,
) -> None:
    """Run one multi-tensor update per dtype; tensors that do not match are copied back after it."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], ...]] = {}
    back: list[tuple[Tensor, Tensor]] = []
    for i, (p, g, m, v) in quadruples.items():
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
    """Run torch._fused_adamw_ on (parameters, gradients, exp_avgs, exp_avg_sqs, steps)."""
    parameters, gradients, exp_avgs, exp_avg_sqs, steps = lists
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


def _copies(tensors: Tensors, unit_rows: int | None) -> list[tuple[Tensor, Tensor]]:
    """Return (copy, source) of each copy of a parameter or of an updated teacher."""
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
    tensors: Tensors, momentum: float | Tensor, unit_rows: int | None, nothing: Tensor | None = None
) -> None:
    """Update teachers and copies, or keep all their values if `nothing` is true."""
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

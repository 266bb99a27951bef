"""The optimizer's whole pass at once: clip by norm, AdamW, the teacher's EMA, low-precision copies.

Bytes a parameter, in fp32, and in brackets with bf16 copies of student and teacher:

    |              | norms | clip | AdamW | EMA | copies | together |
    |--------------|-------|------|-------|-----|--------|----------|
    | step by step | 4     | 8    | 28    | 12  | (8)    | 52 (60)  |
    | at once      | 4     |      36            | (4)    | 40 (44)  |

Step by step the clip reads and writes a gradient (if it is clipped), AdamW reads four tensors and
writes three, the EMA reads two and writes one (and the teacher's copy), and the student is read
again for its copy. At once five are read and four are written; the gradient stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adamw_ema_call import (
    Call,
    Tensors,
    check_call,
    check_gradients,
    check_hyperparameter,
    check_lengths,
    check_state,
    check_unit_rows,
    make_group,
)
from .adamw_ema_torch import update_by_reference, update_on_device, update_on_host
from .clip import torch_norms
from .dispatch import check_float_tensor, choose_impl
from .pointer_table import (
    Plan,
    PointerTable,
    are_flat,
    are_plain,
    build_table,
    is_dense,
    plan_for,
    ranges_of,
)
from .sharded import check_sharded_alike, local_part, norms_over_shards


@torch.compiler.disable  # whose graph would end at the first address: better in one place
@torch.no_grad()
def adamw_ema_update_(
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor | None],
    exp_avgs: Iterable[Tensor | None],
    exp_avg_sqs: Iterable[Tensor | None],
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    max_norm: float | None = None,
    norms: Tensor | None = None,
    teachers: Iterable[Tensor | None] | None = None,
    momentum: float | Tensor | None = None,
    shadows: Iterable[Tensor | None] | None = None,
    teacher_shadows: Iterable[Tensor | None] | None = None,
    skip: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
    refused_steps: Tensor | None = None,
    unit_rows: int | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """Clip each gradient by its own norm, step AdamW, average the teacher: all in place, at once.

    For each parameter p with gradient g and teacher t, as clip_grad_norms_, torch.optim.AdamW and
    ema_update_ do one after the other:

        g <- g/grad_scale * min(1, max_norm/(norm + 1e-6)), norm that of g/grad_scale
        step <- step + 1;  m <- b1*m + (1 - b1)*g;  v <- b2*v + (1 - b2)*g^2
        p <- p - lr*weight_decay*p - lr * m/(1 - b1^step) / (sqrt(v/(1 - b2^step)) + eps)
        t <- momentum*t + (1 - momentum)*p

    p whose gradient is None stays, neither decayed nor counted, but t follows it. Gradients are
    only read. Half precision is computed in fp32 and rounded once. Nothing is read back to the
    host, and a captured CUDA graph sees every 0-d tensor change. All tensors are on one device.
    DTensors are updated shard by shard, by norms over all shards (one all-reduce).

    Args:
        parameters: n tensors, fp16/bf16/fp32/fp64, updated.
        gradients: n tensors of the same shapes, or None.
        exp_avgs, exp_avg_sqs: AdamW's moments m and v, updated; None where there is no gradient.
        steps: [n] fp32, contiguous: AdamW's count of each parameter's steps, updated.
        lr, weight_decay: >= 0; floats, or 0-d tensors, whose values are not checked.
        betas, eps: of AdamW.
        max_norm: > 0; None: no clipping; inf: the norms are only measured.
        norms: [n] fp32, of the gradients divided by grad_scale, if they are known already.
        teachers: n tensors or None, updated.
        momentum: in [0, 1], as in ema_update_; needed where there are teachers.
        shadows, teacher_shadows: copies of parameters and teachers, often in lower precision,
            rewritten in the same pass; n tensors or None.
        unit_rows: the index of a parameter [K, D], D a power of two up to 1024, whose teacher's
            copy gets rows of L2 norm 1: what a weight-normed layer multiplies by.
        skip: 0-d; where it is not 0, nothing at all changes, to the bit.
        found_inf: 0-d; where it is not 0, parameters, moments and steps stay, and the teacher is
            averaged: the paper's loss scaling, whose EMA does not wait for the optimizer.
        grad_scale: 0-d fp32, what the loss was multiplied by.
        refused_steps: 0-d, fp32 or integer; where it is given, a step with a norm that is NaN or
            infinite changes nothing, as with `skip`, but adds 1 here. Where found_inf is not 0,
            such norms are expected and not counted.
        impl: "triton" (no fp64), "torch" (torch's fused AdamW, multi-tensor operations),
            "reference" (one by one, with host syncs), or "auto". Triton leaves to PyTorch what is
            not dense, or not laid out like its parameter.

    Returns: norms [n] of the gradients before clipping, 0 where there is none, fp32 (fp64 where
        every gradient is fp64); None where neither max_norm nor refused_steps needs them.

    Raises:
        ValueError: lengths, shapes or devices that differ, numbers out of range, a momentum or a
            moment that is missing, DTensors that are sharded otherwise, tensors that share memory
            with one that is written, or whose own elements do; the message names the indices.
        TypeError: something that is not a dense floating-point tensor.
        RuntimeError: a CUDA graph is being captured, and no call with tensors on the GPU went
            before.

    """
    parameters = list(parameters)
    n = len(parameters)
    given = (gradients, exp_avgs, exp_avg_sqs, teachers, shadows, teacher_shadows)
    none: list[Tensor | None] = [None] * n
    lists = (none if some is None else list(some) for some in given)
    tensors = Tensors(parameters, *lists)
    check_lengths(tensors)
    if n == 0:
        choose_impl(impl, [])  # its name is checked all the same
        return None
    device = check_float_tensor("parameters[0]", parameters[0]).device
    if momentum is None:
        if any(t is not None for t in tensors.teachers):
            raise ValueError("momentum must be given where there are teachers, got None")
        momentum = 1.0
    call = Call(
        tensors,
        [make_group(0, n, lr, betas, eps, weight_decay, device)],
        steps,
        norms,
        max_norm,
        check_hyperparameter("momentum", momentum, device, most=1),
        skip,
        found_inf,
        grad_scale,
        refused_steps,
        unit_rows,
    )
    return update(call, impl)


def update(call: Call, impl: str) -> Tensor | None:
    """adamw_ema_update_ for parameters in any groups, whose numbers are checked; the norms."""
    check_call(call)
    whole = call.tensors
    check_unit_rows(whole, call.unit_rows)
    parts = _local_parts(whole)
    plan = _plan(parts, impl)
    norms = call.norms
    if norms is None and (call.max_norm is not None or call.refused_steps is not None):
        norms = _measure(parts, plan, len(call.steps))
        if parts is not whole:
            names = [f"gradients[{i}]" for i in range(len(norms))]
            norms = norms_over_shards(norms, whole.gradients[: len(norms)], names)
        if call.grad_scale is not None:
            norms = norms / call.grad_scale
    call = replace(call, tensors=parts, norms=norms)
    if plan.table is not None:
        _run_triton(call, plan)
    elif plan.impl == "reference":
        update_by_reference(call)
    elif call.steps.is_cpu:
        update_on_host(call, plan.rest)
    else:
        update_on_device(call, plan.rest)
    # Autograd notices neither what a kernel writes nor what PyTorch's fused AdamW does.
    seen = (parts.parameters, parts.teachers, parts.shadows, parts.teacher_shadows)
    torch.autograd.graph.increment_version(_present(seen))
    return norms


def _written(tensors: Tensors) -> list[list[Tensor | None]]:
    """The roles of the kernel's table, in its order."""
    parameters, _gradients, *others = tensors.lists()
    return [parameters, *others]


def _present(lists: Iterable[Iterable[Tensor | None]]) -> list[Tensor]:
    return [tensor for some in lists for tensor in some if tensor is not None]


def _local_parts(tensors: Tensors) -> Tensors:
    """This process's part of every DTensor; the same object where there is none."""
    lists = tensors.lists()
    if are_plain(_present(lists)):
        return tensors
    for name, some in zip(tensors.names(), lists, strict=True):
        for i, (p, tensor) in enumerate(zip(tensors.parameters, some, strict=True)):
            if tensor is not None:
                check_sharded_alike(f"parameters[{i}]", p, f"{name}[{i}]", tensor)
    parts = ([t if t is None else local_part(t) for t in some] for some in lists)
    return Tensors(*parts)  # type: ignore[arg-type]


def _measure(tensors: Tensors, plan: Plan, count: int) -> Tensor:
    """[count]: the norms of the gradients as they are here."""
    device = tensors.parameters[0].device
    if plan.gradients is not None:
        from .clip_triton import launch_norms

        norms = torch.empty(len(tensors.gradients), dtype=torch.float32, device=device)
        launch_norms(plan.gradients, norms, math.inf)
        return norms[:count]
    positions = [i for i, gradient in enumerate(tensors.gradients) if gradient is not None]
    if not positions:
        return torch.zeros(count, dtype=torch.float32, device=device)
    return torch_norms(_present([tensors.gradients]), positions, count)


def _run_triton(call: Call, plan: Plan) -> None:
    from .adamw_ema_triton import AVERAGE, NOTHING, launch_adamw_ema

    assert plan.table is not None
    assert plan.gradients is not None
    if call.norms is not None:
        call = replace(call, norms=call.norms.float().contiguous())
    decision = launch_adamw_ema(plan.table, plan.gradients, call)
    if plan.rest:
        if decision is not None:  # which has counted a refused step already
            skip, found_inf = (decision[0] == choice.value for choice in (NOTHING, AVERAGE))
            call = replace(call, skip=skip, found_inf=found_inf, refused_steps=None)
        update_on_device(call, plan.rest, plan.rest)


def _plan(tensors: Tensors, impl: str) -> Plan:
    """What the checks found, or found before; of the gradients apart, as they move more often."""
    roles, gradients = _written(tensors), _present([tensors.gradients])

    def make_state() -> Plan:
        return _make_state_plan(tensors, impl)

    def make() -> Plan:
        return _make_plan(tensors, impl, state)

    held = _present(roles)
    if not are_plain([*held, *gradients]):
        state = make_state()
        return make()
    chosen = choose_impl(impl, tensors.parameters[:1])
    state = plan_for(("adamw_ema", impl, chosen, *map(_holes, roles)), held, make_state)
    head = ("adamw_ema gradients", impl, state, _holes(tensors.gradients))
    return plan_for(head, gradients or tensors.parameters[:1], make)


def _holes(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Where there is none."""
    return tuple(i for i, tensor in enumerate(tensors) if tensor is None)


def _make_state_plan(tensors: Tensors, impl: str) -> Plan:
    """The plan of all but the gradients."""
    check_state(tensors)
    roles = _written(tensors)
    chosen = choose_impl(impl, _present(roles))
    belonging = zip(*roles, strict=True)
    gaps = tuple(i for i, some in enumerate(belonging) if not are_flat(_present([some])))
    table = _state_table(tensors, gaps) if chosen == "triton" else None
    return Plan(chosen, table, gaps, ranges=ranges_of(_present(roles)))


def _state_table(tensors: Tensors, gaps: Sequence[int]) -> PointerTable:
    from .adamw_ema_triton import CHUNK

    apart = frozenset(gaps)
    roles = [
        [None if i in apart else tensor for i, tensor in enumerate(role)]
        for role in _written(tensors)
    ]
    return build_table(roles, range(len(roles[0])), CHUNK, tensors.parameters[0].device)


def _make_plan(tensors: Tensors, impl: str, state: Plan) -> Plan:
    check_gradients(tensors, state.ranges)
    pairs = list(zip(tensors.parameters, tensors.gradients, strict=True))
    unlike = {i for i, (p, g) in enumerate(pairs) if g is not None and not are_flat([p, g])}
    gaps = tuple(sorted(unlike.union(state.rest)))
    gradients = _present([tensors.gradients])
    chosen = state.impl
    if chosen == "triton" and gradients:
        chosen = choose_impl(impl, gradients)
    if chosen != "triton":
        return Plan(chosen, rest=gaps)
    # As for the clip, a gradient must be dense to be measured.
    if not all(map(is_dense, gradients)):
        return Plan("torch", rest=gaps)
    from .clip_triton import CHUNK

    table = state.table if gaps == state.rest else _state_table(tensors, gaps)
    measured = build_table(
        [tensors.gradients], range(len(pairs)), CHUNK, tensors.parameters[0].device
    )
    return Plan(chosen, table, gaps, measured)

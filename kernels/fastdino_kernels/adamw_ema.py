"""The whole optimizer step in one pass: clip by norm, AdamW, teacher EMA, low-precision copies.

Bytes per parameter, in fp32, and in brackets with bf16 copies of student and teacher:

    |          | norms | clip | AdamW | EMA | copies | total   |
    |----------|-------|------|-------|-----|--------|---------|
    | separate | 4     | 8    | 28    | 12  | (8)    | 52 (60) |
    | fused    | 4     |      36            | (4)    | 40 (44) |

Separately, clipping reads and writes a gradient (if it is clipped), AdamW reads four tensors and
writes three, the EMA reads two and writes one (and the teacher's copy), and the student is read
again for its copy. Fused, five are read and four are written; the gradient is unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adamw_ema_arguments import (
    Call,
    Tensors,
    check_call,
    check_gradients,
    check_hyperparameter,
    check_state,
    check_unit_rows,
    make_group,
)
from .adamw_ema_torch import update_on_device, update_on_host
from .checks import check_float_tensor, check_lengths
from .clip import check_max_norm, norm_dtype, spread, torch_norms
from .dispatch import choose_impl
from .dtensor import local_parts, norms_over_shards
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


@torch.compiler.disable  # a traced graph would break at the first address
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
    """Clip each gradient by its own norm, step AdamW and update the teacher, in one pass in place.

    For each parameter p with gradient g and teacher t, as clip_grad_norms_, torch.optim.AdamW and
    ema_update_ one after the other:

        g <- g/grad_scale * min(1, max_norm/(norm + 1e-6)), norm that of g/grad_scale
        step <- step + 1;  m <- b1*m + (1 - b1)*g;  v <- b2*v + (1 - b2)*g^2
        p <- p - lr*weight_decay*p - lr * m/(1 - b1^step) / (sqrt(v/(1 - b2^step)) + eps)
        t <- momentum*t + (1 - momentum)*p

    A parameter without a gradient is unchanged, neither decayed nor counted, but its teacher is
    updated. Gradients are only read. Half precision is computed in fp32 and rounded once. No value
    is read back to the host, and a captured CUDA graph reads every 0-d tensor anew. All tensors are
    on one device. DTensors are updated shard by shard, with norms over all shards (one all-reduce).

    Args:
        parameters: n tensors, fp16/bf16/fp32/fp64, updated.
        gradients: n tensors of the same shapes, or None.
        exp_avgs, exp_avg_sqs: AdamW's moments m and v, updated; None if there is no gradient.
        steps: [n] fp32, contiguous: AdamW's step count of each parameter, updated.
        lr, weight_decay: >= 0; floats, or 0-d tensors, whose values are not checked.
        betas, eps: of AdamW.
        max_norm: > 0; None: no clipping; inf: the norms are only measured.
        norms: [n] fp32, of the gradients divided by grad_scale, if already known.
        teachers: n tensors or None, updated.
        momentum: in [0, 1], as in ema_update_; required with teachers.
        shadows, teacher_shadows: copies of parameters and teachers, often in lower precision,
            rewritten in the same pass; n tensors or None.
        unit_rows: the index of a parameter [K, D], D a power of two up to 1024, whose teacher's
            copy gets rows of L2 norm 1: the weight that a weight-normed layer multiplies by.
        skip: 0-d; if it is not 0, no tensor changes, to the bit.
        found_inf: 0-d; if it is not 0, parameters, moments and steps are unchanged and the teacher
            is updated: the paper's loss scaling, whose EMA runs in every step.
        grad_scale: 0-d fp32, the loss scale.
        refused_steps: 0-d, fp32 or integer. If given, a step with a NaN or infinite norm changes
            nothing, as with `skip`, and adds 1 here. If found_inf is not 0, such norms are
            expected and not counted.
        impl: "triton" (no fp64), "torch" (torch's fused AdamW, multi-tensor operations), or
            "auto". Triton delegates tensors to PyTorch that are not dense or have another layout
            than their parameter.

    Returns: norms [n] of the gradients before clipping, 0 without a gradient, fp32 (fp64 if every
        gradient is fp64); None if neither max_norm nor refused_steps needs them.

    Raises:
        ValueError: lengths, shapes or devices that differ, numbers out of range, a missing momentum
            or moment, DTensors that are sharded differently, or written tensors that share memory
            with another tensor or within themselves; the message has the indices.
        TypeError: an argument that is not a dense floating-point tensor.
        RuntimeError: a CUDA graph is being captured, and no earlier call had tensors on the GPU.

    """
    parameters = list(parameters)
    n = len(parameters)
    given = (gradients, exp_avgs, exp_avg_sqs, teachers, shadows, teacher_shadows)
    none: list[Tensor | None] = [None] * n
    lists = (none if some is None else list(some) for some in given)
    tensors = Tensors(parameters, *lists)
    check_lengths(tensors.named())
    if n == 0:
        choose_impl(impl, [])  # raises for an unknown name
        return None
    device = check_float_tensor("parameters[0]", parameters[0]).device
    if momentum is None:
        if any(t is not None for t in tensors.teachers):
            raise ValueError("momentum must be given with teachers, got None")
        momentum = 1.0
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    call = Call(
        tensors,
        [make_group(0, n, numbers, device)],
        steps,
        norms,
        None if max_norm is None else check_max_norm(max_norm),
        check_hyperparameter("momentum", momentum, device, most=1),
        skip,
        found_inf,
        grad_scale,
        refused_steps,
        unit_rows,
    )
    return update(call, impl)


def update(call: Call, impl: str) -> Tensor | None:
    """Run adamw_ema_update_ for parameter groups with checked numbers; return the norms."""
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
    elif call.steps.is_cpu:
        update_on_host(call, plan.rest)
    else:
        update_on_device(call, plan.rest)
    # Autograd sees neither the writes of a kernel nor those of PyTorch's fused AdamW.
    seen = (parts.parameters, parts.teachers, parts.shadows, parts.teacher_shadows)
    torch.autograd.graph.increment_version(_present(seen))
    return norms


def _written(tensors: Tensors) -> list[list[Tensor | None]]:
    """Return the roles of the kernel's table, in its order."""
    parameters, _gradients, *others = tensors.named().values()
    return [parameters, *others]


def _present(lists: Iterable[Iterable[Tensor | None]]) -> list[Tensor]:
    return [tensor for some in lists for tensor in some if tensor is not None]


def _local_parts(tensors: Tensors) -> Tensors:
    """Return the local shards of all DTensors; the same object if there are no DTensors."""
    named = tensors.named()
    if are_plain(_present(named.values())):
        return tensors
    return Tensors(*local_parts(named))  # type: ignore[arg-type]


def _measure(tensors: Tensors, plan: Plan, count: int) -> Tensor:
    """Return the norms [count] of this rank's gradients."""
    device = tensors.parameters[0].device
    if plan.gradients is not None:
        from .clip_triton import launch_norms

        norms = torch.empty(len(tensors.gradients), dtype=torch.float32, device=device)
        launch_norms(plan.gradients, norms, math.inf)
        return norms[:count]
    positions = [i for i, gradient in enumerate(tensors.gradients) if gradient is not None]
    if not positions:
        return torch.zeros(count, dtype=torch.float32, device=device)
    gradients = _present([tensors.gradients])
    return spread(torch_norms(gradients).to(norm_dtype(gradients)), positions, count)


def _run_triton(call: Call, plan: Plan) -> None:
    from .adamw_ema_triton import AVERAGE, NOTHING, launch_adamw_ema

    assert plan.table is not None
    assert plan.gradients is not None
    if call.norms is not None:
        call = replace(call, norms=call.norms.float().contiguous())
    decision = launch_adamw_ema(plan.table, plan.gradients, call)
    if plan.rest:
        if decision is not None:  # a refused step is already counted
            skip, found_inf = (decision[0] == choice.value for choice in (NOTHING, AVERAGE))
            call = replace(call, skip=skip, found_inf=found_inf, refused_steps=None)
        update_on_device(call, plan.rest, plan.rest)


def _plan(tensors: Tensors, impl: str) -> Plan:
    """Return the plan; the gradients' part has its own cache entry, as they move more often."""
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
    """Return the indices without a tensor."""
    return tuple(i for i, tensor in enumerate(tensors) if tensor is None)


def _make_state_plan(tensors: Tensors, impl: str) -> Plan:
    """Make the plan of all tensors but the gradients."""
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
    # As in clip.py, a gradient must be dense to be measured.
    if not all(map(is_dense, gradients)):
        return Plan("torch", rest=gaps)
    from .clip_triton import CHUNK

    table = state.table if gaps == state.rest else _state_table(tensors, gaps)
    measured = build_table(
        [tensors.gradients], range(len(pairs)), CHUNK, tensors.parameters[0].device
    )
    return Plan(chosen, table, gaps, measured)

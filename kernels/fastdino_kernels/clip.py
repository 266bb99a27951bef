"""Gradient clipping without host synchronisation, by each parameter's norm or the global norm.

In Triton three launches serve all gradients, whatever their dtypes. Bytes per parameter, in fp32: 4
for the norm, and 8 more only if the gradient is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import check_float_tensor, check_memory, check_number
from .dispatch import choose_impl, compute_dtype
from .dtensor import is_sharded, local_part, norms_over_shards
from .operators import LIBRARY, ops, register_fake
from .pointer_table import Plan, are_flat, are_plain, build_table, plan_for
from .reference import CLIP_EPS


@torch.no_grad()
def clip_grad_norms_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, *, impl: str = "auto"
) -> Tensor:
    """Scale each gradient in place by max_norm/(norm + 1e-6) if that is < 1.

    This is `clip_gradients` of facebookresearch/dino's utils.py; clip_grad_norm_ clips by the
    global norm. No value is read back to the host. A gradient whose norm is NaN is unchanged; one
    whose norm is inf is multiplied by 0, as in the paper's code. The norm of a DTensor is that of
    all its shards, by one all-reduce of n numbers, so every rank of the mesh must make the call.

    Args:
        parameters: n tensors (or one), whose `.grad` is fp16/bf16/fp32/fp64 or None.
        max_norm: > 0; inf only measures.
        impl: "triton" (three launches for all; no fp64), "torch" (multi-tensor operations), or
            "auto". Triton delegates the call to PyTorch if a gradient has gaps in memory, or is on
            another device than the first.

    Returns: norms [n], the 2-norms before clipping, on the first parameter's device; 0 if the
        gradient is None. fp32, computed in fp32 from half precision too; fp64 if every gradient is
        fp64.

    Raises:
        ValueError: max_norm is not > 0, two gradients share memory (a parameter listed twice),
            elements of one do, or one is a DTensor with a pending sum.
        TypeError: a parameter that is not a tensor, or a gradient that is not a dense
            floating-point tensor.
        RuntimeError: a CUDA graph is being captured, and no earlier call had gradients on the GPU.

    """
    max_norm = check_max_norm(max_norm)
    params = _check_parameters(parameters)
    positions, grads = _present_grads(params)
    device = params[0].device if params else torch.device("cpu")
    if not grads:
        choose_impl(impl, [])  # raises for an unknown name
        return torch.zeros(len(params), device=device)
    return _clip(grads, positions, len(params), max_norm, impl).to(device)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, *, impl: str = "auto"
) -> Tensor:
    """Scale all gradients in place by max_norm/(norm + 1e-6), norm being the global one, if < 1.

    The result is that of torch.nn.utils.clip_grad_norm_ with its defaults (2-norm,
    error_if_nonfinite off), as DINOv2 and DINOv3 call it, except that half precision is computed in
    fp32. No value is read back to the host. A NaN norm makes every gradient NaN; an infinite one
    multiplies them by 0.

    Args: as clip_grad_norms_.

    Returns: the norm before clipping, 0-d, on the first gradient's device; 0 without gradients.
        fp32, or fp64 if every gradient is fp64.

    Raises: as clip_grad_norms_.

    """
    max_norm = check_max_norm(max_norm)
    params = _check_parameters(parameters)
    positions, grads = _present_grads(params)
    if not grads:
        choose_impl(impl, [])
        return torch.zeros((), device=params[0].device if params else None)
    return _clip(grads, positions, None, max_norm, impl)


def torch_norms(grads: Sequence[Tensor]) -> Tensor:
    """Return the 2-norms [n] by multi-tensor operations, on the first gradient's device.

    fp64 if any gradient is fp64, else fp32; half precision is computed in fp32.
    """
    like = torch.empty((), dtype=compute_dtype(*grads), device=grads[0].device)
    norms = [like] * len(grads)
    for indices in _groups(grads):
        group = [grads[index] for index in indices]
        measured = torch._foreach_norm(group, 2.0, dtype=compute_dtype(group[0]))
        for index, norm in zip(indices, measured, strict=True):
            norms[index] = norm.to(like)
    return torch.stack(norms)


def spread(norms: Tensor, positions: Sequence[int], total: int) -> Tensor:
    """Return [total] with the norms at their positions and 0 elsewhere."""
    if len(norms) == total:
        return norms
    by_position = dict(zip(positions, norms.unbind(), strict=True))
    zero = norms.new_zeros(())
    return torch.stack([by_position.get(i, zero) for i in range(total)])


def _clip(
    grads: list[Tensor], positions: Sequence[int], total: int | None, max_norm: float, impl: str
) -> Tensor:
    """Clip each gradient by its own norm, or all by the global norm if `total` is None.

    Returns: the norms [total] at `positions`, 0 elsewhere; or the global norm [].
    """
    parts, sharded = grads, _any_sharded(grads)
    if sharded:
        parts = list(map(local_part, grads))
    plan = _plan(parts, range(len(parts)) if sharded else positions, impl)
    if plan.impl == "triton" and not sharded:
        return _clip_by_triton(plan, grads, positions, total, max_norm)
    norms = _part_norms(parts, plan)
    if sharded:
        names = [f"parameters[{position}].grad" for position in positions]
        norms = norms_over_shards(norms, grads, names)
    dtype = norm_dtype(grads)
    if total is not None:
        factors = max_norm / (norms + CLIP_EPS)
        # NaN is not < 1: such a gradient is unchanged.
        _scale_parts_(parts, torch.where(factors < 1, factors, torch.ones_like(factors)), plan)
        return spread(norms.to(dtype), positions, total)
    norm = torch.linalg.vector_norm(norms)
    factor = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    _scale_parts_(parts, factor.expand(len(parts)).contiguous(), plan)
    return norm.to(dtype)


def _clip_by_triton(
    plan: Plan, grads: list[Tensor], positions: Sequence[int], total: int | None, max_norm: float
) -> Tensor:
    if plan.table is None:  # traced
        traced: Tensor = (
            ops.clip_grad_norm_(grads, max_norm)
            if total is None
            else ops.clip_grad_norms_(grads, list(positions), total, max_norm)
        )
        return traced
    from .clip_triton import launch_clip, launch_global_clip

    if total is None:
        norms = launch_global_clip(plan.table, max_norm)
    else:
        new = torch.empty if len(grads) == total else torch.zeros
        norms = new(total, dtype=torch.float32, device=grads[0].device)
        launch_clip(plan.table, norms, max_norm)
    torch.autograd.graph.increment_version(grads)
    return norms


def _any_sharded(grads: Sequence[Tensor]) -> bool:
    traced = torch.compiler.is_compiling()
    return not traced and not are_plain(grads) and any(map(is_sharded, grads))


def _part_norms(parts: list[Tensor], plan: Plan) -> Tensor:
    if plan.table is None:
        return torch_norms(parts)
    from .clip_triton import launch_norms

    norms = torch.empty(len(parts), dtype=torch.float32, device=parts[0].device)
    launch_norms(plan.table, norms, math.inf)
    return norms


def _scale_parts_(parts: list[Tensor], factors: Tensor, plan: Plan) -> None:
    """Multiply each part by its factor, of [parts]."""
    if plan.table is not None:
        from .clip_triton import launch_scale

        launch_scale(plan.table, factors)
        torch.autograd.graph.increment_version(parts)
        return
    each = factors.unbind()
    for indices in _groups(parts):
        group = [parts[index] for index in indices]
        wide = compute_dtype(group[0])
        own = [each[index].to(group[0].device, wide) for index in indices]
        if group[0].dtype == wide:
            torch._foreach_mul_(group, own)
        else:
            # On an accelerator, half times a 0-d factor rounds the factor to half first.
            wide_group = [grad.to(wide) for grad in group]
            torch._foreach_mul_(wide_group, own)
            torch._foreach_copy_(group, wide_group)


def _plan(grads: list[Tensor], positions: Sequence[int], impl: str) -> Plan:
    """Return the plan, with its table if Triton will run now; new gradients are checked."""
    if torch.compiler.is_compiling() or not are_plain(grads):
        _check_grads(grads, positions)
        return Plan(choose_impl(impl, grads))

    def make() -> Plan:
        named = _check_grads(grads, positions)
        check_memory(named, written=len(named))
        chosen = choose_impl(impl, grads)
        if chosen != "triton":
            return Plan(chosen)
        from .clip_triton import CHUNK

        device = grads[0].device
        if not all(grad.device == device and are_flat([grad]) for grad in grads):
            return Plan("torch")
        return Plan(chosen, build_table([grads], positions, CHUNK))

    where = positions if isinstance(positions, range) else tuple(positions)
    return plan_for(("clip", impl, choose_impl(impl, grads[:1]), where), grads, make)


def _clip_grad_norms_op(
    grads: list[Tensor], positions: list[int], total: int, max_norm: float
) -> Tensor:
    return _clip(grads, positions, total, max_norm, "triton")


def _clip_grad_norm_op(grads: list[Tensor], max_norm: float) -> Tensor:
    return _clip(grads, range(len(grads)), None, max_norm, "triton")


# Used by traced graphs; for eager calls the dispatcher would take longer than the kernels.
LIBRARY.define(
    "clip_grad_norms_(Tensor(a!)[] grads, int[] positions, int total, float max_norm) -> Tensor"
)
LIBRARY.define("clip_grad_norm_(Tensor(a!)[] grads, float max_norm) -> Tensor")
LIBRARY.impl("clip_grad_norms_", _clip_grad_norms_op, "CompositeExplicitAutograd")
LIBRARY.impl("clip_grad_norm_", _clip_grad_norm_op, "CompositeExplicitAutograd")


register_fake("clip_grad_norms_", lambda grads, _, total, __: grads[0].new_empty(total).float())
register_fake("clip_grad_norm_", lambda grads, _: grads[0].new_empty(()).float())


def _groups(grads: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of gradients that one multi-tensor operation can process at once."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        groups.setdefault((grad.device, grad.dtype), []).append(index)
    return list(groups.values())


def norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of returned norms: fp64 if every gradient is fp64, else fp32."""
    double = all(grad.dtype == torch.float64 for grad in grads)
    return torch.float64 if double else torch.float32


def check_max_norm(max_norm: object) -> float:
    """Return a number > 0; raise TypeError for something else, ValueError unless it is > 0."""
    number = check_number("max_norm", max_norm)
    if not number > 0:
        raise ValueError(f"max_norm must be > 0, got {number}")
    return number


def _check_parameters(parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    elif not isinstance(parameters, Iterable):
        raise TypeError(
            "parameters must be a torch.Tensor or an iterable of them, "
            f"got {type(parameters).__name__}"
        )
    params = list(parameters)
    if torch.compiler.is_compiling() or not are_plain(params):
        for index, param in enumerate(params):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"parameters[{index}] must be a torch.Tensor, got {type(param).__name__}"
                )
    return params


def _present_grads(params: Sequence[Tensor]) -> tuple[Sequence[int], list[Tensor]]:
    """Return (positions, gradients) of the parameters that have one."""
    grads = [param.grad for param in params]
    present = [grad for grad in grads if grad is not None]
    if len(present) == len(grads):
        return range(len(grads)), present
    return [index for index, grad in enumerate(grads) if grad is not None], present


def _check_grads(grads: Sequence[Tensor], positions: Sequence[int]) -> list[tuple[str, Tensor]]:
    """Return (name, gradient) of each; raise TypeError for one that is not dense and floating."""
    named = [(f"parameters[{i}].grad", grad) for i, grad in zip(positions, grads, strict=True)]
    return [(name, check_float_tensor(name, grad)) for name, grad in named]

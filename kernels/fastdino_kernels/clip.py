"""Gradient clipping with no host sync: the paper's, each parameter by its own norm, and by one.

In Triton three launches serve all gradients, whatever their dtypes. Bytes a parameter, in fp32: 4
for the norm, and 8 more only where the gradient is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference
from .dispatch import check_float_tensor, choose_impl, compute_dtype, is_number
from .pointer_table import (
    Plan,
    are_flat,
    are_plain,
    build_table,
    find_overlap,
    overlaps_itself,
    plan_for,
)
from .reference import CLIP_EPS
from .sharded import is_sharded, local_part, norms_over_shards


@torch.no_grad()
def clip_grad_norms_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, *, impl: str = "auto"
) -> Tensor:
    """Scale each gradient by max_norm/(norm + 1e-6) where that is < 1, in place.

    This is `clip_gradients` of facebookresearch/dino's utils.py; clip_grad_norm_ is the other one.
    Nothing is read back to the host. A gradient whose norm is NaN is left as it is; one whose norm
    is inf is multiplied by 0, as there. The norm of a DTensor is that of all its shards: one
    all-reduce of n numbers, so each process of the mesh must make the call.

    Args:
        parameters: n tensors (or one), whose `.grad` is fp16/bf16/fp32/fp64 or None.
        max_norm: > 0; inf only measures.
        impl: "triton" (three launches for all; no fp64), "torch" (multi-tensor operations),
            "reference" (one by one, with host syncs), or "auto". Triton leaves the call to PyTorch
            where a gradient has gaps in memory, or is on another device than the first.

    Returns: norms [n], the 2-norms before clipping, on the first parameter's device; 0 where the
        gradient is None. fp32, computed in fp32 from half precision too; fp64 where every
        gradient is fp64.

    Raises:
        ValueError: max_norm is not > 0, two gradients share memory (a parameter listed twice),
            elements of one do, or one is a DTensor whose sum is pending.
        TypeError: a parameter that is not a tensor, or a gradient that is not a dense
            floating-point one.
        RuntimeError: a CUDA graph is being captured, and no call with gradients on the GPU went
            before.

    """
    params = _check_arguments(parameters, max_norm)
    positions, grads = _present_grads(params)
    device = params[0].device if params else torch.device("cpu")
    if not grads:
        choose_impl(impl, [])  # its name is checked all the same
        return torch.zeros(len(params), device=device)
    if _any_sharded(grads):
        return _clip_sharded_each(grads, positions, len(params), max_norm, impl)
    return _clip_each(grads, positions, len(params), max_norm, impl).to(device)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, *, impl: str = "auto"
) -> Tensor:
    """Scale all gradients by max_norm/(norm + 1e-6), norm being of all together, where that is < 1.

    The result of torch.nn.utils.clip_grad_norm_ with its defaults (2-norm, error_if_nonfinite off),
    as DINOv2 and DINOv3 call it; but half precision is computed in fp32. Nothing is read back to
    the host. A norm that is NaN makes every gradient NaN; one that is inf multiplies them by 0.

    Args: as clip_grad_norms_.

    Returns: the norm before clipping, 0-d, on the first gradient's device; 0 without gradients.
        fp32, or fp64 where every gradient is fp64.

    Raises: as clip_grad_norms_.

    """
    params = _check_arguments(parameters, max_norm)
    positions, grads = _present_grads(params)
    if not grads:
        choose_impl(impl, [])
        return torch.zeros((), device=params[0].device if params else None)
    if _any_sharded(grads):
        return _clip_sharded_all(grads, positions, max_norm, impl)
    return _clip_all(grads, positions, max_norm, impl)


def torch_norms(grads: Sequence[Tensor], positions: Sequence[int], total: int) -> Tensor:
    """[total]: the 2-norms at their positions, 0 elsewhere, by multi-tensor operations.

    fp32, computed in fp32 from half precision too; fp64 where every gradient is fp64.
    """
    found = [torch.empty(0)] * len(grads)
    for indices in _groups(grads):
        norms = _norms([grads[index] for index in indices])
        for index, norm in zip(indices, norms.unbind(), strict=True):
            found[index] = norm
    like = torch.empty((), dtype=_norm_dtype(grads), device=grads[0].device)
    return _in_place_of(positions, found, total, like)


def _clip_each(
    grads: list[Tensor], positions: Sequence[int], total: int, max_norm: float, impl: str
) -> Tensor:
    """[total]: the norms at `positions`, 0 elsewhere."""
    plan = _plan(grads, positions, impl)
    if plan.table is not None:
        from .clip_triton import launch_clip

        new = torch.empty if len(grads) == total else torch.zeros
        norms: Tensor = new(total, dtype=torch.float32, device=grads[0].device)
        launch_clip(plan.table, norms, max_norm)
        torch.autograd.graph.increment_version(grads)
        return norms
    if plan.impl == "triton":  # traced
        return torch.ops.fastdino_kernels.clip_grad_norms_(grads, list(positions), total, max_norm)
    found = (_reference_each if plan.impl == "reference" else _torch_each)(grads, max_norm)
    like = torch.empty((), dtype=_norm_dtype(grads), device=grads[0].device)
    return _in_place_of(positions, found, total, like)


def _clip_all(grads: list[Tensor], positions: Sequence[int], max_norm: float, impl: str) -> Tensor:
    """The norm of all gradients."""
    plan = _plan(grads, positions, impl)
    if plan.table is not None:
        from .clip_triton import launch_global_clip

        norm = launch_global_clip(plan.table, max_norm)
        torch.autograd.graph.increment_version(grads)
        return norm
    if plan.impl == "triton":  # traced
        return torch.ops.fastdino_kernels.clip_grad_norm_(grads, max_norm)
    norm = (_reference_all if plan.impl == "reference" else _torch_all)(grads, max_norm)
    return norm.to(_norm_dtype(grads))


def _any_sharded(grads: Sequence[Tensor]) -> bool:
    traced = torch.compiler.is_compiling()
    return not traced and not are_plain(grads) and any(map(is_sharded, grads))


def _clip_sharded_each(
    grads: list[Tensor], positions: Sequence[int], total: int, max_norm: float, impl: str
) -> Tensor:
    """_clip_each where some gradients are DTensors."""
    parts, norms = _sharded_norms(grads, positions, impl)
    factors = max_norm / (norms + CLIP_EPS)
    _scale_parts_(parts, torch.where(factors < 1, factors, torch.ones_like(factors)), impl)
    return _in_place_of(positions, norms.unbind(), total, norms)


def _clip_sharded_all(
    grads: list[Tensor], positions: Sequence[int], max_norm: float, impl: str
) -> Tensor:
    """_clip_all where some gradients are DTensors."""
    parts, norms = _sharded_norms(grads, positions, impl)
    norm = torch.linalg.vector_norm(norms)
    factor = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    _scale_parts_(parts, factor.expand(len(parts)).contiguous(), impl)
    return norm


def _sharded_norms(
    grads: list[Tensor], positions: Sequence[int], impl: str
) -> tuple[list[Tensor], Tensor]:
    """What this process holds of each gradient; and [gradients], the norms of the whole ones."""
    parts = list(map(local_part, grads))
    norms = _clip_each(parts, range(len(parts)), len(parts), math.inf, impl)
    names = [f"parameters[{position}].grad" for position in positions]
    return parts, norms_over_shards(norms, grads, names)


def _scale_parts_(parts: list[Tensor], factors: Tensor, impl: str) -> None:
    """Each times its own factor, of [parts]."""
    plan = _plan(parts, range(len(parts)), impl)
    if plan.table is not None:
        from .clip_triton import launch_scale

        launch_scale(plan.table, factors)
        torch.autograd.graph.increment_version(parts)
        return
    for indices in _groups(parts):
        _scale_([parts[index] for index in indices], [factors[index] for index in indices])


def _in_place_of(
    positions: Sequence[int], norms: Sequence[Tensor], total: int, like: Tensor
) -> Tensor:
    """[total], in the dtype and on the device of `like`: norms at their positions, 0 elsewhere."""
    by_position = dict(zip(positions, norms, strict=True))
    zero = like.new_zeros(())
    return torch.stack([by_position.get(i, zero).to(zero) for i in range(total)])


def _plan(grads: list[Tensor], positions: Sequence[int], impl: str) -> Plan:
    """The plan, with its table where Triton is to run now; checks what is not yet known."""
    if torch.compiler.is_compiling() or not are_plain(grads):
        _check_grads(grads, positions)
        return Plan(choose_impl(impl, grads))

    def make() -> Plan:
        _check_grads(grads, positions)
        _check_memory(grads, positions)
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
    return _clip_each(grads, positions, total, max_norm, "triton")


def _clip_grad_norm_op(grads: list[Tensor], max_norm: float) -> Tensor:
    return _clip_all(grads, range(len(grads)), max_norm, "triton")


# What a traced graph runs; for eager calls the dispatcher would take longer than the kernels.
_LIBRARY = torch.library.Library("fastdino_kernels", "FRAGMENT")
_LIBRARY.define(
    "clip_grad_norms_(Tensor(a!)[] grads, int[] positions, int total, float max_norm) -> Tensor"
)
_LIBRARY.define("clip_grad_norm_(Tensor(a!)[] grads, float max_norm) -> Tensor")
_LIBRARY.impl("clip_grad_norms_", _clip_grad_norms_op, "CompositeExplicitAutograd")
_LIBRARY.impl("clip_grad_norm_", _clip_grad_norm_op, "CompositeExplicitAutograd")


@torch.library.register_fake("fastdino_kernels::clip_grad_norms_", lib=_LIBRARY)
def _(grads: list[Tensor], positions: list[int], total: int, max_norm: float) -> Tensor:
    return grads[0].new_empty(total, dtype=torch.float32)


@torch.library.register_fake("fastdino_kernels::clip_grad_norm_", lib=_LIBRARY)
def _(grads: list[Tensor], max_norm: float) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def _torch_each(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    found: list[Tensor] = [torch.empty(0)] * len(grads)
    for indices in _groups(grads):
        group = [grads[index] for index in indices]
        norms = _norms(group)
        factors = max_norm / (norms + CLIP_EPS)
        # NaN is not < 1: such a gradient stays.
        _scale_(group, torch.where(factors < 1, factors, torch.ones_like(factors)).unbind())
        for index, norm in zip(indices, norms.unbind(), strict=True):
            found[index] = norm
    return found


def _torch_all(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    device, dtype, groups = grads[0].device, compute_dtype(*grads), _groups(grads)
    norms = [_norms([grads[index] for index in indices]).to(device, dtype) for indices in groups]
    norm = torch.linalg.vector_norm(torch.cat(norms))
    factor = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    for indices in groups:
        own = factor.to(grads[indices[0]].device, compute_dtype(grads[indices[0]]))
        _scale_([grads[index] for index in indices], [own] * len(indices))
    return norm


def _groups(grads: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the gradients that one multi-tensor operation takes at once."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        groups.setdefault((grad.device, grad.dtype), []).append(index)
    return list(groups.values())


def _norms(group: list[Tensor]) -> Tensor:
    return torch.stack(list(torch._foreach_norm(group, 2.0, dtype=compute_dtype(group[0]))))


def _scale_(group: list[Tensor], factors: Sequence[Tensor]) -> None:
    wide = compute_dtype(group[0])
    if group[0].dtype == wide:
        torch._foreach_mul_(group, list(factors))
    else:
        # On an accelerator, half times a 0-d factor rounds the factor to half first.
        wide_group = [grad.to(wide) for grad in group]
        torch._foreach_mul_(wide_group, list(factors))
        torch._foreach_copy_(group, wide_group)


def _reference_each(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    wide = [grad.to(compute_dtype(grad)) for grad in grads]
    clipped, norms = reference.clip_grad_norms(wide, max_norm)
    for grad, value in zip(grads, clipped, strict=True):
        grad.copy_(value)
    return norms


def _reference_all(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    wide = [grad.to(compute_dtype(*grads)) for grad in grads]
    clipped, norm = reference.clip_grad_norm(wide, max_norm)
    for grad, value in zip(grads, clipped, strict=True):
        grad.copy_(value)
    return norm


def _norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    double = all(grad.dtype == torch.float64 for grad in grads)
    return torch.float64 if double else torch.float32


def check_max_norm(max_norm: object) -> None:
    """TypeError unless it is a number, ValueError unless it is > 0."""
    if not is_number(max_norm):
        raise TypeError(f"max_norm must be a float, got {type(max_norm).__name__}")
    assert isinstance(max_norm, (int, float))
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")


def _check_arguments(parameters: Iterable[Tensor] | Tensor, max_norm: object) -> list[Tensor]:
    check_max_norm(max_norm)
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
    """(positions, gradients) of the parameters that have one."""
    grads = [param.grad for param in params]
    present = [grad for grad in grads if grad is not None]
    if len(present) == len(grads):
        return range(len(grads)), present
    return [index for index, grad in enumerate(grads) if grad is not None], present


def _check_grads(grads: Sequence[Tensor], positions: Sequence[int]) -> None:
    for position, grad in zip(positions, grads, strict=True):
        check_float_tensor(f"parameters[{position}].grad", grad)


def _check_memory(grads: Sequence[Tensor], positions: Sequence[int]) -> None:
    for position, grad in zip(positions, grads, strict=True):
        if overlaps_itself(grad):
            raise ValueError(
                f"parameters[{position}].grad is written: expected a tensor whose elements share "
                f"no memory, got strides {grad.stride()}"
            )
    overlap = find_overlap(grads, written=len(grads))
    if overlap is not None:
        x, y = (f"parameters[{positions[index]}].grad" for index in overlap)
        raise ValueError(f"{x} and {y} share memory: expected each gradient once")

"""Gradient clipping without host synchronisation, by each parameter's norm or the global norm.

In Triton three launches serve all gradients, whatever their dtypes. Bytes per parameter, in fp32: 4
for the norm, and 8 more only if the gradient is clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import check_number
from .dispatch import choose_impl, compute_dtype
from .dtensor import local_lists
from .norms import measure, norm_dtype
from .operators import LIBRARY, ops, register_fake
from .reference import CLIP_EPS
from .tensor_lists import (
    Some,
    are_plain,
    are_traced,
    by_dtype,
    check_lists,
    holes,
    present,
    tables_for,
)

GRADIENTS = "parameters[].grad"


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
            "auto". Triton leaves the call to PyTorch if a gradient is a DTensor, has gaps in
            memory, or is on another device than the first.

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
    return _clip(_check_parameters(parameters), max_norm, impl, each=True)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, *, impl: str = "auto"
) -> Tensor:
    """Scale all gradients in place by max_norm/(norm + 1e-6), norm being the global one, if < 1.

    The result is that of torch.nn.utils.clip_grad_norm_ with its defaults (2-norm,
    error_if_nonfinite off), as DINOv2 and DINOv3 call it, except that half precision is computed in
    fp32, and that the norm of a long gradient is accurate on a CPU too. No value is read back to
    the host. A NaN norm makes every gradient NaN; an infinite one multiplies them by 0.

    Args: as clip_grad_norms_.

    Returns: the norm before clipping, 0-d, on the first parameter's device; 0 without gradients.
        fp32, or fp64 if every gradient is fp64.

    Raises: as clip_grad_norms_.

    """
    max_norm = check_max_norm(max_norm)
    return _clip(_check_parameters(parameters), max_norm, impl, each=False)


def _clip(params: list[Tensor], max_norm: float, impl: str, *, each: bool) -> Tensor:
    """Clip each gradient by its own norm, or all by the global one; return the norm or norms."""
    grads = [param.grad for param in params]
    device = params[0].device if params else None
    if not present([grads]):
        choose_impl(impl, [])  # raises for an unknown name
        return torch.zeros(len(grads) if each else (), device=device)
    return _clip_gradients(grads, max_norm, impl, each=each).to(device)


def _clip_gradients(grads: Some, max_norm: float, impl: str, *, each: bool) -> Tensor:
    some = present([grads])
    if not torch.compiler.is_compiling():
        local = local_lists({GRADIENTS: grads})[GRADIENTS]
        if not are_traced([local]):
            return _clip_(grads, local, max_norm, impl, each=each)
    check_lists({GRADIENTS: grads})
    if choose_impl(impl, some) == "torch":
        return _torch_clip_(grads, grads, max_norm, each=each)
    if not each:
        return ops.clip_grad_norm_(some, max_norm)
    positions = [i for i, grad in enumerate(grads) if grad is not None]
    return ops.clip_grad_norms_(some, positions, len(grads), max_norm)


def _clip_(grads: Some, local: Some, max_norm: float, impl: str, *, each: bool) -> Tensor:
    """Clip gradients that have memory, given their local shards."""
    tables = tables_for({GRADIENTS: local}, 1, impl, ".clip_triton")
    if tables is None or local is not grads:
        return _torch_clip_(grads, local, max_norm, each=each)
    from .clip_triton import launch_clip

    norms = launch_clip(tables, max_norm, each=each)
    torch.autograd.graph.increment_version(present([grads]))
    return norms


def _torch_clip_(grads: Some, local: Some, max_norm: float, *, each: bool) -> Tensor:
    norms = measure(grads, GRADIENTS)
    dtype = norm_dtype(present([grads]))
    if not each:
        norms = torch.linalg.vector_norm(norms)
    factors = clip_factors(norms, max_norm, each=each).expand(len(grads))
    _scale_(local, factors.unbind())
    return norms.to(dtype)


def clip_factors(norms: Tensor, max_norm: float, *, each: bool) -> Tensor:
    """Return min(1, max_norm/(norm + 1e-6)); for NaN 1 if `each`, else NaN as in PyTorch."""
    factors = max_norm / (norms + CLIP_EPS)
    return torch.where(factors < 1, factors, 1.0) if each else factors.clamp(max=1.0)


def _scale_(tensors: Some, factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by its factor []."""
    for indices, group in by_dtype(tensors):
        wide = compute_dtype(group[0])
        own = [factors[i].to(g.device, wide) for i, g in zip(indices, group)]
        # On an accelerator, half times a 0-d factor rounds the factor to half first.
        products = group if group[0].dtype == wide else [grad.to(wide) for grad in group]
        torch._foreach_mul_(products, own)
        if products is not group:
            torch._foreach_copy_(group, products)


def _clip_grad_norms_op(
    grads: list[Tensor], positions: list[int], total: int, max_norm: float
) -> Tensor:
    by_position = dict(zip(positions, grads))
    some = [by_position.get(i) for i in range(total)]
    return _clip_(some, some, max_norm, "triton", each=True)


def _clip_grad_norm_op(grads: list[Tensor], max_norm: float) -> Tensor:
    return _clip_(grads, grads, max_norm, "triton", each=False)


# Used by traced graphs; for eager calls the dispatcher would take longer than the kernels.
LIBRARY.define(
    "clip_grad_norms_(Tensor(a!)[] grads, int[] positions, int total, float max_norm) -> Tensor"
)
LIBRARY.define("clip_grad_norm_(Tensor(a!)[] grads, float max_norm) -> Tensor")
LIBRARY.impl("clip_grad_norms_", _clip_grad_norms_op, "CompositeExplicitAutograd")
LIBRARY.impl("clip_grad_norm_", _clip_grad_norm_op, "CompositeExplicitAutograd")
register_fake("clip_grad_norms_", lambda grads, _, total, __: grads[0].new_empty(total).float())
register_fake("clip_grad_norm_", lambda grads, _: grads[0].new_empty(()).float())


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
    if torch.compiler.is_compiling() or not are_plain([params]) or holes(params):
        for index, param in enumerate(params):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"parameters[{index}] must be a torch.Tensor, got {type(param).__name__}"
                )
    return params

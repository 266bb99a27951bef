"""Gradient clipping as in the paper's code: each parameter by its own norm, with no host sync."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference
from .dispatch import check_float_tensor, choose_impl, compute_dtype, is_number
from .reference import CLIP_EPS


@torch.no_grad()
def clip_grad_norms_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, *, impl: str = "auto"
) -> Tensor:
    """Scale each gradient by max_norm/(norm + 1e-6) where that is < 1, in place.

    This is `clip_gradients` of facebookresearch/dino's utils.py, not the global clipping of
    torch.nn.utils.clip_grad_norm_. Nothing is read back to the host. A gradient whose norm is NaN
    is left as it is; one whose norm is inf is multiplied by 0, as there.

    Args:
        parameters: n tensors (or one), whose `.grad` is fp16/bf16/fp32/fp64 or None.
        max_norm: > 0; inf only measures.
        impl: "torch" (multi-tensor operations), "reference" (one by one, with host syncs), or
            "auto".

    Returns: norms [n], the 2-norms before clipping, on the first parameter's device; 0 where the
        gradient is None. fp32, computed in fp32 from half precision too; fp64 where every
        gradient is fp64.

    Raises:
        ValueError: max_norm is not > 0.
        TypeError: a parameter or gradient that is not a dense floating-point tensor.

    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not is_number(max_norm):
        raise TypeError(f"max_norm must be a float, got {type(max_norm).__name__}")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")
    grads = _present_grads(params)
    chosen = choose_impl(impl, list(grads.values()))

    present = list(grads.values())
    clip = _reference_clip_ if chosen == "reference" else _torch_clip_
    found = dict(zip(grads, clip(present, max_norm), strict=True))

    double = bool(present) and all(grad.dtype == torch.float64 for grad in present)
    dtype = torch.float64 if double else torch.float32
    device = params[0].device if params else torch.device("cpu")
    if not found:
        return torch.zeros(len(params), dtype=dtype, device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    norms = [found[i].to(device, dtype) if i in found else zero for i in range(len(params))]
    return torch.stack(norms)


def _torch_clip_(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    norms: list[Tensor] = [torch.empty(0)] * len(grads)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        groups.setdefault((grad.device, grad.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        group = [grads[index] for index in indices]
        wide = compute_dtype(group[0])
        group_norms = torch.stack(list(torch._foreach_norm(group, 2.0, dtype=wide)))
        factors = max_norm / (group_norms + CLIP_EPS)
        factors = torch.where(factors < 1, factors, torch.ones_like(factors))
        if dtype == wide:
            torch._foreach_mul_(group, list(factors.unbind()))
        else:
            # On an accelerator, half times a 0-d factor rounds the factor to half first.
            wide_group = [grad.to(wide) for grad in group]
            torch._foreach_mul_(wide_group, list(factors.unbind()))
            torch._foreach_copy_(group, wide_group)
        for index, norm in zip(indices, group_norms.unbind(), strict=True):
            norms[index] = norm
    return norms


def _reference_clip_(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    clipped, norms = reference.clip_grad_norms(
        [grad.to(compute_dtype(grad)) for grad in grads], max_norm
    )
    for grad, value in zip(grads, clipped, strict=True):
        grad.copy_(value)
    return norms


def _present_grads(params: Sequence[Tensor]) -> dict[int, Tensor]:
    grads = {}
    for index, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(
                f"parameters[{index}] must be a torch.Tensor, got {type(param).__name__}"
            )
        if param.grad is not None:
            grads[index] = check_float_tensor(f"parameters[{index}].grad", param.grad)
    return grads

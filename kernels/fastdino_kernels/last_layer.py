"""The last layer of a projection head, as its weight [K, D].

Legend: N rows, D features, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_float_tensor, check_same_device
from .dispatch import autocast_dtype


def last_layer_weight(layer: nn.Module) -> Tensor:
    """Return the weight [K, D] of a bias-free linear layer, as linear_dino_loss takes it.

    The layer may be a plain nn.Linear, or weight-normed by torch.nn.utils.weight_norm (DINO,
    DINOv2), by torch.nn.utils.parametrizations.weight_norm, or as any module with the parameters
    weight_g and weight_v. A weight-normed layer's weight g v/||v|| is computed here, and gradients
    flow to v, and to g unless it is frozen. Call it once per step: the forward hook of
    torch.nn.utils.weight_norm does not run, so that `layer.weight` would be an old one.

    Args:
        layer: without a bias. Not compiled, and not sharded: under FSDP call this where its
            parameters are gathered.

    Raises:
        ValueError: a layer with a bias, or weight-normed other than by row (dim=0).
        TypeError: a module without a weight matrix.

    Example:
        >>> head = nn.utils.parametrizations.weight_norm(nn.Linear(256, 1000, bias=False))
        >>> last_layer_weight(head).shape
        torch.Size([1000, 256])

    """
    if getattr(layer, "bias", None) is not None:
        raise ValueError("layer must have no bias, got one: expected nn.Linear(.., bias=False)")
    weight, direction = getattr(layer, "weight", None), getattr(layer, "weight_v", None)
    if isinstance(direction, Tensor):
        return torch._weight_norm(direction, _magnitude(layer, direction), 0)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(
            "layer must be a linear layer with a weight [K, D], such as nn.Linear, "
            f"got {type(layer).__name__}"
        )
    return weight


def _magnitude(layer: nn.Module, direction: Tensor) -> Tensor:
    """Return weight_g [K, 1]. With another shape torch._weight_norm reads out of bounds."""
    magnitude = getattr(layer, "weight_g", None)
    if (
        not isinstance(magnitude, Tensor)
        or direction.dim() != 2
        or magnitude.shape != (len(direction), 1)
    ):
        got = list(magnitude.shape) if isinstance(magnitude, Tensor) else magnitude
        raise ValueError(
            "layer must be weight-normed by row: expected weight_v [K, D] and weight_g [K, 1], "
            f"got {list(direction.shape)} and {got}; use weight_norm(layer, dim=0)"
        )
    return magnitude


def check_layer(x_name: str, x: Tensor, weight_name: str, weight: Tensor, dims: str) -> None:
    """Raise TypeError or ValueError unless x [.., N, D] can be multiplied with a weight [K, D].

    Args:
        x_name, weight_name: the arguments' names.
        dims: the dimensions of x, such as "[N, D]".

    """
    check_float_tensor(x_name, x)
    check_float_tensor(weight_name, weight)
    if hasattr(weight, "to_local"):
        raise ValueError(f"{weight_name} must be a whole tensor, got a DTensor: call full_tensor()")
    if x.dim() != dims.count(",") + 1 or min(x.shape[:-2], default=1) < 1:
        raise ValueError(f"{x_name} must be {dims}, got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{weight_name} must be [K, D] with K >= 1 and D = {x.shape[-1]} of {x_name}, "
            f"got shape {tuple(weight.shape)}"
        )
    check_same_device(weight_name, weight, x_name, x)


def product_dtype(x_name: str, x: Tensor, weight_name: str, weight: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies: that of both, or autocast's.

    Raises: ValueError: two dtypes outside an autocast region, or one of them fp64.
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None and torch.float64 not in (x.dtype, weight.dtype):
        return dtype
    if x.dtype != weight.dtype:
        raise ValueError(
            f"{x_name} and {weight_name} must have the same dtype (or use torch.autocast), "
            f"got {x.dtype} and {weight.dtype}"
        )
    return x.dtype

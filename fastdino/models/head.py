"""The projection head, and the network that applies backbone and head to crops of several sizes.

Source: Caron et al. 2021, section 3.1 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastdino.models.linear_layer import Linear, OneDNNLayer, linear, product
from fastdino.models.vit import init_linear


class WeightNormLinear(OneDNNLayer):
    """Weight-normed linear layer (Salimans & Kingma 2016).

    y = x W^T with each row of W = weight_g * weight_v / ||weight_v||.

    Parameters have the names of torch.nn.utils.weight_norm, as in the paper's checkpoints:
    weight_g [K, 1], initially 1, trained only with train_magnitude; weight_v [K, in_features].

    Attributes:
        cached_weight: W in the dtype of autocast regions, used there; None: not cached. The caller
            keeps it up to date (a teacher's EMA does). It is not part of the state_dict; loading
            one refreshes it.
    """

    cached_weight: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, train_magnitude: bool):
        super().__init__()
        initial = nn.Linear(in_features, out_features, bias=False).weight.detach()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_magnitude)
        self.weight_v = nn.Parameter(initial)
        self.register_buffer("cached_weight", None, persistent=False)
        self.register_load_state_dict_post_hook(_refresh_cache)

    def forward(self, x: Tensor) -> Tensor:
        """Map [rows, D] -> [rows, K]."""
        if self.cached_weight is not None and torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.cached_weight)
        if torch.compiler.is_compiling():
            # Under autocast one compiled kernel writes W in half precision: 4 K D bytes read, 2 K D
            # written. torch._weight_norm writes 4 K D, which a cast then reads to write 2 K D.
            norm = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
            return F.linear(x, self.weight_v * (self.weight_g / norm))
        if x.shape[0] <= x.shape[1]:
            y: Tensor = _ScaledProduct.apply(x, self.weight_v, self.weight_g, self.onednn)
            return y
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return linear(x, weight, onednn=self.onednn)

    def cache_weight(self, dtype: torch.dtype | None = None) -> None:
        """Create cached_weight in `dtype`; without `dtype`, refresh it if it exists."""
        if dtype is not None:
            self.cached_weight = torch.empty_like(self.weight_v, dtype=dtype, requires_grad=False)
        if self.cached_weight is not None:
            with torch.no_grad():
                self.cached_weight.copy_(torch._weight_norm(self.weight_v, self.weight_g, 0))


def _refresh_cache(layer: WeightNormLinear, _: object) -> None:
    layer.cache_weight()


class _ScaledProduct(torch.autograd.Function):
    """WeightNormLinear without W: scales the product [rows, K] instead of the weight [K, D].

    In fp32 the forward pass reads 4 K D bytes for the norms and 4 K D for the product. Computing W
    first would write 4 K D more and keep them for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_v: Tensor, weight_g: Tensor, onednn: bool) -> Tensor:
        norm = torch.linalg.vector_norm(weight_v, dim=1, keepdim=True)
        ctx.save_for_backward(x, weight_v, weight_g, norm)
        ctx.onednn = onednn
        return linear(x, weight_v, onednn=onednn).mul_((weight_g / norm).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_v, weight_g, norm = ctx.saved_tensors
        dx = dv = dg = None
        if ctx.needs_input_grad[0]:
            scale = (weight_g / norm).T.to(dy.dtype)
            dx = product(dy * scale, weight_v.to(dy.dtype), onednn=ctx.onednn).to(x.dtype)
        if any(ctx.needs_input_grad[1:]):
            dw = product(dy.T, x.to(dy.dtype), onednn=ctx.onednn)  # gradient of W
            dv, dg = torch.ops.aten._weight_norm_interface_backward(
                dw.to(weight_v.dtype), weight_v, weight_g, norm, 0
            )
        return dx, dv, dg, None


class DINOHead(nn.Module):
    """Three linear layers with GELU, L2 normalisation, a weight-normed layer to K prototypes.

    Args:
        in_dim: width D of the backbone.
        out_dim: number of prototypes K.
        use_bn: batch norm after each hidden layer.
        norm_last_layer: fix the norm of the prototypes at 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in ((in_dim, hidden_dim), (hidden_dim, hidden_dim)):
            layers.append(Linear(width_in, width_out))
            if use_bn:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(nn.GELU())
        layers.append(Linear(hidden_dim, bottleneck_dim))
        self.in_dim = in_dim
        self.mlp = nn.Sequential(*layers)
        self.mlp.apply(init_linear)
        self.last_layer = WeightNormLinear(
            bottleneck_dim, out_dim, train_magnitude=not norm_last_layer
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [rows, D] -> [rows, K]."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class MultiCropWrapper(nn.Module):
    """Backbone and head for crops of several sizes.

    The backbone runs once per crop size, the head once for all crops. With `packing` the backbone
    also runs once, on a list with one tensor per size, which a VisionTransformer supports.
    """

    head: DINOHead

    def __init__(self, backbone: nn.Module, head: DINOHead):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.packing = False

    def forward(
        self, crops: Sequence[Tensor], *, with_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map S crops [B, 3, H, W], with crops of one size adjacent, -> [S * B, K].

        With with_features, also return the backbone's output [S * B, D], the head's input.
        """
        groups = [torch.cat(tuple(group)) for _, group in groupby(crops, key=_size)]
        if self.packing:
            features = self.backbone(groups)
        else:
            features = torch.cat([self.backbone(group) for group in groups])
        logits: Tensor = self.head(features)
        return (logits, features) if with_features else logits


def _size(images: Tensor) -> torch.Size:
    return images.shape[-2:]

"""Linear layers in fp32 on a CPU by oneDNN instead of PyTorch's BLAS.

PyTorch calls MKL, which on AMD processors with AVX-512 uses half the width of the vector units.
oneDNN uses all of it. The results differ by rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class OneDNNLayer(nn.Module):
    """A layer whose products oneDNN may compute.

    Attributes: onednn: as in `linear`.
    """

    onednn = False


class Linear(nn.Linear, OneDNNLayer):
    """torch.nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, onednn=self.onednn)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, onednn: bool) -> Tensor:
    """Compute x W^T + bias: [..., D] -> [..., K].

    Args:
        weight: [K, D].
        bias: [K].
        onednn: use oneDNN where it can: for matrices in fp32 on a CPU, outside autocast regions,
            and while nothing compiles, traces or transforms the operations.
    """
    if not (onednn and _can_use_onednn(x, weight.t())):
        return F.linear(x, weight, bias)
    if x.dim() == 2:
        y: Tensor = _OneDNNLinear.apply(x, weight, bias)
        return y
    return linear(x.flatten(0, -2), weight, bias, onednn=True).unflatten(0, x.shape[:-1])


def product(a: Tensor, b: Tensor, *, onednn: bool) -> Tensor:
    """Compute a @ b: [M, D] x [D, K] -> [M, K], without a gradient of its own.

    Args: onednn: as in `linear`.
    """
    return _product(a, b) if onednn and _can_use_onednn(a, b) else a @ b


@functools.cache
def onednn_problem() -> str | None:
    """Return the reason why oneDNN cannot compute linear layers; None if it can."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"PyTorch {torch.__version__} does not have its operator"
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        for shape in ((5, 7), (3, 7), (3,))
    )
    try:
        got = (_product(x, weight.t(), bias), _product(weight, x.t()), _product(x.t(), x))
    except (RuntimeError, TypeError) as error:
        return str(error).partition("\n")[0]
    want = (F.linear(x, weight, bias), weight @ x.t(), x.t() @ x)
    for a, b in zip(got, want, strict=True):
        distance = (a - b).abs().max().item()
        if not distance < 1e-5:  # also NaN
            return f"its result is off by {distance:.2g}"
    return None


class _OneDNNLinear(torch.autograd.Function):
    """x [M, D], weight [K, D], bias [K] -> [M, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(dy, weight) if needs_x else None,
            _product(dy.t(), x) if needs_weight else None,
            dy.sum(0) if needs_bias else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a @ b + bias by oneDNN."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return y


def _can_use_onednn(a: Tensor, b: Tensor) -> bool:
    """Return True if oneDNN can compute a @ b: [..., M, D] x [D, K]; False for wrong shapes."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_autocast_enabled("cpu")
        and {type(a), type(b)} <= {Tensor, nn.Parameter}
        and not a.is_nested
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and a.dim() >= 2
        and a.shape[-1] == b.shape[0]
        and a.numel() > 0
        and b.numel() > 0
    )

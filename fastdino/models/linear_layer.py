"""Linear layers in fp32 on a CPU whose products oneDNN computes, in place of PyTorch's BLAS.

PyTorch calls MKL, which uses half the width of the vector units on AMD processors with AVX-512;
oneDNN asks the processor itself. Both round differently, but equally well.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class OneDNNLayer(nn.Module):
    """A layer that computes `linear`.

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
        onednn: use oneDNN where it applies: fp32 on a CPU, outside autocast and compiled code.
    """
    if not onednn or not _in_fp32_on_a_cpu(x):
        return F.linear(x, weight, bias)
    if x.dim() == 2:
        y: Tensor = _OneDNNLinear.apply(x, weight, bias)
        return y
    return linear(x.flatten(0, -2), weight, bias, onednn=True).unflatten(0, x.shape[:-1])


def product(a: Tensor, b: Tensor, *, onednn: bool) -> Tensor:
    """Compute a @ b: [M, D] x [D, K] -> [M, K], without a gradient of its own.

    Args: onednn: as in `linear`.
    """
    return _product(a, b) if onednn and _in_fp32_on_a_cpu(a) else a @ b


@functools.cache
def onednn_problem() -> str | None:
    """Return the reason why oneDNN cannot compute linear layers; None if it can."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"PyTorch {torch.__version__} does not offer it"
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((5, 7), (3, 7), (3,)))
    try:
        got = (_product(x, weight.t(), bias), _product(weight, x.t()), _product(x.t(), x))
    except (RuntimeError, TypeError) as error:
        return str(error).partition("\n")[0]
    want = (F.linear(x, weight, bias), weight @ x.t(), x.t() @ x)
    wrong = max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))
    return None if wrong < 1e-5 else f"its result is off by {wrong:.2g}"


class _OneDNNLinear(torch.autograd.Function):
    """x [M, D], weight [K, D], bias [K] -> [M, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(dy, weight) if of_x else None,
            _product(dy.t(), x) if of_weight else None,
            dy.sum(0) if of_bias else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a @ b + bias by oneDNN."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return y


def _in_fp32_on_a_cpu(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

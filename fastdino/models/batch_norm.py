"""Batch norm with the statistics of all ranks: torch.nn.SyncBatchNorm on GPUs, and one for CPUs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def has_batch_norm(network: nn.Module) -> bool:
    """Return True if a layer normalizes over the batch."""
    return any(map(is_batch_norm, network.modules()))


def is_batch_norm(module: nn.Module) -> bool:
    """Return True for a layer that normalizes over the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def synchronize_batch_norm(network: M, device: torch.device) -> M:
    """Replace every batch norm of `network`, in place, by one over the batches of all ranks."""
    if device.type == "cuda":
        converted: M = convert_sync_batchnorm(network)  # timm's keeps the activation of its layers
        return converted
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if is_batch_norm(layer):
                setattr(parent, name, _like(layer))
    return network


def _like(layer: nn.Module) -> CPUSyncBatchNorm:
    """Return a CPUSyncBatchNorm with the settings, parameters and buffers of a batch norm."""
    cls = _CPUSyncBatchNormAct if isinstance(layer, BatchNormAct2d) else CPUSyncBatchNorm
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    return new


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks on a CPU, where torch.nn.SyncBatchNorm raises.

    In training mode, with mean m and variance v over the n values per channel of all ranks:
    y = weight * (x - m) / sqrt(v + eps) + bias. The running variance averages v * n / (n - 1).
    The ranks' batches may differ in size. Collectives cannot be compiled, so torch.compile splits
    its graph here.

    Source: Ioffe & Szegedy 2015.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected [B, C, ...], got {list(input.shape)}")

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, ...] to a tensor of the same shape and dtype."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = _Total.apply(torch.cat([x.sum(dims), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        x = x - mean.view(shape)
        variance = _Total.apply(x.square().sum(dims)) / n
        self._average(mean.detach(), variance.detach() * n / (n - 1))
        y = x * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _average(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum
        if weight is None:  # the mean of all batches
            weight = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class _CPUSyncBatchNormAct(CPUSyncBatchNorm):
    """timm's BatchNormAct2d, batch norm with dropout and activation, over all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))  # type: ignore[operator]
        return output


class _Total(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

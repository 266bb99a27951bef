"""Softmax attention as plain batched products, in blocks of sequences; for CPUs.

In bf16, the backward pass of PyTorch's fused CPU kernel takes many times longer than its products.
For sequences as short as those of crops, the attention weights P are small enough to be kept:

    P = softmax(Q K^T / sqrt(D)),  O = P V                    (as in the paper's code)
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP))
    dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)

Legend: S sequences, N tokens, M queries (N or 1), H heads, D channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements per thread of a block's weights. Smaller blocks would fit a core's L2 cache in fp32 too,
# but then the interpreter's time per operation counts.
_BLOCK_ELEMENTS = 1 << 20


def matmul_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(Q K^T / sqrt(D)) V -> [S, M, H, D].

    Args:
        query: [S, M, H, D]; any strides.
        key, value: [S, N, H, D], of the query's dtype.
    """
    if torch.compiler.is_compiling():  # it makes its own blocks
        q, k, v = (x.transpose(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        return ((q @ k.transpose(-2, -1)).softmax(dim=-1) @ v).transpose(1, 2)
    out: Tensor = _MatmulAttention.apply(query, key, value)
    return out


class _MatmulAttention(torch.autograd.Function):
    """matmul_attention; keeps the inputs and the weights [S, H, M, N] for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        S, M, H, D = query.shape
        N = key.shape[1]
        keep = any(ctx.needs_input_grad)
        step = _sequences_per_block(H * M * N)
        weights = query.new_empty(S if keep else min(step, S), H, M, N)
        out = query.new_empty(S, M, H, D)
        for block in _blocks(S, step):
            q, k, v = (_by_head(x[block]) for x in (query, key, value))
            p = weights[block] if keep else weights[: len(query[block])]
            p = p.flatten(0, 1)
            torch.bmm(q.mul_(1 / math.sqrt(D)), k.transpose(1, 2), out=p)
            torch._softmax(p, -1, False, out=p)
            _write_by_head(out[block], torch.bmm(p, v))
        if keep:
            ctx.save_for_backward(query, key, value, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, weights = ctx.saved_tensors
        sequences, D = query.shape[0], query.shape[-1]
        grads = [x.new_empty(x.shape) for x in (query, key, value)]
        for block in _blocks(sequences, _sequences_per_block(weights[0].numel())):
            q, k, v, do = (_by_head(x[block]) for x in (query, key, value, grad))
            p = weights[block].flatten(0, 1)
            dv = torch.bmm(p.transpose(1, 2), do)
            ds = torch.bmm(do, v.transpose(1, 2))
            torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)
            scale = 1 / math.sqrt(D)
            dq = torch.bmm(ds, k.mul_(scale))
            dk = torch.bmm(ds.transpose(1, 2), q.mul_(scale))
            for whole, part in zip(grads, (dq, dk, dv), strict=True):
                _write_by_head(whole[block], part)
        return grads[0], grads[1], grads[2]


def _sequences_per_block(weights: int) -> int:
    """Return how many sequences with so many weights the caches of all threads hold."""
    return max(1, torch.get_num_threads() * _BLOCK_ELEMENTS // weights)


def _blocks(sequences: int, step: int) -> Iterator[slice]:
    for start in range(0, sequences, step):
        yield slice(start, min(start + step, sequences))


def _by_head(x: Tensor) -> Tensor:
    """Copy [b, N, H, D] to contiguous [b * H, N, D]."""
    copy = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    return copy.copy_(x.transpose(1, 2)).flatten(0, 1)


def _write_by_head(out: Tensor, x: Tensor) -> None:
    """Write [b * H, N, D] to [b, N, H, D]."""
    out.transpose(1, 2).copy_(x.unflatten(0, (len(out), -1)))

"""Measurements on a CPU that decide between precisions, attention backends and linear layers.

Each takes a fraction of a second on an idle machine with fast bf16. Rounds are interleaved, and the
shortest time of each candidate counts, which other processes disturb the least. After _SECONDS no
round begins: one bf16 product takes half a second on a processor without instructions for it. If
the warmup takes that long, its own times count.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdino.models.attention import AttentionInputs, attend, token_layout
from fastdino.models.linear_layer import linear

# bf16 must be so many times faster than fp32: casts and rounding cost something too.
BF16_GAIN = 2.0
# A closer result is a tie, which is sdpa's.
MATMUL_GAIN = 1.15
# A closer result is a tie, which is PyTorch's own BLAS's.
ONEDNN_GAIN = 1.15
# Attention weights of a step, below which no backend matters, and of the measured part of a step.
NEGLIGIBLE_WEIGHTS, MEASURED_WEIGHTS = 1 << 16, 1 << 21
# Multiplications of a layer, below which its products do not matter, and of the measured one.
NEGLIGIBLE_PRODUCT, MEASURED_PRODUCT = 1 << 24, 1 << 29
_ROUNDS, _SECONDS, _SIDE = 5, 2.0, 768


@functools.cache
def bf16_speedup() -> float:
    """Return how many times faster a large matrix product is in bf16 than in fp32."""
    products = []
    for dtype in (torch.float32, torch.bfloat16):
        x = _noise((_SIDE, _SIDE)).to(dtype)
        products.append(functools.partial(torch.mm, x, x))
    fp32, bf16 = _shortest_seconds(products)
    return fp32 / bf16


@functools.cache
def matmul_speedup(inputs: AttentionInputs) -> float:
    """Return how many times faster matmul is than sdpa: forward and backward pass of one block.

    The sequences are a part of those of a step: see measured_part.
    """
    part = measured_part(inputs)
    passes = [functools.partial(_attention_pass, part, backend) for backend in ("sdpa", "matmul")]
    sdpa, matmul = _shortest_seconds(passes)
    return sdpa / matmul


@functools.cache
def onednn_speedup(rows: int, dim: int) -> float:
    """Return how many times faster oneDNN's products are: both passes of a block's largest layer.

    The layer maps [rows, dim] to [rows, 4 dim], of so few rows that they have MEASURED_PRODUCT.
    """
    rows = max(1, min(rows, MEASURED_PRODUCT // (4 * dim * dim)))
    torch_blas, onednn = _shortest_seconds(
        [functools.partial(_linear_pass, rows, dim, onednn) for onednn in (False, True)]
    )
    return torch_blas / onednn


def _linear_pass(rows: int, dim: int, onednn: bool) -> tuple[Tensor, ...]:
    parts = _noise((rows + 4 * dim, dim)).split((rows, 4 * dim))
    x, weight = (part.detach().requires_grad_() for part in parts)
    y = linear(x, weight, onednn=onednn)
    return torch.autograd.grad(y, (x, weight), y.detach())


def measured_part(inputs: AttentionInputs) -> AttentionInputs:
    """Return a part of the sequences of a step that has at most MEASURED_WEIGHTS.

    It has fewer images; if that is not enough, fewer heads; then fewer crops of each size. A head
    of one sequence of each size is the least.
    """
    part = dataclasses.replace(inputs, images=_share(inputs.images, inputs.weights))
    part = dataclasses.replace(part, heads=_share(part.heads, part.weights))
    weights = part.weights
    crops = tuple((_share(crops, weights), n) for crops, n in part.sequences)
    return dataclasses.replace(part, sequences=crops)


def _share(number: int, weights: int) -> int:
    """Reduce the number of things with so many weights to those with MEASURED_WEIGHTS."""
    return max(1, min(number, MEASURED_WEIGHTS * number // weights))


def _attention_pass(part: AttentionInputs, backend: str) -> tuple[Tensor, ...]:
    groups = tuple((part.images * crops, n) for crops, n in part.sequences)
    layout = token_layout(groups, part.device, backend)
    qkv = _noise((layout.tokens, 3, part.heads, part.head_dim)).to(part.dtype)
    query, key, value = qkv.requires_grad_().unbind(1)
    out = attend(query, key, value, layout)
    return torch.autograd.grad(out, qkv, out.detach())


@functools.lru_cache(maxsize=1)
def _noise(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _shortest_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    shortest: list[float] = []
    begin = time.perf_counter()
    for round_ in range(_ROUNDS + 1):  # the first one warms up
        if round_ and time.perf_counter() - begin > _SECONDS:
            break
        with torch.inference_mode(False), torch.enable_grad():  # the caller may be without
            seconds = [_seconds(call) for call in calls]
        shortest = seconds if round_ < 2 else list(map(min, shortest, seconds))
    return shortest


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

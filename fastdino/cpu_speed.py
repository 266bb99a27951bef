"""Measurements on a CPU that decide between precisions and between attention backends.

Each takes a fraction of a second on an idle machine. Rounds are interleaved, and the shortest time
of each candidate counts, which other processes disturb the least. After _SECONDS no round begins:
one bf16 product takes half a second on a processor without instructions for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdino.models.attention import AttentionInputs, attend, token_layout

# bf16 must be so many times faster than fp32: casts and rounding cost something too.
BF16_GAIN = 2.0
# A closer result is a tie, which is sdpa's.
MATMUL_GAIN = 1.15
# Attention weights of a step, below which no backend matters, and of the measured part of a step.
NEGLIGIBLE_WEIGHTS, MEASURED_WEIGHTS = 1 << 16, 1 << 21
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

    The sequences are those of a step, of so few images that they have MEASURED_WEIGHTS.
    """
    images = max(1, min(inputs.images, MEASURED_WEIGHTS * inputs.images // inputs.weights))
    groups = tuple((images * crops, n) for crops, n in inputs.sequences)
    passes = [functools.partial(_attention_pass, inputs, groups, x) for x in ("sdpa", "matmul")]
    sdpa, matmul = _shortest_seconds(passes)
    return sdpa / matmul


def _attention_pass(
    inputs: AttentionInputs, groups: tuple[tuple[int, int], ...], backend: str
) -> tuple[Tensor, ...]:
    layout = token_layout(groups, inputs.device, backend)
    qkv = _noise((layout.tokens, 3, inputs.heads, inputs.head_dim)).to(inputs.dtype)
    query, key, value = qkv.requires_grad_().unbind(1)
    out = attend(query, key, value, layout)
    return torch.autograd.grad(out, qkv, out.detach())


@functools.lru_cache(maxsize=1)
def _noise(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _shortest_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    shortest, begin = [float("inf")] * len(calls), time.perf_counter()
    for round_ in range(_ROUNDS + 1):  # the first one warms up
        if round_ > 1 and time.perf_counter() - begin > _SECONDS:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if round_:
                shortest[i] = min(shortest[i], seconds)
    return shortest

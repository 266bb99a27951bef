"""The shapes of a network's parameters, from its architecture: ViT/16 with DINO's head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, ...]
# Width D, depth. S, B and L: Dosovitskiy et al. 2020, Touvron et al. 2020.
ARCHS = {"ViT-S": (384, 12), "ViT-B": (768, 12), "ViT-L": (1024, 24), "a toy": (32, 2)}


def vit_shapes(width: int, depth: int, patch: int = 16, image: int = 224) -> list[Shape]:
    """CLS token, positions, patch embedding, `depth` blocks with biases, the last norm."""
    D = width
    block: list[Shape] = [
        (D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,),  # norm, qkv, projection
        (D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,),  # norm, MLP
    ]  # fmt: skip
    tokens = (image // patch) ** 2 + 1
    embedding: list[Shape] = [(1, 1, D), (1, tokens, D), (D, 3, patch, patch), (D,)]
    return [*embedding, *block * depth, (D,), (D,)]


def head_shapes(width: int, K: int, hidden: int, bottleneck: int = 256) -> list[Shape]:
    """Three linears, then the weight-normed prototypes: magnitudes [K, 1], directions [K, 256]."""
    return [
        (hidden, width), (hidden,), (hidden, hidden), (hidden,), (bottleneck, hidden),
        (bottleneck,), (K, 1), (K, bottleneck),
    ]  # fmt: skip


def network_shapes(arch: str, K: int = 65536) -> list[Shape]:
    """All parameters of backbone and head."""
    width, depth = ARCHS[arch]
    hidden = 64 if arch == "a toy" else 2048
    return vit_shapes(width, depth) + head_shapes(width, K, hidden)


def random_tensors(
    shapes: list[Shape], seed: int, device: torch.device, scale: Callable[[int], float]
) -> list[Tensor]:
    """Normal noise in these shapes; scale(index) is the standard deviation of each."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device=device) * scale(index)
        for index, shape in enumerate(shapes)
    ]

"""Sinkhorn-Knopp targets of the teacher's logits: as a center, and as a tensor of probabilities.

Predicted for an H200 (4.3 TB/s), not measured: N = 3771, K = 65536, bf16, 3 iterations read the
logits 5 times, 2.5 GB, so at least 575 us. About 30 launches on K numbers, 2-5 us each, and the
groups' column sums add 75-165 us. DINOv2's order of operations moves about 40 GB in fp32: 10 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor

from benchmarks.comparison import Compare, Comparison, assert_close, build_baselines

TEMP, ITERATIONS = 0.07, 3
TOLERANCE = 1e-4  # relative, of fp32 targets
Targets = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """N rows and K prototypes."""

    N: int
    K: int = 65536
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"N{self.N} K{self.K} {str(self.dtype).removeprefix('torch.')}"


SIZES = {
    "cuda": [Size(3771), Size(2496, 131072), Size(64, 262144), Size(3771, dtype=torch.float32)],
    "cpu": [Size(256, dtype=torch.float32), Size(256)],
    "quick": [Size(16, 4096, torch.float32), Size(16, 4096)],
}


def dinov2(teacher: Tensor) -> Tensor:
    """Balance in the order of operations of DINOv2, in place."""
    Q = torch.exp(teacher.float() / TEMP).t()
    K, N = Q.shape
    Q /= torch.sum(Q)
    for _ in range(ITERATIONS):
        Q /= torch.sum(Q, dim=1, keepdim=True)
        Q /= K
        Q /= torch.sum(Q, dim=0, keepdim=True)
        Q /= N
    Q *= N
    return Q.t()


@functools.lru_cache(maxsize=1)
def _compiled(shape: torch.Size) -> Targets:
    """Compile the equations for one shape."""
    torch._dynamo.reset()
    return torch.compile(
        lambda teacher: reference.sinkhorn_knopp(teacher.float(), TEMP, ITERATIONS),
        fullgraph=True,
        dynamic=False,
    )


def compiled(teacher: Tensor) -> Tensor:
    return _compiled(teacher.shape)(teacher)


def center(teacher: Tensor) -> Tensor:
    return fastdino_kernels.sinkhorn_center(teacher, TEMP, ITERATIONS)


def probabilities(teacher: Tensor) -> Tensor:
    return fastdino_kernels.sinkhorn_knopp(teacher, TEMP, ITERATIONS)


BASELINES: dict[str, tuple[str, Targets]] = {
    "DINOv2's order, eager": ("paper", dinov2),
    "the equations, torch.compile": ("compile", compiled),
    "fastdino_kernels, center": ("ours", center),
    "fastdino_kernels, probabilities": ("ours", probabilities),
}


def counted_bytes(size: Size) -> tuple[int, str]:
    """Count what the center must read; the baselines and the probabilities move more."""
    reads = 2 * ITERATIONS - 1
    return reads * size.N * size.K * size.dtype.itemsize, f"each logit read {reads} times"


@functools.lru_cache(maxsize=1)
def make_teacher(size: Size, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.N, size.K)
    return (0.3 * torch.randn(shape, generator=generator, device=device)).to(size.dtype)


def check(targets: Targets, size: Size, device: torch.device) -> None:
    """Compare with the equations in float64, for the first rows."""
    teacher = make_teacher(size, device)[:64]
    result = targets(teacher)
    if result.dim() == 1:
        result = ((teacher.double() - result) / TEMP).softmax(dim=1)
    expected = reference.sinkhorn_knopp(teacher.double(), TEMP, ITERATIONS)
    assert_close("the matrix of targets", result, expected, TOLERANCE)


def sinkhorn_comparison(size: Size, device: torch.device) -> Comparison:
    baselines = build_baselines(
        BASELINES,
        lambda targets: partial(targets, make_teacher(size, device)),
        lambda targets: check(targets, size, device),
    )
    return Comparison(f"Sinkhorn-Knopp, {size}", baselines, *counted_bytes(size))


@pytest.mark.parametrize("baseline", BASELINES)
def test_sinkhorn(compare: Compare, size: Size, baseline: str) -> None:
    compare(sinkhorn_comparison, size, baseline=baseline)

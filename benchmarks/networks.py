"""Parameters, gradients and teachers in the shapes of a network: ViT/16 with DINO's head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdino.bench.baselines.paper_step import plain_network
from fastdino.config import TrainConfig

Shape = tuple[int, ...]
MAX_NORM = 3.0


@dataclass(frozen=True)
class Size:
    """A backbone, or "toy", and a head of K prototypes."""

    arch: str
    K: int = 65536

    def __str__(self) -> str:
        return f"{self.arch} K{self.K}"

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Return the shapes of all parameters."""
        if self.arch == "toy":
            return [(1, 17, 32), (96, 32), (96,), (128, 32), (128,), (32,), (self.K, 32)]
        with torch.device("meta"):
            network = plain_network(TrainConfig(arch=self.arch, out_dim=self.K))
        return [tuple(parameter.shape) for parameter in network.parameters()]

    @property
    def counts(self) -> list[int]:
        """Return the number of elements of each parameter."""
        return [math.prod(shape) for shape in self.shapes]


SIZES = {
    "cuda": [Size("vit_small"), Size("vit_base"), Size("vit_large")],
    "cpu": [Size("vit_small")],
    "quick": [Size("toy", 1024)],
}


@dataclass
class Network:
    """Student, teacher, bf16 copies (shadows) of both, and the gradients before every call."""

    student: list[Tensor]
    teacher: list[Tensor]
    student_shadow: list[Tensor]
    teacher_shadow: list[Tensor]
    gradients: list[Tensor]

    @property
    def weights(self) -> list[Tensor]:
        """Return the student's parameters without autograd."""
        return [parameter.detach() for parameter in self.student]

    def restore_gradients(self) -> list[Tensor]:
        """Undo the clip of an earlier call; returns the student."""
        torch._foreach_copy_([grad_of(p) for p in self.student], self.gradients)
        return self.student


def make_network(size: Size, device: torch.device) -> Network:
    """Build a random network; gradient norms alternate between 1/3 and 3 times MAX_NORM."""
    student, teacher = (
        random_tensors(size.shapes, seed, device, lambda _: 0.02) for seed in (0, 1)
    )
    counts = size.counts
    gradients = random_tensors(
        size.shapes, 2, device, lambda i: MAX_NORM * (1 / 3, 3)[i % 2] / math.sqrt(counts[i])
    )
    return network_of(student, teacher, gradients)


def network_of(student: list[Tensor], teacher: list[Tensor], gradients: list[Tensor]) -> Network:
    """Build a network from its tensors; the student becomes parameters."""
    parameters: list[Tensor] = [torch.nn.Parameter(p) for p in student]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    shadows = [[torch.zeros_like(p, dtype=torch.bfloat16) for p in student] for _ in range(2)]
    return Network(parameters, teacher, shadows[0], shadows[1], gradients)


def grad_of(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def random_tensors(
    shapes: list[Shape], seed: int, device: torch.device, scale: Callable[[int], float]
) -> list[Tensor]:
    """Return normal noise; scale(index) is the standard deviation of each tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device=device) * scale(index)
        for index, shape in enumerate(shapes)
    ]

"""Gradient clipping over a whole network: each parameter by its own norm, and all by one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor

from benchmarks.bench_ema import SIZES, Size
from benchmarks.contest import Compete, Contest, Variant, assert_close
from benchmarks.measure import Thunk
from benchmarks.shapes import network_shapes, random_tensors

__all__ = ["SIZES"]
MAX_NORM = 3.0
Clip = Callable[[list[Tensor]], object]


@dataclass
class Network:
    """Parameters, and the gradients that they get before every call."""

    parameters: list[Tensor]
    gradients: list[Tensor]

    def with_gradients(self) -> list[Tensor]:
        torch._foreach_copy_([grad_of(p) for p in self.parameters], self.gradients)
        return self.parameters


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@functools.lru_cache(maxsize=1)
def make_network(size: Size, device: torch.device) -> Network:
    """Every other gradient has three times the norm that is allowed, the others a third of it."""
    shapes = network_shapes(size.arch, size.K)
    count = [math.prod(shape) for shape in shapes]
    gradients = random_tensors(
        shapes, 0, device, lambda i: MAX_NORM * (1 / 3, 3)[i % 2] / math.sqrt(count[i])
    )
    parameters: list[Tensor] = [torch.nn.Parameter(torch.empty_like(g)) for g in gradients]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return Network(parameters, gradients)


def paper_clip(parameters: list[Tensor]) -> list[float]:
    """The paper's code: the host reads every norm, and decides."""
    norms = []
    for parameter in parameters:
        norm = grad_of(parameter).data.norm(2)
        norms.append(norm.item())
        factor = MAX_NORM / (norm + reference.CLIP_EPS)
        if factor < 1:
            grad_of(parameter).data.mul_(factor)
    return norms


def torch_global(parameters: list[Tensor]) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def ours(parameters: list[Tensor], impl: str = "auto") -> Tensor:
    return fastdino_kernels.clip_grad_norms_(parameters, MAX_NORM, impl=impl)


def ours_global(parameters: list[Tensor], impl: str = "auto") -> Tensor:
    return fastdino_kernels.clip_grad_norm_(parameters, MAX_NORM, impl=impl)


EACH: dict[str, tuple[str, Clip]] = {
    "the paper's loop": ("paper", paper_clip),
    "fastdino_kernels": ("ours", ours),
}
GLOBAL: dict[str, tuple[str, Clip]] = {
    "torch.nn.utils.clip_grad_norm_": ("", torch_global),
    "fastdino_kernels": ("ours", ours_global),
}
if torch.cuda.is_available():  # elsewhere it is what "auto" takes
    EACH["fastdino_kernels, torch"] = ("", partial(ours, impl="torch"))
    GLOBAL["fastdino_kernels, torch"] = ("", partial(ours_global, impl="torch"))


def counted_bytes(size: Size, all_by_one: bool) -> tuple[int, str]:
    """Each gradient read for its norm; what is scaled read again and written; fp32."""
    counts = [math.prod(shape) for shape in network_shapes(size.arch, size.K)]
    scaled = sum(counts if all_by_one else counts[1::2])
    words = f"{sum(counts)} gradients read once, {scaled} of them again and written"
    return 4 * (sum(counts) + 2 * scaled), words


def check(clip: Clip, size: Size, all_by_one: bool, device: torch.device) -> None:
    """Every gradient agrees with the equation in float64."""
    network = make_network(size, device)
    clip(network.with_gradients())
    total = torch.stack([g.double().norm() for g in network.gradients]).norm()
    for index, gradient in enumerate(network.gradients):
        norm = total if all_by_one else gradient.double().norm()
        right = gradient.double() * (MAX_NORM / (norm + reference.CLIP_EPS)).clamp(max=1)
        assert_close(f"gradient[{index}]", grad_of(network.parameters[index]), right, 1e-5)


def clip_contest(size: Size, all_by_one: bool, device: torch.device) -> Contest:
    network = make_network(size, device)

    def prepare(clip: Clip) -> Thunk:
        # Clipped gradients are not clipped again: they are put back before every call.
        parameters = network.with_gradients()
        return partial(clip, parameters)

    variants = [
        Variant(
            name,
            partial(prepare, clip),
            partial(check, clip, size, all_by_one, device),
            role,
            host_reads=clip is paper_clip,
        )
        for name, (role, clip) in (GLOBAL if all_by_one else EACH).items()
    ]
    name = f"Clip {'by the global norm' if all_by_one else 'each by its own norm'}, {size}"
    return Contest(name, variants, *counted_bytes(size, all_by_one), calls=1)


@pytest.mark.parametrize("variant", EACH)
def test_clip_each(compete: Compete, size: Size, variant: str) -> None:
    compete(clip_contest, size, False, variant=variant)


@pytest.mark.parametrize("variant", GLOBAL)
def test_clip_global(compete: Compete, size: Size, variant: str) -> None:
    compete(clip_contest, size, True, variant=variant)

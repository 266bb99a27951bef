"""Gradient clipping over a whole network: each parameter by its own norm, or all by one norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor

from benchmarks.comparison import Compare, Comparison, assert_close, build_baselines
from benchmarks.networks import MAX_NORM, SIZES, Network, Size, grad_of, make_network
from fastdino.bench.measurement import Call

__all__ = ["SIZES"]
Clip = Callable[[list[Tensor]], object]


def paper_clip(parameters: list[Tensor]) -> list[float]:
    """Clip as the paper's code: the host reads every norm and decides."""
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


TOLERANCE = 1e-5  # relative
# PyTorch's norm on a CPU, which these use, is off by 8e-4 for the 65536 x 256 gradient of the last
# layer: it adds all squares one after the other in the fp32 lanes of one register.
PYTORCH_NORMS: tuple[Clip, ...] = (paper_clip, torch_global)
PYTORCH_NORMS_CPU_TOLERANCE = 2e-3
BASELINES: dict[bool, dict[str, tuple[str, Clip]]] = {
    False: {"the paper's loop": ("paper", paper_clip), "fastdino_kernels": ("ours", ours)},
    True: {
        "torch.nn.utils.clip_grad_norm_": ("", torch_global),
        "fastdino_kernels": ("ours", ours_global),
    },
}
if torch.cuda.is_available():  # on a CPU, "auto" already selects it
    for all_by_one, run in ((False, ours), (True, ours_global)):
        BASELINES[all_by_one]["fastdino_kernels, torch"] = ("", partial(run, impl="torch"))


@functools.lru_cache(maxsize=1)
def shared_network(size: Size, device: torch.device) -> Network:
    """Build the network of all checks and baselines, of which only the gradients change."""
    return make_network(size, device)


def counted_bytes(size: Size, all_by_one: bool) -> tuple[int, str]:
    """Count each fp32 gradient read for its norm; those scaled are read again and written."""
    scaled = sum(size.counts if all_by_one else size.counts[1::2])
    total = sum(size.counts)
    return 4 * (total + 2 * scaled), f"{total} gradients read once, {scaled} again and written"


def check(clip: Clip, size: Size, all_by_one: bool, device: torch.device) -> None:
    """Compare every gradient with the equation in float64."""
    inexact = device.type == "cpu" and clip in PYTORCH_NORMS
    tolerance = PYTORCH_NORMS_CPU_TOLERANCE if inexact else TOLERANCE
    network = shared_network(size, device)
    clip(network.restore_gradients())
    total = torch.stack([g.double().norm() for g in network.gradients]).norm()
    for index, gradient in enumerate(network.gradients):
        norm = total if all_by_one else gradient.double().norm()
        expected = gradient.double() * (MAX_NORM / (norm + reference.CLIP_EPS)).clamp(max=1)
        assert_close(f"gradient[{index}]", grad_of(network.student[index]), expected, tolerance)


def clip_comparison(size: Size, all_by_one: bool, device: torch.device) -> Comparison:
    network = shared_network(size, device)

    def prepare(clip: Clip) -> Call:
        return partial(clip, network.restore_gradients())

    checked = partial(check, size=size, all_by_one=all_by_one, device=device)
    baselines = build_baselines(BASELINES[all_by_one], prepare, checked, host_reads=paper_clip)
    title = f"Clip {'by the global norm' if all_by_one else 'each by its own norm'}, {size}"
    return Comparison(title, baselines, *counted_bytes(size, all_by_one), calls=1)


CASES = [(all_by_one, name) for all_by_one, names in BASELINES.items() for name in names]


@pytest.mark.parametrize(("all_by_one", "baseline"), CASES)
def test_clip(compare: Compare, size: Size, all_by_one: bool, baseline: str) -> None:
    compare(clip_comparison, size, all_by_one, baseline=baseline)

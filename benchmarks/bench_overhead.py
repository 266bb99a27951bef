"""How long an eager call keeps the host: inputs so small that the work itself is nothing.

On a GPU the host only queues the work: a call that keeps it longer than the GPU needs leaves the
GPU idle.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fastdino_kernels
import pytest
import torch
from torch import Tensor

from benchmarks.bench_adamw_ema import VARIANTS as OPTIMIZERS
from benchmarks.bench_adamw_ema import Network
from benchmarks.bench_dino_loss import Size as LossSize
from benchmarks.bench_dino_loss import both, forward, make_inputs, ours
from benchmarks.contest import Compete, Contest, Variant
from benchmarks.loss_variants import Loss, paper_eager
from benchmarks.shapes import network_shapes

CALLS = 50
LOSS_SIZE = LossSize(1, 10, 64)
# As many tensors as ViT-S/16 and its head have, of one element each.
TENSORS = len(network_shapes("ViT-S"))
MOMENTUM, MAX_NORM = 0.996, 3.0

LOSSES: dict[str, tuple[str, Loss]] = {
    "the paper's code, eager": ("paper", paper_eager),
    "fastdino_kernels": ("ours", ours),
}


def nothing_to_check() -> None:
    """The suites of the operations do."""


def loss_contest(with_backward: bool, device: torch.device) -> Contest:
    inputs = make_inputs(LOSS_SIZE, 0, device)
    run = both if with_backward else forward
    variants = [
        Variant(name, partial(partial, run, loss, inputs), nothing_to_check, role)
        for name, (role, loss) in LOSSES.items()
    ]
    name = "forward + backward" if with_backward else "forward"
    return Contest(f"Host time of DINO loss, {name}, {LOSS_SIZE}", variants, **HOST)


def network_contest(device: torch.device) -> Contest:
    teacher, student = (
        [torch.rand(1, device=device).requires_grad_() for _ in range(TENSORS)] for _ in range(2)
    )
    for tensor in student:
        tensor.grad = torch.rand(1, device=device)
    return Contest(
        f"Host time of EMA and clip, {TENSORS} tensors of one element",
        [
            Variant(name, partial(partial, call, teacher, student), nothing_to_check)
            for name, call in NETWORK.items()
        ],
        **HOST,
    )


def optimizer_contest(device: torch.device) -> Contest:
    student, teacher = ([torch.rand(1, device=device) for _ in range(TENSORS)] for _ in range(2))
    parameters: list[Tensor] = [torch.nn.Parameter(p) for p in student]
    for parameter in parameters:
        parameter.grad = torch.rand(1, device=device)
    network = Network(parameters, teacher, [], [], [])
    return Contest(
        f"Host time of clip, AdamW and EMA, {TENSORS} tensors of one element",
        [
            Variant(name, partial(lambda step: step, make(network, False)), nothing_to_check, role)
            for name, (role, make) in OPTIMIZERS.items()
        ],
        **HOST,
    )


def foreach_lerp(teacher: list[Tensor], student: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)


NETWORK: dict[str, Callable[[list[Tensor], list[Tensor]], object]] = {
    "_foreach_lerp_": foreach_lerp,
    "ema_update_": lambda t, s: fastdino_kernels.ema_update_(t, s, MOMENTUM),
    "torch.nn.utils.clip_grad_norm_": lambda _, s: torch.nn.utils.clip_grad_norm_(s, MAX_NORM),
    "clip_grad_norms_": lambda _, s: fastdino_kernels.clip_grad_norms_(s, MAX_NORM),
    "clip_grad_norm_": lambda _, s: fastdino_kernels.clip_grad_norm_(s, MAX_NORM),
}
HOST: dict[str, Any] = {"words": "microseconds of the host", "calls": CALLS, "host_only": True}


@pytest.mark.parametrize("variant", LOSSES)
@pytest.mark.parametrize("with_backward", [False, True], ids=["forward", "both"])
def test_loss_overhead(compete: Compete, with_backward: bool, variant: str) -> None:
    compete(loss_contest, with_backward, variant=variant)


@pytest.mark.parametrize("variant", NETWORK)
def test_network_overhead(compete: Compete, variant: str) -> None:
    compete(network_contest, variant=variant)


@pytest.mark.parametrize("variant", OPTIMIZERS)
def test_optimizer_overhead(compete: Compete, variant: str) -> None:
    compete(optimizer_contest, variant=variant)

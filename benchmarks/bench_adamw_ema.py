"""Clip, AdamW and the teacher's EMA over a whole network, separately and in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import AdamWEMA, reference

from benchmarks.bench_clip import paper_clip
from benchmarks.bench_ema import MOMENTUM, paper_loop
from benchmarks.comparison import Compare, Comparison, assert_close, build_baselines
from benchmarks.networks import MAX_NORM, SIZES, Network, Size, make_network
from fastdino.bench.measurement import Call

__all__ = ["SIZES"]
LR, BETAS, EPS, DECAY = 5e-4, (0.9, 0.999), 1e-8, 0.04
Make = Callable[[Network, bool], Call]


def parameter_groups(network: Network) -> list[dict[str, Any]]:
    """Split the parameters into those with and without weight decay, as the paper's code."""
    decayed, others = ([p for p in network.student if (p.ndim > 1) == d] for d in (True, False))
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def paper(network: Network, with_shadow: bool) -> Call:
    """Build the paper's step: a loop that reads every norm, default AdamW, a loop for the EMA."""
    optimizer = torch.optim.AdamW(parameter_groups(network), LR, BETAS, EPS, DECAY)

    def step() -> None:
        paper_clip(network.student)
        optimizer.step()
        paper_loop(network)
        if with_shadow:
            torch._foreach_copy_(network.student_shadow, network.weights)
            torch._foreach_copy_(network.teacher_shadow, network.teacher)

    return step


def separate(network: Network, with_shadow: bool) -> Call:
    """Build a step from the fastest separate implementations."""
    optimizer = torch.optim.AdamW(parameter_groups(network), LR, BETAS, EPS, DECAY, fused=True)

    def step() -> None:
        fastdino_kernels.clip_grad_norms_(network.student, MAX_NORM)
        optimizer.step()
        shadow = network.teacher_shadow if with_shadow else None
        fastdino_kernels.ema_update_(network.teacher, network.weights, MOMENTUM, shadow=shadow)
        if with_shadow:
            torch._foreach_copy_(network.student_shadow, network.weights)

    return step


def one_pass(network: Network, with_shadow: bool) -> Call:
    """Build the step of AdamWEMA."""
    student = network.student
    optimizer = AdamWEMA(
        parameter_groups(network),
        LR,
        BETAS,
        EPS,
        DECAY,
        max_norm=MAX_NORM,
        momentum=MOMENTUM,
        teacher=dict(zip(student, network.teacher, strict=True)),
        shadow=dict(zip(student, network.student_shadow, strict=True)) if with_shadow else None,
        teacher_shadow=(
            dict(zip(student, network.teacher_shadow, strict=True)) if with_shadow else None
        ),
    )
    return optimizer.step


BASELINES: dict[str, tuple[str, Make]] = {
    "the paper's loops, AdamW": ("paper", paper),
    "clip_grad_norms_, AdamW(fused=True), ema_update_": ("", separate),
    "fastdino_kernels.AdamWEMA": ("ours", one_pass),
}


def counted_bytes(size: Size, with_shadow: bool) -> tuple[int, str]:
    """Count gradients read twice; parameters, moments, teacher read and written; shadows written.

    All are fp32 but the bf16 shadows.
    """
    parameters, each = sum(size.counts), 44 if with_shadow else 40
    return each * parameters, f"{each} bytes for each of {parameters} parameters"


def check(make: Make, size: Size, with_shadow: bool, device: torch.device) -> None:
    """Compare parameters, teachers and shadows after two steps with the equations in float64."""
    network = make_network(size, device)
    pairs = zip(network.weights, network.teacher, strict=True)
    before = [(p.double(), t.double()) for p, t in pairs]
    step = make(network, with_shadow)
    for _ in range(2):
        network.restore_gradients()
        step()
    for index, ((p, t), gradient) in enumerate(zip(before, network.gradients, strict=True)):
        (g,), _ = reference.clip_grad_norms([gradient.double()], MAX_NORM)
        m, v = torch.zeros_like(g), torch.zeros_like(g)
        decay = DECAY if p.ndim > 1 else 0.0
        for count in (1, 2):
            p, m, v = reference.adamw(
                p, g, m, v, count, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay
            )
            (t,) = reference.ema_update([t], [p], MOMENTUM)
        assert_close(f"student[{index}]", network.student[index], p, 1e-6)
        assert_close(f"teacher[{index}]", network.teacher[index], t, 1e-6)
        if with_shadow:
            assert_close(f"student_shadow[{index}]", network.student_shadow[index], p, 6e-3)
            assert_close(f"teacher_shadow[{index}]", network.teacher_shadow[index], t, 6e-3)


def adamw_ema_comparison(size: Size, with_shadow: bool, device: torch.device) -> Comparison:
    network = make_network(size, device)

    @functools.cache
    def step_of(make: Make) -> Call:
        return make(network, with_shadow)

    def prepare(make: Make) -> Call:
        network.restore_gradients()
        return step_of(make)

    checked = functools.partial(check, size=size, with_shadow=with_shadow, device=device)
    baselines = build_baselines(BASELINES, prepare, checked, host_reads=paper)
    title = f"Clip, AdamW, EMA{' and bf16 copies' if with_shadow else ''}, {size}"
    return Comparison(title, baselines, *counted_bytes(size, with_shadow), calls=1)


CASES = [(with_shadow, name) for with_shadow in (False, True) for name in BASELINES]


@pytest.mark.parametrize(("with_shadow", "baseline"), CASES)
def test_adamw_ema(compare: Compare, size: Size, with_shadow: bool, baseline: str) -> None:
    compare(adamw_ema_comparison, size, with_shadow, baseline=baseline)

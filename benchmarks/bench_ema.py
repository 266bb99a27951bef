"""The teacher's EMA over a whole network, with and without a bf16 copy (shadow)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference

from benchmarks.comparison import Compare, Comparison, assert_close, build_baselines
from benchmarks.networks import SIZES, Network, Size, make_network

__all__ = ["SIZES"]
MOMENTUM = 0.996
Update = Callable[[Network], object]


def paper_loop(network: Network) -> None:
    """Update one parameter after the other with three operations each, as the paper's code."""
    for t, s in zip(network.teacher, network.student, strict=True):
        t.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * s.detach().data)


def foreach_mul_add(network: Network) -> None:
    torch._foreach_mul_(network.teacher, MOMENTUM)
    torch._foreach_add_(network.teacher, network.weights, alpha=1 - MOMENTUM)


def foreach_lerp(network: Network) -> None:
    torch._foreach_lerp_(network.teacher, network.weights, 1 - MOMENTUM)


def ours(network: Network) -> None:
    fastdino_kernels.ema_update_(network.teacher, network.weights, MOMENTUM)


def loop_and_cast(network: Network) -> None:
    paper_loop(network)
    for copy, t in zip(network.teacher_shadow, network.teacher, strict=True):
        copy.copy_(t)


def lerp_and_cast(network: Network) -> None:
    foreach_lerp(network)
    torch._foreach_copy_(network.teacher_shadow, network.teacher)


def ours_with_shadow(network: Network) -> None:
    shadow = network.teacher_shadow
    fastdino_kernels.ema_update_(network.teacher, network.weights, MOMENTUM, shadow=shadow)


BASELINES: dict[bool, dict[str, tuple[str, Update]]] = {
    False: {
        "the paper's loop": ("paper", paper_loop),
        "_foreach_mul_ + _foreach_add_": ("", foreach_mul_add),
        "_foreach_lerp_": ("", foreach_lerp),
        "fastdino_kernels": ("ours", ours),
    },
    True: {
        "the paper's loop + copies": ("paper", loop_and_cast),
        "_foreach_lerp_ + _foreach_copy_": ("", lerp_and_cast),
        "fastdino_kernels, shadow": ("ours", ours_with_shadow),
    },
}


def counted_bytes(size: Size, shadow: bool) -> tuple[int, str]:
    """Count fp32 teacher and student reads and teacher writes, and the bf16 copy's writes."""
    parameters, each = sum(size.counts), 14 if shadow else 12
    return each * parameters, f"{each} bytes for each of {parameters} parameters"


def check(update: Update, size: Size, with_shadow: bool, device: torch.device) -> None:
    """Compare every parameter and copy with the equation in float64."""
    network = make_network(size, device)
    before = [t.clone() for t in network.teacher]
    update(network)
    for index, (t, s) in enumerate(zip(before, network.weights, strict=True)):
        (expected,) = reference.ema_update([t.double()], [s.double()], MOMENTUM)
        assert_close(f"teacher[{index}]", network.teacher[index], expected, 1e-6)
        if with_shadow:
            assert_close(f"shadow[{index}]", network.teacher_shadow[index], expected, 4e-3)


def ema_comparison(size: Size, with_shadow: bool, device: torch.device) -> Comparison:
    network = make_network(size, device)  # several times the L2 cache
    baselines = build_baselines(
        BASELINES[with_shadow],
        lambda update: partial(update, network),
        lambda update: check(update, size, with_shadow, device),
    )
    title = f"EMA{' and its bf16 copy' if with_shadow else ''}, {size}"
    return Comparison(title, baselines, *counted_bytes(size, with_shadow))


CASES = [(with_shadow, name) for with_shadow, names in BASELINES.items() for name in names]


@pytest.mark.parametrize(("with_shadow", "baseline"), CASES)
def test_ema(compare: Compare, size: Size, with_shadow: bool, baseline: str) -> None:
    compare(ema_comparison, size, with_shadow, baseline=baseline)

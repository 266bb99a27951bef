"""Host time of an eager call, on inputs so small that the device's work is negligible.

On a GPU the host only queues the work. A call that takes the host longer than the GPU leaves the
GPU idle.

`python -m benchmarks.bench_overhead` measures the launches without a GPU.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import dispatch

from benchmarks.bench_adamw_ema import BASELINES as OPTIMIZERS
from benchmarks.bench_adamw_ema import one_pass, parameter_groups
from benchmarks.bench_dino_loss import Size as LossSize
from benchmarks.bench_dino_loss import forward, forward_backward, make_inputs, ours, paper
from benchmarks.bench_ema import MOMENTUM, foreach_lerp
from benchmarks.comparison import Compare, Comparison, build_baselines
from benchmarks.networks import MAX_NORM, Network, Size, network_of
from fastdino.bench.measurement import Call

CALLS = 50
ROUNDS, RECORDED_CALLS = 200, 5  # short samples: some are not interrupted on a busy machine
LOSS_SIZE = LossSize(1, 10, 64)
# As many tensors as ViT-S/16 with its head, of one element each.
TENSORS = len(Size("vit_small").shapes)
LOSSES = {"the paper's code, eager": ("paper", paper), "fastdino_kernels": ("ours", ours)}
UPDATES: dict[str, Callable[[Network], object]] = {
    "_foreach_lerp_": foreach_lerp,
    "ema_update_": lambda n: fastdino_kernels.ema_update_(n.teacher, n.student, MOMENTUM),
    "torch.nn.utils.clip_grad_norm_": lambda n: torch.nn.utils.clip_grad_norm_(n.student, MAX_NORM),
    "clip_grad_norms_": lambda n: fastdino_kernels.clip_grad_norms_(n.student, MAX_NORM),
    "clip_grad_norm_": lambda n: fastdino_kernels.clip_grad_norm_(n.student, MAX_NORM),
}


def torch_only(network: Network, with_shadow: bool) -> Call:
    """Build the step from PyTorch's own multi-tensor operations; its clip is the global one."""
    optimizer = torch.optim.AdamW(parameter_groups(network), fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(network.student, MAX_NORM, foreach=True)
        optimizer.step()
        foreach_lerp(network)

    return step


STEPS = {"clip_grad_norm_, AdamW(fused=True), _foreach_lerp_": ("", torch_only)} | OPTIMIZERS


def host_comparison(
    title: str, calls: Mapping[str, tuple[str, Callable[[], object]]]
) -> Comparison:
    """Build a comparison of calls (name -> role, call), whose results other suites check."""
    baselines = build_baselines(calls, lambda call: call, lambda call: None)
    note = "microseconds of the host"
    return Comparison(f"Host time of {title}", baselines, note=note, calls=CALLS, host_only=True)


def loss_comparison(with_backward: bool, device: torch.device) -> Comparison:
    inputs = make_inputs(LOSS_SIZE, 0, device)
    run: Callable[..., Any] = forward_backward if with_backward else forward
    phase = "forward + backward" if with_backward else "forward"
    calls = {name: (role, partial(run, loss, inputs)) for name, (role, loss) in LOSSES.items()}
    return host_comparison(f"DINO loss, {phase}, {LOSS_SIZE}", calls)


def small_network(device: torch.device) -> Network:
    return network_of(*([torch.rand(1, device=device) for _ in range(TENSORS)] for _ in range(3)))


def update_comparison(device: torch.device) -> Comparison:
    network = small_network(device)
    calls = {name: ("", partial(update, network)) for name, update in UPDATES.items()}
    return host_comparison(f"EMA and clip, {TENSORS} tensors of one element", calls)


def optimizer_comparison(device: torch.device) -> Comparison:
    network = small_network(device)
    calls = {name: (role, make(network, False)) for name, (role, make) in STEPS.items()}
    return host_comparison(f"clip, AdamW and EMA, {TENSORS} tensors of one element", calls)


@pytest.mark.parametrize("baseline", LOSSES)
@pytest.mark.parametrize("with_backward", [False, True], ids=["forward", "both"])
def test_loss_overhead(compare: Compare, with_backward: bool, baseline: str) -> None:
    compare(loss_comparison, with_backward, baseline=baseline)


@pytest.mark.parametrize("baseline", UPDATES)
def test_update_overhead(compare: Compare, baseline: str) -> None:
    compare(update_comparison, baseline=baseline)


@pytest.mark.parametrize("baseline", STEPS)
def test_optimizer_overhead(compare: Compare, baseline: str) -> None:
    compare(optimizer_comparison, baseline=baseline)


def launch_calls() -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield (title, calls): a reference of PyTorch's operations, and calls that launch kernels."""
    inputs = make_inputs(LOSS_SIZE, 0, torch.device("cpu"))
    loss_fn = fastdino_kernels.DINOLoss(LOSS_SIZE.K, LOSS_SIZE.V, 0.04, 0.04, 0, 1)
    student, teacher = (x.detach().flatten(0, 1).float() for x in (inputs.student, inputs.teacher))
    student.requires_grad_()

    def module() -> None:
        student.grad = None
        loss_fn(student, teacher, 0).backward()

    yield (
        "forward + backward",
        {
            "the paper's code, eager": partial(forward_backward, paper, inputs),
            "dino_loss": partial(forward_backward, ours, inputs),
            "DINOLoss with its center": module,
        },
    )
    network = small_network(torch.device("cpu"))
    yield (
        f"{TENSORS} tensors",
        {
            "PyTorch: clip, AdamW, EMA": torch_only(network, False),
            "AdamWEMA": one_pass(network, False),
            **{name: partial(update, network) for name, update in UPDATES.items()},
        },
    )


def print_times(title: str, calls: Mapping[str, Call], launches: list[Any]) -> None:
    """Time calls in turn; each sample is of a few calls, as some are then not interrupted."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(RECORDED_CALLS):
                call()
            samples[name].append((time.perf_counter() - start) / RECORDED_CALLS)
            launches.clear()
    shortest = {name: 1e6 * min(seconds) for name, seconds in samples.items()}
    reference, *_ = shortest.values()
    print(f"{title:30} shortest us   median us   shortest, of the first")
    for name, seconds in samples.items():
        median = 1e6 * statistics.median(seconds)
        print(f"{name:30} {shortest[name]:11.0f} {median:11.0f} {shortest[name] / reference:17.2f}")


def main() -> None:
    """Print the host time of launches, which are recorded instead of run: no GPU is needed."""
    from benchmarks.gpu.recording_driver import record_launches

    with (
        mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "triton"}),
        record_launches(90) as launches,
    ):
        for title, calls in launch_calls():
            print_times(title, calls, launches)


if __name__ == "__main__":
    main()

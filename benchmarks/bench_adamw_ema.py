"""The optimizer's whole pass over a network: clip, AdamW, the teacher's EMA, with and without
bf16 copies; step by step, and at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import AdamWEMA, reference
from torch import Tensor

from benchmarks.bench_clip import MAX_NORM, grad_of, paper_clip
from benchmarks.bench_ema import MOMENTUM, SIZES, Size, paper_loop
from benchmarks.contest import Compete, Contest, Variant, assert_close
from benchmarks.measure import Thunk
from benchmarks.shapes import network_shapes, random_tensors

__all__ = ["SIZES"]
LR, BETAS, EPS, DECAY = 5e-4, (0.9, 0.999), 1e-8, 0.04
Tensors = list[Tensor]
Step = Callable[[], object]


@dataclass
class Network:
    """Student, teacher, bf16 copies of both, and the gradients that are there before every call."""

    student: Tensors
    teacher: Tensors
    shadows: Tensors
    teacher_shadows: Tensors
    gradients: Tensors

    def restore_gradients(self) -> None:
        """What is clipped in place is not clipped again."""
        torch._foreach_copy_([grad_of(p) for p in self.student], self.gradients)

    def groups(self) -> list[dict[str, Any]]:
        """Decayed and not, as the paper's."""
        decayed, others = ([p for p in self.student if (p.ndim > 1) == d] for d in (True, False))
        return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]

    def copy(self) -> None:
        """The copies, step by step."""
        torch._foreach_copy_(self.shadows, self.student)
        torch._foreach_copy_(self.teacher_shadows, self.teacher)


def make_network(size: Size, device: torch.device) -> Network:
    """Every other gradient has three times the norm that is allowed, the others a third of it."""
    shapes = network_shapes(size.arch, size.K)
    count = [math.prod(shape) for shape in shapes]
    student, teacher = (random_tensors(shapes, seed, device, lambda _: 0.02) for seed in (0, 1))
    gradients = random_tensors(
        shapes, 2, device, lambda i: MAX_NORM * (1 / 3, 3)[i % 2] / math.sqrt(count[i])
    )
    parameters: Tensors = [torch.nn.Parameter(p) for p in student]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    shadows, teacher_shadows = (
        [torch.empty_like(p, dtype=torch.bfloat16) for p in student] for _ in range(2)
    )
    return Network(parameters, teacher, shadows, teacher_shadows, gradients)


def paper(network: Network, with_copies: bool) -> Step:
    """The paper's code: a loop that reads every norm, AdamW as it is by default, a loop."""
    optimizer = torch.optim.AdamW(network.groups(), LR, BETAS, EPS, DECAY)

    def step() -> None:
        paper_clip(network.student)
        optimizer.step()
        paper_loop(network.teacher, network.student, [])
        if with_copies:
            network.copy()

    return step


def separate(network: Network, with_copies: bool) -> Step:
    """The fastest that there is of each."""
    optimizer = torch.optim.AdamW(network.groups(), LR, BETAS, EPS, DECAY, fused=True)

    def step() -> None:
        fastdino_kernels.clip_grad_norms_(network.student, MAX_NORM)
        optimizer.step()
        shadow = network.teacher_shadows if with_copies else None
        fastdino_kernels.ema_update_(network.teacher, network.student, MOMENTUM, shadow=shadow)
        if with_copies:
            torch._foreach_copy_(network.shadows, network.student)

    return step


def at_once(network: Network, with_copies: bool) -> Step:
    students = network.student
    optimizer = AdamWEMA(
        network.groups(),
        LR,
        BETAS,
        EPS,
        DECAY,
        max_norm=MAX_NORM,
        momentum=MOMENTUM,
        teacher=dict(zip(students, network.teacher, strict=True)),
        shadow=dict(zip(students, network.shadows, strict=True)) if with_copies else None,
        teacher_shadow=(
            dict(zip(students, network.teacher_shadows, strict=True)) if with_copies else None
        ),
    )
    return optimizer.step


VARIANTS: dict[str, tuple[str, Callable[[Network, bool], Step]]] = {
    "the paper's loops, AdamW": ("paper", paper),
    "clip_grad_norms_, AdamW(fused=True), ema_update_": ("", separate),
    "fastdino_kernels.AdamWEMA": ("ours", at_once),
}


def counted_bytes(size: Size, with_copies: bool) -> tuple[int, str]:
    """Gradients read twice; parameters, moments and teacher read and written; copies written."""
    parameters = sum(math.prod(shape) for shape in network_shapes(size.arch, size.K))
    each = 44 if with_copies else 40
    return each * parameters, f"{each} bytes for each of {parameters} parameters"


def check(
    make: Callable[[Network, bool], Step], size: Size, with_copies: bool, device: torch.device
) -> None:
    """After two steps parameters, teachers and copies agree with the equations in float64."""
    network = make_network(size, device)
    pairs = zip(network.student, network.teacher, strict=True)
    before = [(p.detach().clone(), t.clone()) for p, t in pairs]
    step = make(network, with_copies)
    for _ in range(2):
        network.restore_gradients()
        step()
    for index, ((p, t), gradient) in enumerate(zip(before, network.gradients, strict=True)):
        (g,), _ = reference.clip_grad_norms([gradient.double()], MAX_NORM)
        p, t, m, v = p.double(), t.double(), torch.zeros_like(g), torch.zeros_like(g)
        decay = DECAY if p.ndim > 1 else 0.0
        for count in (1, 2):
            p, m, v = reference.adamw(
                p, g, m, v, count, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay
            )
            (t,) = reference.ema_update([t], [p], MOMENTUM)
        assert_close(f"student[{index}]", network.student[index], p, 1e-6)
        assert_close(f"teacher[{index}]", network.teacher[index], t, 1e-6)
        if with_copies:
            assert_close(f"shadow[{index}]", network.shadows[index], p, 6e-3)
            assert_close(f"teacher_shadow[{index}]", network.teacher_shadows[index], t, 6e-3)


def adamw_ema_contest(size: Size, with_copies: bool, device: torch.device) -> Contest:
    network = make_network(size, device)

    @functools.cache
    def step_of(make: Callable[[Network, bool], Step]) -> Step:
        return make(network, with_copies)

    def prepare(make: Callable[[Network, bool], Step]) -> Thunk:
        network.restore_gradients()
        return step_of(make)

    variants = [
        Variant(
            name,
            partial(prepare, make),
            partial(check, make, size, with_copies, device),
            role,
            host_reads=make is paper,
        )
        for name, (role, make) in VARIANTS.items()
    ]
    name = f"Clip, AdamW, EMA{' and bf16 copies' if with_copies else ''}, {size}"
    return Contest(name, variants, *counted_bytes(size, with_copies), calls=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adamw_ema(compete: Compete, size: Size, variant: str) -> None:
    compete(adamw_ema_contest, size, False, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adamw_ema_with_copies(compete: Compete, size: Size, variant: str) -> None:
    compete(adamw_ema_contest, size, True, variant=variant)

"""The DINO loss: forward, backward and both."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor

from benchmarks.comparison import Baseline, Compare, Comparison, assert_close
from fastdino.bench.baselines.losses import einsum_loss, paper_loss
from fastdino.bench.measurement import Call

Loss = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
TEMPS = (0.1, 0.04)
# Relative; the paper's code divides half-precision logits by the temperature before upcasting.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-3}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Size:
    """B images in V crops, of which the teacher sees T, and K prototypes."""

    B: int
    V: int
    K: int = 65536
    dtype: torch.dtype = torch.bfloat16
    T: int = 2

    def __str__(self) -> str:
        return f"B{self.B} V{self.V} K{self.K} {str(self.dtype).removeprefix('torch.')}"


SIZES = {
    "cuda": [Size(64, 10), Size(64, 12), Size(128, 10), Size(128, 12), Size(1024, 10, 1024)],
    "cpu": [Size(16, 10, dtype=torch.float32), Size(16, 10)],
    "quick": [Size(4, 4, 4096, torch.float32), Size(4, 4, 4096)],
}
PHASES = ("forward", "backward", "forward + backward")


def counted_bytes(size: Size, phase: str) -> tuple[int, str]:
    """Count what two passes must move: each reads all logits, the second writes the gradient."""
    crop = size.B * size.K * size.dtype.itemsize
    read, written = (size.V + size.T) * crop, size.V * crop
    return {
        "forward": (read, "each logit read once"),
        "backward": (read + written, "each logit read once, the gradient written"),
        "forward + backward": (2 * read + written, "each logit read twice, the gradient written"),
    }[phase]


@dataclass
class Inputs:
    student: Tensor  # [V, B, K]
    teacher: Tensor  # [T, B, K]
    center: Tensor  # [K]


def make_inputs(size: Size, seed: int, device: torch.device) -> Inputs:
    """Draw logits within about [-1, 1], like those of a head with unit vectors."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator, device=device)

    student = normal(size.V, size.B, size.K).to(size.dtype).requires_grad_()
    return Inputs(student, normal(size.T, size.B, size.K).to(size.dtype), normal(size.K) / 3)


@functools.lru_cache(maxsize=1)
def expected(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, teacher_sum, gradient) in float64 for the inputs of seed 0."""
    inputs = make_inputs(size, 0, device)
    student = inputs.student.detach().double().requires_grad_()
    loss, teacher_sum = reference.dino_loss(
        student, inputs.teacher.double(), inputs.center.double(), *TEMPS
    )
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), teacher_sum, grad.float()


def paper(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """Run the paper's loss under autocast, as its training command does."""
    half = student.dtype != torch.float32
    with torch.autocast(student.device.type, dtype=student.dtype, enabled=half):
        return paper_loss(student, teacher, center, student_temp, teacher_temp)


def ours(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    temps: dict[str, Any] = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    return fastdino_kernels.dino_loss(student, teacher, center, **temps, **options)


def forward(loss: Loss, inputs: Inputs) -> Tensor:
    return loss(inputs.student, inputs.teacher, inputs.center, *TEMPS)[0]


def forward_backward(loss: Loss, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(loss, inputs), inputs.student)


def prepare(loss: Loss, phase: str, rotation: itertools.cycle[Inputs], clone: bool) -> Call:
    """Build one call on the next inputs; for the backward pass alone, the forward pass is done."""
    inputs = next(rotation)
    if clone:  # the gradient overwrites the logits
        student = inputs.student.detach().clone().requires_grad_()
        inputs = Inputs(student, inputs.teacher, inputs.center)
    if phase == "forward":
        return partial(forward, loss, inputs)
    if phase == "backward":
        return partial(torch.autograd.grad, forward(loss, inputs), inputs.student)
    return partial(forward_backward, loss, inputs)


def check(loss: Loss, size: Size, device: torch.device) -> None:
    """Compare the loss, its gradient and the teacher's sum with float64."""
    inputs = make_inputs(size, 0, device)
    value, teacher_sum = loss(inputs.student, inputs.teacher, inputs.center, *TEMPS)
    (grad,) = torch.autograd.grad(value, inputs.student)
    tolerance = TOLERANCE[size.dtype]
    right_value, right_sum, right_grad = expected(size, device)
    assert_close("the loss", value.detach(), right_value, LOSS_TOLERANCE[size.dtype])
    assert_close("the gradient", grad, right_grad, tolerance)
    assert_close("the teacher's sum", teacher_sum, right_sum, tolerance)


@functools.lru_cache(maxsize=1)
def compiled_einsum(size: Size) -> Loss:
    """Compile the einsum form for one size, once for all phases."""
    torch._dynamo.reset()
    return torch.compile(einsum_loss, fullgraph=True, dynamic=False)


BASELINES: dict[str, tuple[str, Loss | None]] = {
    "the paper's code, eager": ("paper", paper),
    "einsum": ("", einsum_loss),
    "einsum, torch.compile": ("compile", None),
    "fastdino_kernels": ("ours", ours),
    "fastdino_kernels, in place": ("ours", partial(ours, inplace_backward=True)),
}
CASES = [
    (phase, name)
    for phase in PHASES
    for name in BASELINES
    if not (phase == "forward" and "in place" in name)
]


def rotated_inputs(size: Size, device: torch.device) -> list[Inputs]:
    """Make inputs for consecutive calls that together are several times larger than the L2."""
    sets = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets = min(max(2, math.ceil(4 * cache / counted_bytes(size, "forward")[0])), 10)
    return [make_inputs(size, seed, device) for seed in range(sets)]


def loss_comparison(size: Size, phase: str, device: torch.device) -> Comparison:
    counted, note = counted_bytes(size, phase)
    inputs = rotated_inputs(size, device)
    baselines = []
    for name in (name for case, name in CASES if case == phase):
        role, loss = BASELINES[name]
        loss = loss or compiled_einsum(size)
        make = partial(prepare, loss, phase, itertools.cycle(inputs), "in place" in name)
        baselines.append(Baseline(name, make, partial(check, loss, size, device), role))
    return Comparison(f"DINO loss, {phase}, {size}", baselines, counted, note)


def crops_comparison(sizes: tuple[Size, ...], device: torch.device) -> Comparison:
    """Compare our forward pass for several numbers of crops, which other tests check."""
    baselines = []
    for size in sizes:
        rotation = itertools.cycle(rotated_inputs(size, device))
        make = partial(prepare, ours, "forward", rotation, clone=False)
        baselines.append(Baseline(f"S = {size.V}", make))
    size = sizes[0]
    title = f"DINO loss, forward by crops, B{size.B} K{size.K}"
    return Comparison(title, baselines, note="the kernels of this project")


CROPS = {name: (sizes[0], replace(sizes[0], V=12)) for name, sizes in SIZES.items()}


@pytest.mark.parametrize("baseline", [0, 1])
def test_crops(compare: Compare, kind: str, baseline: int) -> None:
    sizes = CROPS[kind]
    compare(crops_comparison, sizes, baseline=f"S = {sizes[baseline].V}")


@pytest.mark.parametrize(("phase", "baseline"), CASES)
def test_dino_loss(compare: Compare, size: Size, phase: str, baseline: str) -> None:
    compare(loss_comparison, size, phase, baseline=baseline)

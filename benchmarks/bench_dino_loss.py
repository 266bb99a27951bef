"""The DINO loss: forward, backward and both."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor

from benchmarks.contest import Compete, Contest, Variant, assert_close
from benchmarks.loss_variants import Loss, einsum_form, paper_eager
from benchmarks.measure import L2_BYTES, Thunk

TEMPS = (0.1, 0.04)
# Relative; the paper's code divides half-precision logits by the temperature as they are.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-3}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Size:
    """B images in V crops, of which T = 2 are the teacher's too, and K prototypes."""

    B: int
    V: int
    K: int = 65536
    dtype: torch.dtype = torch.bfloat16
    T: int = 2

    def __str__(self) -> str:
        return f"B{self.B} V{self.V} K{self.K} {str(self.dtype).removeprefix('torch.')}"


SIZES = {
    "cuda": [Size(64, 10), Size(64, 12), Size(128, 10), Size(128, 12)],
    "cpu": [Size(16, 10, dtype=torch.float32), Size(16, 10)],
    "quick": [Size(4, 4, 4096, torch.float32), Size(4, 4, 4096)],
}
PHASES = ("forward", "backward", "forward + backward")


def counted_bytes(size: Size, phase: str) -> tuple[int, str]:
    """What two passes must move: each reads all logits, the second writes the gradient."""
    crop = size.B * size.K * size.dtype.itemsize
    read, written = (size.V + size.T) * crop, size.V * crop
    return {
        "forward": (read, "each logit read once"),
        "backward": (read + written, "each logit read once, the gradient written"),
        "forward + backward": (2 * read + written, "each logit read twice, the gradient written"),
    }[phase]


@dataclass
class Inputs:
    student: Tensor
    teacher: Tensor
    center: Tensor


def make_inputs(size: Size, seed: int, device: torch.device) -> Inputs:
    """Random logits within about [-1, 1], which a head of unit vectors gives."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator, device=device)

    student = normal(size.V, size.B, size.K).to(size.dtype).requires_grad_()
    return Inputs(student, normal(size.T, size.B, size.K).to(size.dtype), normal(size.K) / 3)


@functools.lru_cache(maxsize=1)
def expected(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, teacher_sum, gradient) in float64, of the inputs of seed 0."""
    inputs = make_inputs(size, 0, device)
    student = inputs.student.detach().double().requires_grad_()
    loss, teacher_sum = reference.dino_loss(
        student, inputs.teacher.double(), inputs.center.double(), *TEMPS
    )
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), teacher_sum, grad.float()


def ours(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    return fastdino_kernels.dino_loss(
        student,
        teacher,
        center,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        inplace_backward=inplace_backward,
    )


def forward(loss: Loss, inputs: Inputs) -> Tensor:
    return loss(inputs.student, inputs.teacher, inputs.center, *TEMPS)[0]


def both(loss: Loss, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(loss, inputs), inputs.student)


def prepare(loss: Loss, phase: str, turns: itertools.cycle[Inputs], clone: bool) -> Thunk:
    """One call on the inputs whose turn it is; for the backward pass alone, the forward is done."""
    inputs = next(turns)
    if clone:  # it is written over
        student = inputs.student.detach().clone().requires_grad_()
        inputs = Inputs(student, inputs.teacher, inputs.center)
    if phase == "forward":
        return partial(forward, loss, inputs)
    if phase == "backward":
        return partial(torch.autograd.grad, forward(loss, inputs), inputs.student)
    return partial(both, loss, inputs)


def check(loss: Loss, size: Size, device: torch.device) -> None:
    """The loss, its gradient and the teacher's sum agree with float64's."""
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
    """Compiled for this size alone, once for all phases."""
    torch._dynamo.reset()
    return torch.compile(einsum_form, fullgraph=True, dynamic=False)


VARIANTS: dict[str, tuple[str, Loss | None]] = {
    "the paper's code, eager": ("paper", paper_eager),
    "einsum": ("", einsum_form),
    "einsum, torch.compile": ("compile", None),
    "fastdino_kernels": ("ours", ours),
    "fastdino_kernels, in place": ("ours", partial(ours, inplace_backward=True)),
}


def loss_contest(size: Size, phase: str, device: torch.device) -> Contest:
    counted, words = counted_bytes(size, phase)
    once = counted_bytes(size, "forward")[0]
    sets = max(2, 4 * L2_BYTES // once) if device.type == "cuda" else 2
    inputs = [make_inputs(size, seed, device) for seed in range(min(sets, 8))]
    variants = []
    for name, (role, loss) in VARIANTS.items():
        in_place = "in place" in name
        if in_place and phase == "forward":
            continue
        chosen = loss or compiled_einsum(size)
        make = partial(prepare, chosen, phase, itertools.cycle(inputs), in_place)
        variants.append(Variant(name, make, partial(check, chosen, size, device), role))
    return Contest(f"DINO loss, {phase}, {size}", variants, counted, words)


ENTRIES = [
    (phase, variant)
    for phase in PHASES
    for variant in VARIANTS
    if not (phase == "forward" and "in place" in variant)
]


@pytest.mark.parametrize(("phase", "variant"), ENTRIES)
def test_dino_loss(compete: Compete, size: Size, phase: str, variant: str) -> None:
    compete(loss_contest, size, phase, variant=variant)

"""Last layers and their inputs, and losses run on them, for the tests of the losses without logits.

Legend: S crops of the student, T crops of the teacher, B images, N rows, D features, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}


class Inputs(NamedTuple):
    """x_student [.., D], x_teacher [.., D + 2], weight_student, weight_teacher, center [K]."""

    x_student: Tensor
    x_teacher: Tensor
    weight_student: Tensor
    weight_teacher: Tensor
    center: Tensor


def draw(
    student: tuple[int, ...],
    teacher: tuple[int, ...] | None = None,
    D: int = 6,
    K: int = 40,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Draw inputs [*student, D] and [*teacher, D + 2] (teacher: by default as student)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y = normal(*student, D), normal(*(teacher or student), D + 2)
    weight, other = normal(K, D) / D**0.5, normal(K, D + 2) / D**0.5
    return Inputs(*(t.to(dtype) for t in (x, y, weight, other)), 0.1 * normal(K).float())


def logits_of(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of student and teacher, and the center."""
    student = inputs.x_student @ inputs.weight_student.t()
    return student, inputs.x_teacher @ inputs.weight_teacher.t(), inputs.center


def of_logits(loss_fn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Return loss_fn, which takes logits, as a function of the inputs of the last layers."""
    return lambda *inputs, **options: loss_fn(*logits_of(Inputs(*inputs)), **options)


def run(
    loss_fn: Callable[..., tuple[Tensor, Tensor]],
    inputs: Inputs,
    scale: float = 1.0,
    device: str = "cpu",
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return loss, teacher_sum, and scale*loss's gradients of x_student and weight_student."""
    moved = [t.detach().to(device, copy=True) for t in inputs]
    leaves = [moved[0].requires_grad_(), moved[2].requires_grad_()]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    loss, total = loss_fn(*moved, **(TEMPS | options))
    grads = torch.autograd.grad(scale * loss, leaves)
    return tuple(t.detach().cpu() for t in (loss, total, *grads))


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    difference = (got.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-30)).item()

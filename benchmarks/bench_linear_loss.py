"""The last layer and the patch loss, forward and backward: with logits, and without.

Measured: time, and the peak of memory above the inputs. In every baseline N D + K D numbers of it
are the gradients of x and of the weight (67 MB at N = 256 in fp32), which the note of each table
states. Measured results: benchmarks/results/README.md.

Predicted before any tuning, N = 256, K = 65536, D = 256, fp32, one CPU core:

    FLOPs     8 N K D = 34.4 GFLOP for all baselines: three products for the student's layer, one
              for the teacher's. At 80 GFLOP/s: 0.43 s.
    memory    eager: 5 matrices [N, K] at least (two of logits, targets, log-probabilities and
              their product or gradient), 336 MB; ours: 64 rows of two logits, 34 MB: 1/10.
    bytes     ours: 4 chunks of 3 reads of a weight and a read and a write of its gradient,
              1.3 GB; logits of a chunk written twice and read 5 times, 0.7 GB; at 10 GB/s 0.2 s.
              eager: about 20 reads or writes of [N, K], 1.3 GB, and 0.5 GB of new pages at
              0.25 s/GB. So about 0.7 s against 0.9 s: 1.3 times faster.

Counted for an H200, not measured: N = 3771, D = 256, K = 65536, bf16, chunks of 378 rows: 506 GFLOP
at 770 TFLOP/s take 0.66 ms; the logits of a chunk, 99 MB, do not fit its L2, so that 4.4 GB are
moved for them and 2.3 GB for the weights and their gradient, 1.6 ms at 4.3 TB/s. Eager moves about
10 GB in fp32 besides the same products, 2.3 ms, and holds 4 GB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Compare, Comparison, assert_close, build_baselines

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative


@dataclass(frozen=True)
class Size:
    """N rows, D features and K prototypes."""

    N: int
    K: int = 65536
    D: int = 256
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"N{self.N} D{self.D} K{self.K} {name}"


SIZES = {
    "cuda": [Size(3771), Size(2496, 131072, 384), Size(3771, dtype=torch.float32)],
    "cpu": [Size(256, dtype=torch.float32)],
    "quick": [Size(16, 4096, dtype=torch.float32), Size(16, 4096)],
}


@dataclass
class Inputs:
    x_student: Tensor  # [N, D]
    x_teacher: Tensor  # [N, D]
    weight_student: Tensor  # [K, D]
    weight_teacher: Tensor  # [K, D]
    center: Tensor  # [K]
    weights: Tensor  # [N]


Loss = Callable[[Inputs], Tensor]


def dinov2(inputs: Inputs) -> Tensor:
    """Compute DINOv2's iBOT loss: both layers, softmax_center_teacher and forward_masked."""
    student = F.linear(inputs.x_student, inputs.weight_student)
    with torch.no_grad():
        teacher = F.linear(inputs.x_teacher, inputs.weight_teacher)
        targets = F.softmax((teacher - inputs.center) / TEACHER_TEMP, dim=-1)
        del teacher
    log_probs = F.log_softmax(student.float() / STUDENT_TEMP, dim=-1)
    rows = torch.sum(targets.float() * log_probs, dim=-1)
    return -(rows * inputs.weights).sum() / len(rows)


def from_logits(inputs: Inputs) -> Tensor:
    """Compute patch_loss of all logits."""
    student = F.linear(inputs.x_student, inputs.weight_student)
    with torch.no_grad():
        teacher = F.linear(inputs.x_teacher, inputs.weight_teacher)
    loss, _ = fastdino_kernels.patch_loss(
        student,
        teacher,
        inputs.center,
        student_temp=STUDENT_TEMP,
        teacher_temp=TEACHER_TEMP,
        weights=inputs.weights,
        inplace_backward=True,
    )
    return loss


def without_logits(inputs: Inputs) -> Tensor:
    loss, _ = fastdino_kernels.linear_patch_loss(
        inputs.x_student,
        inputs.x_teacher,
        inputs.weight_student,
        inputs.weight_teacher,
        inputs.center,
        student_temp=STUDENT_TEMP,
        teacher_temp=TEACHER_TEMP,
        weights=inputs.weights,
    )
    return loss


@functools.lru_cache(maxsize=1)
def _compiled(shape: torch.Size) -> Loss:
    """Compile DINOv2's loss for one shape."""
    torch._dynamo.reset()
    return torch.compile(dinov2, fullgraph=True, dynamic=False)


def compiled(inputs: Inputs) -> Tensor:
    return _compiled(inputs.x_student.shape)(inputs)


BASELINES: dict[str, tuple[str, Loss]] = {
    "DINOv2's iBOT loss, eager": ("paper", dinov2),
    "DINOv2's iBOT loss, torch.compile": ("compile", compiled),
    "fastdino_kernels, patch_loss in place": ("ours", from_logits),
    "fastdino_kernels, linear_patch_loss": ("ours", without_logits),
}


def flops(size: Size) -> int:
    """Count the products of two layers and of one's gradients."""
    return 8 * size.N * size.K * size.D


def counted_bytes(size: Size) -> tuple[int, str]:
    """Count what must move if all logits stay in caches: x, weights and gradients, once."""
    weight, rows = size.K * size.D * size.dtype.itemsize, size.N * size.D * size.dtype.itemsize
    gradients = weight + rows
    return 3 * weight + 3 * rows, (
        f"x, weights and gradients once; {flops(size) / 1e9:.1f} GFLOP; of the peak memory "
        f"{gradients / 1e6:.0f} MB are gradients of x and weight"
    )


@functools.lru_cache(maxsize=1)
def make_inputs(size: Size, device: torch.device) -> Inputs:
    """Draw rows and prototypes of norm 1, as before a weight-normed layer."""
    generator = torch.Generator(device).manual_seed(0)

    def units(*shape: int) -> Tensor:
        return F.normalize(torch.randn(shape, generator=generator, device=device), dim=-1)

    rows, others, weight, other = (
        units(n, size.D).to(size.dtype) for n in (size.N, size.N, size.K, size.K)
    )
    center = 0.03 * torch.randn(size.K, generator=generator, device=device)
    weights = torch.rand(size.N, generator=generator, device=device)
    return Inputs(rows.requires_grad_(), others, weight.requires_grad_(), other, center, weights)


def step(loss_fn: Loss, inputs: Inputs) -> tuple[Tensor, ...]:
    loss = loss_fn(inputs)
    gradients = torch.autograd.grad(loss, [inputs.x_student, inputs.weight_student])
    return (loss.detach(), *gradients)


def check(loss_fn: Loss, size: Size, device: torch.device) -> None:
    """Compare loss and gradients with the equations in float64, for the first prototypes."""
    inputs = make_inputs(size, device)
    prototypes = slice(0, 4096)
    few = replace(
        inputs,
        weight_student=inputs.weight_student[prototypes].detach().requires_grad_(),
        weight_teacher=inputs.weight_teacher[prototypes],
        center=inputs.center[prototypes],
    )
    wide = (x.detach().double().requires_grad_(x.requires_grad) for x in vars(few).values())
    expected = step(_reference, Inputs(*wide))
    names = ("the loss", "the gradient of x", "the gradient of the weight")
    for name, result, value in zip(names, step(loss_fn, few), expected, strict=True):
        assert_close(name, result, value, TOLERANCE[size.dtype])


def _reference(inputs: Inputs) -> Tensor:
    student = inputs.x_student @ inputs.weight_student.t()
    teacher = inputs.x_teacher @ inputs.weight_teacher.t()
    loss, _ = reference.patch_loss(
        student, teacher, inputs.center, STUDENT_TEMP, TEACHER_TEMP, inputs.weights
    )
    return loss


def linear_loss_comparison(size: Size, device: torch.device) -> Comparison:
    baselines = build_baselines(
        BASELINES,
        lambda loss_fn: partial(step, loss_fn, make_inputs(size, device)),
        lambda loss_fn: check(loss_fn, size, device),
    )
    title = f"last layer and patch loss, forward + backward, {size}"
    return Comparison(title, baselines, *counted_bytes(size))


@pytest.mark.parametrize("baseline", BASELINES)
def test_linear_loss(compare: Compare, size: Size, baseline: str) -> None:
    compare(linear_loss_comparison, size, baseline=baseline)

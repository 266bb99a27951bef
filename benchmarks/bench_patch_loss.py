"""The loss of masked patch tokens (iBOT, DINOv2, DINOv3), forward and backward, from logits.

Predicted for an H200 (4.3 TB/s), not measured: N = 3771, K = 65536, bf16 read 988 MB in the forward
pass, and read 988 and write 494 MB in the backward pass, so at least 575 us. DINOv2's order of
operations moves 84 bytes per logit and row in fp32: 21 GB, 4.8 ms.

Predicted for a CPU, N = 256, K = 65536, fp32: DINOv2's order makes 21 passes over 64 MB, 1.4 GB
counted, and 3 exponentials per logit, and creates the pages of 8 tensors. Ours reads and writes 336
MB, computes 4 powers of 2, makes 19 passes in the caches and creates the pages of one tensor: 2.3
times faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import fastdino_kernels
import pytest
import torch
from fastdino_kernels import reference
from torch import Tensor

from benchmarks.comparison import Compare, Comparison, assert_close, build_baselines

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07
TOLERANCE = 1e-5  # relative, of fp32 losses and gradients; bf16 gradients are rounded


@dataclass(frozen=True)
class Size:
    """N masked tokens and K prototypes."""

    N: int
    K: int = 65536
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"N{self.N} K{self.K} {str(self.dtype).removeprefix('torch.')}"


SIZES = {
    "cuda": [Size(3771), Size(2496, 131072), Size(3771, dtype=torch.float32)],
    "cpu": [Size(256, dtype=torch.float32), Size(256)],
    "quick": [Size(16, 4096, torch.float32), Size(16, 4096)],
}


@dataclass(frozen=True)
class Inputs:
    """Logits [N, K], center [K], weights [N] and the denominator, a number of images."""

    student: Tensor
    teacher: Tensor
    center: Tensor
    weights: Tensor
    denominator: int

    def leaf(self) -> Tensor:
        """Return the student's logits without history, to be differentiated."""
        return self.student.detach().requires_grad_()


Loss = Callable[[Tensor, Inputs], Tensor]


def dinov2(student: Tensor, inputs: Inputs) -> Tensor:
    """Compute the loss in the order of operations of DINOv2 without its fused cross-entropy."""
    targets = torch.softmax((inputs.teacher.float() - inputs.center) / TEACHER_TEMP, dim=-1)
    log_probs = torch.log_softmax(student.float() / STUDENT_TEMP, dim=-1)
    rows = torch.sum(targets * log_probs, dim=-1)
    return -(rows * inputs.weights).sum() / inputs.denominator


@functools.lru_cache(maxsize=1)
def _compiled(shape: torch.Size) -> Callable[..., Tensor]:
    """Compile DINOv2's operations for one shape."""
    torch._dynamo.reset()

    def loss(student: Tensor, *tensors: Tensor, denominator: int) -> Tensor:
        teacher, center, weights = tensors
        return dinov2(student, Inputs(student, teacher, center, weights, denominator))

    return torch.compile(loss, fullgraph=True, dynamic=False)


def compiled(student: Tensor, inputs: Inputs) -> Tensor:
    tensors = (inputs.teacher, inputs.center, inputs.weights)
    return _compiled(student.shape)(student, *tensors, denominator=inputs.denominator)


def ours(student: Tensor, inputs: Inputs, inplace_backward: bool = False) -> Tensor:
    loss, _ = fastdino_kernels.patch_loss(
        student, inputs.teacher, inputs.center,
        student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, weights=inputs.weights,
        denominator=inputs.denominator, inplace_backward=inplace_backward,
    )  # fmt: skip
    return loss


BASELINES: dict[str, tuple[str, Loss]] = {
    "DINOv2's order, eager": ("paper", dinov2),
    "DINOv2's order, torch.compile": ("compile", compiled),
    "fastdino_kernels": ("ours", ours),
}


def counted_bytes(size: Size) -> tuple[int, str]:
    """Count what must move: both logits read twice, and the gradient written."""
    logits = size.N * size.K * size.dtype.itemsize
    return 5 * logits, "both logits read twice, the gradient written once"


@functools.lru_cache(maxsize=1)
def make_inputs(size: Size, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.N, size.K)

    def logits() -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator, device=device)).to(size.dtype)

    center = 0.1 * torch.randn(size.K, generator=generator, device=device)
    weights = torch.rand(size.N, generator=generator, device=device) / 50
    return Inputs(logits(), logits(), center, weights, 128)


def run(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the student's logits."""
    leaf = inputs.leaf()
    result = loss(leaf, inputs)
    (grad,) = torch.autograd.grad(result, leaf)
    return result.detach(), grad


def check(loss: Loss, size: Size, device: torch.device) -> None:
    """Compare with the equations in float64, for the first rows."""
    whole = make_inputs(size, device)
    student, teacher, weights = (x[:16] for x in (whole.student, whole.teacher, whole.weights))
    inputs = Inputs(student, teacher, whole.center, weights, whole.denominator)
    leaf = student.double().requires_grad_()
    expected, _ = reference.patch_loss(
        leaf, teacher.double(), whole.center.double(), STUDENT_TEMP, TEACHER_TEMP,
        weights.double(), inputs.denominator,
    )  # fmt: skip
    expected.backward()
    result, grad = run(loss, inputs)
    assert_close("the loss", result, expected.detach(), TOLERANCE)
    assert leaf.grad is not None
    tolerance = TOLERANCE if size.dtype == torch.float32 else torch.finfo(size.dtype).eps
    assert_close("the gradient", grad, leaf.grad, tolerance)


def patch_comparison(size: Size, device: torch.device) -> Comparison:
    baselines = build_baselines(
        BASELINES,
        lambda loss: partial(run, loss, make_inputs(size, device)),
        lambda loss: check(loss, size, device),
    )
    return Comparison(f"patch loss, {size}", baselines, *counted_bytes(size))


@pytest.mark.parametrize("baseline", BASELINES)
def test_patch_loss(compare: Compare, size: Size, baseline: str) -> None:
    compare(patch_comparison, size, baseline=baseline)

"""Inputs and results of dino_loss, and the reference's in float64.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import importlib
import math

import torch
from fastdino_kernels import dino_loss, reference
from torch import Tensor

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}

HALF = [torch.float16, torch.bfloat16]

FLOATS = [*HALF, torch.float32]

# Relative spacing of the dtype in which a gradient is stored.
EPS = {dtype: torch.finfo(dtype).eps for dtype in (*HALF, torch.float32, torch.float64)}


def draw(S=4, T=2, B=3, K=7, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = spread * normal(S, B, K), spread * normal(T, B, K)
    return student.to(dtype), teacher.to(dtype), 0.1 * normal(K).float()


def truth(student, teacher, center, scale=1.0, dtype=torch.float64, **temps):
    """Return the reference's loss, gradient of scale*loss, and teacher sum in `dtype`."""
    student = student.detach().to(dtype).requires_grad_()
    loss, total = reference.dino_loss(
        student, teacher.to(dtype), center.to(dtype), **(temps or TEMPS)
    )
    (scale * loss).backward()
    return loss.detach(), student.grad, total


def ours(student, teacher, center, scale=1.0, impl="torch", device="cpu", **options):
    """Return the same of dino_loss, computed on `device`, on the CPU."""
    student = student.detach().to(device, copy=True).requires_grad_()
    options = {name: on(device, value) for name, value in (TEMPS | options).items()}
    loss, total = dino_loss(student, teacher.to(device), center.to(device), impl=impl, **options)
    (scale * loss).backward()
    return loss.detach().cpu(), student.grad.cpu(), total.cpu()


def on(device, value):
    return value.to(device) if isinstance(value, Tensor) else value


def interpreted(target):
    return target == {"impl": "triton", "device": "cpu"}


def wide_blocks(monkeypatch, prototypes):
    """Use fewer, wider blocks: a program of the interpreter costs the same for any width."""
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    width = max(pairwise_triton.FORWARD_BLOCK, 1 << max(0, prototypes // 4 - 1).bit_length())
    monkeypatch.setattr(pairwise_triton, "FORWARD_BLOCK", width)
    monkeypatch.setattr(pairwise_triton, "BACKWARD_BYTES", 4 * width)
    monkeypatch.setattr(pairwise_triton, "SUM_COLUMNS", max(pairwise_triton.SUM_COLUMNS, width))


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    difference = (got.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-30)).item()


def assert_accurate(inputs, *, loss=math.inf, grad=math.inf, total=math.inf, **options):
    """Compare with the reference in float64, with limits of the relative errors."""
    results = zip(ours(*inputs, **options), truth(*inputs), (loss, grad, total), strict=True)
    for got, expected, limit in results:
        assert error(got, expected) < limit

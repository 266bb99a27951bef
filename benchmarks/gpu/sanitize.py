"""Launch each kernel once, with sizes that fill no block, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python3 -m benchmarks.gpu.sanitize

Without the allocator's cache each tensor is an allocation, so that memcheck knows its end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from fastdino_kernels import (
    AdamWEMA,
    clip_grad_norm_,
    clip_grad_norms_,
    dino_loss,
    ema_update_,
    multi_crop,
    soft_cross_entropy,
)
from torch import Tensor

from fastdino.augmentation.params import draw_crops
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.config import TrainConfig
from fastdino.runtime import choose_device

# Sizes next to the chunks of the multi-tensor kernels; the last one's copy has rows of norm 1.
SHAPES = [(3,), (129, 7), (2049,), (1,), (5000,), (37, 64)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def losses(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Run forward and backward of both losses, with separate gradients and in place."""
    teacher = _normal((2, 3, 1037), dtype, device)
    center = _normal((1037,), torch.float32, device)
    made: list[Tensor] = []
    for inplace in (False, True):
        leaf = _normal((4, 3, 1037), dtype, device).requires_grad_()
        options: dict[str, Any] = {"inplace_backward": inplace, "impl": "triton"}
        loss, teacher_sum = dino_loss(
            leaf * 1, teacher, center, student_temp=0.1, teacher_temp=0.04, **options
        )
        rows = soft_cross_entropy(
            leaf * 1, teacher.softmax(-1), student_temp=0.1, ignore_diagonal=True, **options
        )
        made += [loss, teacher_sum, rows, *torch.autograd.grad(loss + rows.sum(), leaf)]
    return made


def updates(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Run the EMA, both clips and the optimizer step, with copies and a flag."""
    students = [_normal(shape, dtype, device).requires_grad_() for shape in SHAPES]
    for student in students:
        student.grad = torch.ones_like(student)
    teachers, copies = ([torch.zeros_like(s) for s in students] for _ in range(2))
    ema_update_(teachers, students, 0.9, shadow=copies, impl="triton")
    clip_grad_norms_(students, 0.3, impl="triton")
    clip_grad_norm_(students, 0.3, impl="triton")
    optimizer = AdamWEMA(
        students,
        lr=torch.tensor(0.1, device=device),
        max_norm=0.3,
        teacher=teachers,
        teacher_shadow=copies,
        unit_rows=students[-1],
        skip_nonfinite=True,
        impl="triton",
    )
    for _ in range(2):
        optimizer.step(momentum=0.9)
    return [*students, *teachers, *copies]


def crops(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Make global and local crops of images of odd sizes."""
    sizes = [(37, 53), (1, 9), (64, 31)]
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, device=device) for size in sizes]
    config = TrainConfig(local_crops_number=3)
    return [
        multi_crop(images, params, size=size, mean=MEAN, std=STD, dtype=dtype, impl="triton")
        for params, size in zip(draw_crops(config, 0, range(3), sizes), (33, 17), strict=True)
    ]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


KERNELS: tuple[Callable[[torch.dtype, torch.device], list[Tensor]], ...] = (losses, updates, crops)


def main() -> int:
    device = choose_device("auto")
    for kernel in KERNELS:
        for dtype in DTYPES:
            made = kernel(dtype, device)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in made):
                print(f"{kernel.__name__} in {dtype}: not finite")
                return 1
        print(f"{kernel.__name__}: {len(DTYPES)} dtypes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Calls of the public functions that launch every kernel, as training does.

They cover the variants that training uses and the most general ones; option_calls.py covers all
options. Sizes are those of training where a kernel is compiled for them, and small elsewhere. A
call makes its tensors on the device that it is given, see emulated_gpu.py.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastdino_kernels import (
    CropParams,
    adamw_ema_update_,
    clip_grad_norm_,
    clip_grad_norms_,
    dino_loss,
    ema_update_,
    multi_crop,
    patch_loss,
    sinkhorn_center,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from torch import Tensor

CPU = torch.device("cpu")
Call = Callable[..., Any]  # of a device, by default the CPU
Calls = Iterator[tuple[str, Call]]

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}
MIXED = (FP32, BF16)  # one dtype for each of two tensors
Dtype = torch.dtype | tuple[torch.dtype, torch.dtype]


def kernel_calls() -> Calls:
    """Yield (name, call) for every call."""
    yield from _loss_calls()
    yield from _sinkhorn_calls()
    yield from _ema_calls()
    yield from _clip_calls()
    yield from _adamw_ema_calls()
    yield from _multi_crop_calls()


def _loss_calls() -> Calls:
    for dtype in (BF16, FP16, FP32):
        for crops in (10, 12):
            yield f"{NAMES[dtype]} S{crops}", partial(_dino_loss, dtype, crops)
    yield "bf16 S10 K odd", partial(_dino_loss, BF16, 10, prototypes=65537)
    yield "bf16 S10 K 1000", partial(_dino_loss, BF16, 10, prototypes=1000)
    yield "bf16 S10 device temperatures", partial(_dino_loss, BF16, 10, on_device=True)
    yield "bf16 rows of probs", _soft_cross_entropy
    for dtype in (BF16, FP16, FP32):
        yield f"{NAMES[dtype]} patches", partial(_patch_loss, dtype)
    yield "bf16 patches, K odd", partial(_patch_loss, BF16, prototypes=65537)


def _dino_loss(
    dtype: torch.dtype,
    crops: int,
    device: torch.device = CPU,
    *,
    prototypes: int = 65536,
    on_device: bool = False,
) -> None:
    student = torch.zeros(crops, 2, prototypes, dtype=dtype, device=device, requires_grad=True)
    teacher = torch.zeros(2, 2, prototypes, dtype=dtype, device=device)
    center = torch.zeros(prototypes, device=device)
    temp = torch.full((), 0.1, device=device) if on_device else 0.1
    loss, _ = dino_loss(
        student, teacher, center, student_temp=temp, teacher_temp=temp, impl="triton"
    )
    loss.backward()


def _soft_cross_entropy(device: torch.device = CPU) -> None:
    student = torch.zeros(1, 2, 65536, dtype=BF16, device=device, requires_grad=True)
    probs = torch.zeros(1, 2, 65536, device=device)
    soft_cross_entropy(student, probs, student_temp=0.1, impl="triton").sum().backward()


def _patch_loss(
    dtype: torch.dtype, device: torch.device = CPU, *, rows: int = 40, prototypes: int = 65536
) -> None:
    student = torch.zeros(rows, prototypes, dtype=dtype, device=device, requires_grad=True)
    teacher = torch.zeros(rows, prototypes, dtype=dtype, device=device)
    center, weights = torch.zeros(prototypes, device=device), torch.ones(rows, device=device)
    loss, _ = patch_loss(
        student, teacher, center,
        student_temp=0.1, teacher_temp=0.04, weights=weights, impl="triton",
    )  # fmt: skip
    loss.backward()


def _sinkhorn_calls() -> Calls:
    for dtype in (BF16, FP16, FP32):
        for rows in (64, 3771):  # class tokens, and masked patches
            yield f"{NAMES[dtype]} N{rows}", partial(_sinkhorn, dtype, rows)
    yield "bf16 N3771 K odd", partial(_sinkhorn, BF16, 3771, prototypes=65537)
    yield "bf16 N3771 device temperature", partial(_sinkhorn, BF16, 3771, on_device=True)
    yield "bf16 probabilities", partial(_sinkhorn, BF16, 64, function=sinkhorn_knopp)


def _sinkhorn(
    dtype: torch.dtype,
    rows: int,
    device: torch.device = CPU,
    *,
    prototypes: int = 65536,
    on_device: bool = False,
    function: Callable[..., Tensor] = sinkhorn_center,
) -> None:
    temp = torch.full((), 0.07, device=device) if on_device else 0.07
    teacher = torch.zeros(rows, prototypes, dtype=dtype, device=device)
    function(teacher, temp, impl="triton")


def _ema_calls() -> Calls:
    variants: Sequence[tuple[Dtype, Dtype, Dtype | None, torch.dtype | None]] = (
        (FP32, FP32, None, None),
        (FP32, FP32, None, FP64),
        (FP32, FP32, BF16, None),
        (FP32, FP32, BF16, FP32),
        (FP32, FP32, BF16, FP64),
        (FP32, FP32, FP16, None),
        (FP32, BF16, None, None),
        (BF16, BF16, None, None),
        (FP16, FP16, None, None),
        (MIXED, MIXED, None, None),
        (MIXED, MIXED, MIXED, FP64),
    )
    for teacher, student, shadow, momentum in variants:
        words = [_name(teacher), _name(student)]
        words += [] if shadow is None else [f"shadow {_name(shadow)}"]
        words += [] if momentum is None else [f"momentum {_name(momentum)}"]
        yield " ".join(words), partial(_ema, teacher, student, shadow, momentum)


def _ema(
    teacher: Dtype,
    student: Dtype,
    shadow: Dtype | None,
    momentum: torch.dtype | None,
    device: torch.device = CPU,
) -> None:
    ema_update_(
        _tensors(teacher, device),
        _tensors(student, device),
        0.9 if momentum is None else torch.full((), 0.9, dtype=momentum, device=device),
        shadow=None if shadow is None else _tensors(shadow, device),
        impl="triton",
    )


def _clip_calls() -> Calls:
    for dtype in (FP32, BF16, FP16, MIXED):
        yield f"each {_name(dtype)}", partial(_clip, clip_grad_norms_, dtype)
        yield f"all {_name(dtype)}", partial(_clip, clip_grad_norm_, dtype)


def _clip(clip: Callable[..., Tensor], dtype: Dtype, device: torch.device = CPU) -> None:
    parameters = _tensors(dtype, device)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    clip(parameters, 1.0, impl="triton")


def _adamw_ema_calls() -> Calls:
    """Each call states what differs from fp32 everywhere, with a teacher and without copies."""
    skip, momentum, refused = (False, torch.bool), (0.9, FP64), (0, torch.int64)
    yield "fp32", _adamw_ema
    yield "bf16 gradients", partial(_adamw_ema, gradients=BF16)
    yield "fp16 gradients, skip", partial(_adamw_ema, gradients=FP16, skip=skip)
    yield "momentum fp64, skip", partial(_adamw_ema, momentum=momentum, skip=skip)
    yield (
        "bf16 copies, momentum fp64, skip",
        partial(_adamw_ema, shadows=BF16, teacher_shadows=BF16, momentum=momentum, skip=skip),
    )
    yield "fp16 copies", partial(_adamw_ema, shadows=FP16, teacher_shadows=FP16)
    yield (
        "bf16 copy with unit rows, skip",
        partial(_adamw_ema, teacher_shadows=BF16, unit_rows=1, skip=skip),
    )
    yield "no teacher", partial(_adamw_ema, teachers=None)
    yield "no teacher, bf16 copy", partial(_adamw_ema, teachers=None, shadows=BF16)
    yield (
        "all bf16",
        partial(
            _adamw_ema,
            parameters=BF16,
            gradients=BF16,
            teachers=BF16,
            shadows=BF16,
            teacher_shadows=BF16,
        ),
    )
    yield (
        "all mixed, momentum fp64, skip",
        partial(
            _adamw_ema,
            parameters=MIXED,
            gradients=MIXED,
            teachers=MIXED,
            shadows=MIXED,
            teacher_shadows=MIXED,
            momentum=momentum,
            skip=skip,
        ),
    )
    for dtype in (FP32, FP64):
        number = (0.1, dtype)
        yield (
            f"lr and weight_decay {_name(dtype)}, grad_scale, max_norm, skip",
            partial(
                _adamw_ema,
                lr=number,
                weight_decay=number,
                grad_scale=(1.0, FP32),
                max_norm=1.0,
                skip=skip,
            ),
        )
    yield "refused_steps", partial(_adamw_ema, refused_steps=refused)
    yield (
        "skip, found_inf, refused_steps",
        partial(_adamw_ema, skip=skip, found_inf=(0.0, FP32), refused_steps=refused),
    )


def _adamw_ema(
    device: torch.device = CPU,
    *,
    parameters: Dtype = FP32,
    gradients: Dtype = FP32,
    teachers: Dtype | None = FP32,
    shadows: Dtype | None = None,
    teacher_shadows: Dtype | None = None,
    momentum: float | tuple[float, torch.dtype] = 0.9,
    lr: float | tuple[float, torch.dtype] = 1e-3,
    **options: Any,
) -> None:
    """Call adamw_ema_update_; an option (value, dtype) is a 0-d tensor on the device."""
    copies = {"teachers": teachers, "shadows": shadows, "teacher_shadows": teacher_shadows}
    options |= {"momentum": momentum, "lr": lr}
    adamw_ema_update_(
        _tensors(parameters, device),
        _tensors(gradients, device),
        _tensors(parameters, device),
        _tensors(parameters, device),
        torch.zeros(2, device=device),
        **{name: _tensors(dtype, device) for name, dtype in copies.items() if dtype is not None},
        **{name: _scalar(value, device) for name, value in options.items()},
        impl="triton",
    )


def _scalar(value: Any, device: torch.device) -> Any:
    if not isinstance(value, tuple):
        return value
    number, dtype = value
    return torch.full((), number, dtype=dtype, device=device)


def _multi_crop_calls() -> Calls:
    for dtype in (BF16, FP32):
        for size in (224, 96):
            yield f"{size} {NAMES[dtype]}", partial(_multi_crop, size, dtype)


def _multi_crop(size: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
    box, off = torch.full((1, 2), 30, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.bool)
    order = torch.arange(4, dtype=torch.int32).expand(1, 2, 4).contiguous()
    factor, radius = torch.ones(1, 2, 4), torch.zeros(1, 2)
    params = CropParams(0 * box, 0 * box, box, box, off, off, order, factor, off, radius, off)
    image = torch.zeros(37, 50, 3, dtype=torch.uint8, device=device)
    multi_crop(
        [image], params, size=size, mean=(0, 0, 0), std=(1, 1, 1), dtype=dtype, impl="triton"
    )


def _name(dtype: Dtype) -> str:
    return NAMES[dtype] if isinstance(dtype, torch.dtype) else "mixed"


def _tensors(dtype: Dtype, device: torch.device) -> list[Tensor]:
    """Return two tensors [64, 256], the second of rows that unit_rows can normalise."""
    dtypes = (dtype, dtype) if isinstance(dtype, torch.dtype) else dtype
    return [torch.zeros(64, 256, dtype=each, device=device) for each in dtypes]

"""The teacher's exponential moving average, for all parameters at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference
from .dispatch import check_float_tensor, choose_impl, is_number


@torch.no_grad()
def ema_update_(
    teacher_tensors: Iterable[Tensor],
    student_tensors: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    shadow: Iterable[Tensor] | None = None,
    impl: str = "auto",
) -> None:
    """Teacher <- momentum*teacher + (1 - momentum)*student, in place, for every pair of tensors.

    The momentum teacher of Caron et al. 2021, section 3.1. Differing dtypes are computed in the
    wider one and rounded once. No gradient is recorded; parameters may require one. A plain call
    reads nothing back to the host.

    Args:
        teacher_tensors: fp16/bf16/fp32/fp64 tensors of any shape, updated in place.
        student_tensors: as many, of the same shapes and devices; dtypes may differ.
        momentum: in [0, 1]. A float, or a 0-d tensor, whose value is not checked; on an
            accelerator it stays there, so that a captured CUDA graph sees it change. A 0-d fp32
            tensor rounds 1 - momentum (7e-5 relative at .9996): fp64 keeps it.
        shadow: copies of the teacher, often in lower precision, rewritten in the same call.
        impl: "torch" (multi-tensor operations), "reference" (one by one), or "auto".

    Raises:
        ValueError: lengths, shapes or devices that differ, a momentum out of range, or a tensor
            that is teacher and student (or shadow) at once; the message names the index.
        TypeError: something that is not a floating-point tensor.

    """
    teacher, student = list(teacher_tensors), list(student_tensors)
    copies = None if shadow is None else list(shadow)
    _check_pairs("teacher_tensors", teacher, "student_tensors", student)
    if copies is not None:
        _check_pairs("teacher_tensors", teacher, "shadow", copies)
    chosen = choose_impl(impl, [*teacher, *student, *(copies or ())])
    momentum = _check_momentum(momentum, teacher)

    if chosen == "reference":
        _reference_ema_(teacher, student, momentum)
    else:
        _torch_ema_(teacher, student, momentum)
    if copies:
        torch._foreach_copy_(copies, teacher)


def _torch_ema_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor
) -> None:
    # A multi-tensor operation is one launch only where all of its tensors agree.
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], tuple[list[Tensor], ...]] = {}
    for t, s in zip(teacher, student, strict=True):
        ts, ss = groups.setdefault((t.device, t.dtype, s.dtype), ([], []))
        ts.append(t)
        ss.append(s)
    for (_, teacher_dtype, student_dtype), (ts, ss) in groups.items():
        wide = torch.promote_types(teacher_dtype, student_dtype)
        if isinstance(momentum, Tensor):  # the difference below would be rounded to half
            wide = _at_least_fp32(wide)
        wide_ss = ss if student_dtype == wide else [s.to(wide) for s in ss]
        if teacher_dtype == wide:
            _lerp_(ts, wide_ss, momentum)
        else:
            wide_ts = [t.to(wide) for t in ts]
            _lerp_(wide_ts, wide_ss, momentum)
            torch._foreach_copy_(ts, wide_ts)


def _lerp_(teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor) -> None:
    dtype, device = teacher[0].dtype, teacher[0].device
    if isinstance(momentum, Tensor) and momentum.device != device:
        momentum = momentum.item()  # it is on the host: nothing waits
    if isinstance(momentum, Tensor):
        # teacher += (1 - m)*(student - teacher): torch has no multi-tensor lerp whose weight is
        # one tensor, and reading the weight would wait for the device.
        weight = (1 - momentum.to(_at_least_fp32(momentum.dtype))).to(dtype)
        step = torch._foreach_sub(student, teacher)
        torch._foreach_mul_(step, weight)
        torch._foreach_add_(teacher, step)
    else:
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _reference_ema_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor
) -> None:
    for t, s in zip(teacher, student, strict=True):
        wide = _at_least_fp32(torch.promote_types(t.dtype, s.dtype))
        t.copy_(reference.ema_update([t.to(wide)], [s.to(wide)], momentum)[0])


def _check_momentum(momentum: object, teacher: Sequence[Tensor]) -> float | Tensor:
    if isinstance(momentum, Tensor):
        check_float_tensor("momentum", momentum)
        if momentum.dim() != 0:
            raise ValueError(
                f"momentum must be a float or a 0-d tensor, got shape {tuple(momentum.shape)}"
            )
        for index, t in enumerate(teacher):
            if momentum.device not in (t.device, torch.device("cpu")):
                raise ValueError(
                    f"momentum is on {momentum.device} but teacher_tensors[{index}] "
                    f"on {t.device}: expected one device"
                )
        return momentum.detach()
    if not is_number(momentum):
        raise TypeError(f"momentum must be a float or a 0-d tensor, got {type(momentum).__name__}")
    assert isinstance(momentum, (int, float))
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    return momentum


def _check_pairs(name_a: str, a: Sequence[Tensor], name_b: str, b: Sequence[Tensor]) -> None:
    if len(a) != len(b):
        raise ValueError(
            f"{name_a} and {name_b} must have the same length, got {len(a)} and {len(b)}"
        )
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        check_float_tensor(f"{name_a}[{index}]", x)
        check_float_tensor(f"{name_b}[{index}]", y)
        if x.shape != y.shape:
            raise ValueError(
                f"{name_a}[{index}] and {name_b}[{index}] must have the same shape, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if x.device != y.device:
            raise ValueError(
                f"{name_a}[{index}] and {name_b}[{index}] must be on the same device, "
                f"got {x.device} and {y.device}"
            )
        if _same_memory(x, y):
            raise ValueError(
                f"{name_a}[{index}] and {name_b}[{index}] are the same tensor: expected two"
            )


def _same_memory(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    if torch.compiler.is_compiling():  # traced tensors have no address
        return False
    return x.numel() > 0 and x.data_ptr() == y.data_ptr() and x.data_ptr() != 0

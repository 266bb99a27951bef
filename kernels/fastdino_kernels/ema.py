"""Exponential moving average of the teacher, for all parameters at once.

In Triton one launch updates the whole network, whatever its dtypes, and writes low-precision copies
in the same pass: 12 bytes per parameter in fp32 (two reads, one write), 14 with a bf16 copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import check_lengths, check_range, check_scalar
from .dispatch import choose_impl
from .dtensor import local_lists
from .operators import LIBRARY, ops, register_fake
from .tensor_lists import Lists, are_traced, check_lists, present, tables_for


@torch.no_grad()
def ema_update_(
    teacher_tensors: Iterable[Tensor],
    student_tensors: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    shadow: Iterable[Tensor] | None = None,
    impl: str = "auto",
) -> None:
    """Update teacher <- momentum*teacher + (1 - momentum)*student in place, for all pairs.

    This is the momentum teacher of Caron et al. 2021, section 3.1. Half precision is computed in
    fp32 and rounded once. No gradient is recorded; parameters may require one. No value is read
    back to the host.

    Under torch.compile pass a tensor as momentum: a new float causes a recompilation. DTensors are
    updated shard by shard.

    Args:
        teacher_tensors: fp16/bf16/fp32/fp64 tensors of any shape, updated in place.
        student_tensors: as many, of the same shapes and devices; dtypes may differ.
        momentum: in [0, 1]. A float, or a 0-d tensor, whose value is not checked. On an accelerator
            it stays there, and a captured CUDA graph reads it anew. A 0-d fp32 tensor rounds
            1 - momentum (7e-5 relative at .9996); fp64 does not.
        shadow: copies of the teacher, often in lower precision, rewritten in the same call.
        impl: "triton" (one launch; no fp64), "torch" (multi-tensor operations), or "auto". Triton
            leaves the call to PyTorch if a pair is not dense with equal strides on both sides, or
            the tensors are on several devices.

    Raises:
        ValueError: lengths, shapes or devices that differ, a momentum out of range, or written
            tensors that share memory with another tensor (so no tensor may be listed twice) or
            within themselves; the message has the indices.
        TypeError: an argument that is not a dense floating-point tensor.
        RuntimeError: a CUDA graph is being captured, and no earlier call had tensors on the GPU.

    """
    lists: dict[str, list[Tensor]] = {"teacher_tensors": list(teacher_tensors)}
    if shadow is not None:
        lists["shadow"] = list(shadow)
    lists["student_tensors"] = list(student_tensors)  # last, because it is only read
    check_lengths(lists)
    momentum = check_scalar("momentum", momentum)
    check_range("momentum", momentum, most=1)
    if not lists["teacher_tensors"]:
        choose_impl(impl, [])  # raises for an unknown name
    elif torch.compiler.is_compiling():
        _traced_update_(lists, momentum, impl)
    else:
        local = local_lists(lists)
        traced = are_traced([*local.values(), [m for m in [momentum] if isinstance(m, Tensor)]])
        (_traced_update_ if traced else _update_)(local, momentum, impl)


def _update_(lists: Lists, momentum: float | Tensor, impl: str) -> None:
    """Update tensors that have memory."""
    tables = tables_for(lists, len(lists) - 1, impl, ".ema_triton")
    momentum = _placed(momentum, lists)
    if tables is None:
        _torch_update_(lists, momentum)
        return
    from .ema_triton import launch_ema

    launch_ema(tables, momentum)
    for written in list(lists.values())[:-1]:  # autograd cannot see the writes of a kernel
        torch.autograd.graph.increment_version(written)  # type: ignore[arg-type]


def _traced_update_(lists: Lists, momentum: float | Tensor, impl: str) -> None:
    """Update under torch.compile, or tensors without memory of their own."""
    check_lists(lists)
    if choose_impl(impl, present(lists.values())) == "torch":
        _torch_update_(lists, _placed(momentum, lists))
        return
    teacher, *shadow, student = lists.values()
    scalar, on_device = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    ops.ema_update_(teacher, student, shadow[0] if shadow else [], scalar, on_device)


def _ema_op(
    teacher: list[Tensor],
    student: list[Tensor],
    shadow: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    """Run the update of a traced graph; see the schema below."""
    copies = {"shadow": shadow} if shadow else {}
    lists = {"teacher_tensors": teacher, **copies, "student_tensors": student}
    _update_(lists, momentum if momentum_tensor is None else momentum_tensor, "triton")


# Not torch.library.custom_op, whose wrappers take longer than the kernel.
LIBRARY.define(
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor(b!)[] shadow, float momentum, "
    "Tensor? momentum_tensor) -> ()"
)
LIBRARY.impl("ema_update_", _ema_op, "CompositeExplicitAutograd")
register_fake("ema_update_", lambda *_: None)


def _placed(momentum: float | Tensor, lists: Lists) -> float | Tensor:
    """Return the momentum: a number, or a tensor on the teachers' device."""
    if not isinstance(momentum, Tensor):
        return momentum
    devices = {teacher.device for teacher in present(list(lists.values())[:1])}
    if devices == {momentum.device}:
        return momentum
    if momentum.is_cpu:
        return momentum.item()  # already on the host: no synchronisation
    raise ValueError(
        f"momentum is on {momentum.device} but the teachers on "
        f"{', '.join(sorted(map(str, devices)))}: expected one device"
    )


def _torch_update_(lists: Lists, momentum: float | Tensor) -> None:
    teacher, *shadow, student = (present([some]) for some in lists.values())
    torch_ema_(teacher, student, momentum)
    for copies in shadow:
        torch._foreach_copy_(copies, teacher)


def torch_ema_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """Update checked tensors by multi-tensor operations, which are one launch if dtypes agree."""
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for t, s in zip(teacher, student):
        ts, ss = groups.setdefault((t.dtype, s.dtype), ([], []))
        ts.append(t)
        ss.append(s)
    for (teacher_dtype, student_dtype), (ts, ss) in groups.items():
        wide = torch.promote_types(teacher_dtype, student_dtype)
        if isinstance(momentum, Tensor):  # the difference below would be rounded to half
            wide = torch.promote_types(wide, torch.float32)
        wide_ts = ts if teacher_dtype == wide else [t.to(wide) for t in ts]
        _lerp_(wide_ts, ss if student_dtype == wide else [s.to(wide) for s in ss], momentum)
        if wide_ts is not ts:
            torch._foreach_copy_(ts, wide_ts)


def _lerp_(teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor) -> None:
    if not isinstance(momentum, Tensor):
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        return
    # teacher += (1 - m)*(student - teacher): torch has no multi-tensor lerp whose weight is one
    # tensor, and reading the weight would wait for the device.
    weight = 1 - momentum.to(torch.promote_types(momentum.dtype, torch.float32))
    step = torch._foreach_sub(student, teacher)
    torch._foreach_mul_(step, weight.to(teacher[0].dtype))
    torch._foreach_add_(teacher, step)

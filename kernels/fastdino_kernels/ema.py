"""The teacher's exponential moving average, for all parameters at once.

In Triton one launch serves the whole network, whatever its dtypes, and writes low-precision copies
on the way: 12 bytes a parameter in fp32 (two reads, one write), 14 with a bf16 copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference
from .dispatch import check_float_tensor, choose_impl, is_number
from .pointer_table import (
    Plan,
    are_flat,
    are_plain,
    build_table,
    find_overlap,
    overlaps_itself,
    plan_for,
)
from .sharded import check_sharded_alike, local_part


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

    The momentum teacher of Caron et al. 2021, section 3.1. Half precision is computed in fp32 and
    rounded once. No gradient is recorded; parameters may require one. Nothing is read back to the
    host.

    Triton treats a pair as flat memory, which takes the same dense strides on both sides (both
    contiguous, both channels_last, both transposed, ...) and the first pair's device; the other
    pairs of the same call are left to PyTorch. Under torch.compile give the momentum as a tensor:
    each new float is compiled anew. DTensors are updated shard by shard.

    Args:
        teacher_tensors: fp16/bf16/fp32/fp64 tensors of any shape, updated in place.
        student_tensors: as many, of the same shapes and devices; dtypes may differ.
        momentum: in [0, 1]. A float, or a 0-d tensor, whose value is not checked; on an
            accelerator it stays there, so that a captured CUDA graph sees it change. A 0-d fp32
            tensor rounds 1 - momentum (7e-5 relative at .9996): fp64 keeps it.
        shadow: copies of the teacher, often in lower precision, rewritten in the same call.
        impl: "triton" (one launch; no fp64), "torch" (multi-tensor operations), "reference" (one
            by one), or "auto".

    Raises:
        ValueError: lengths, shapes or devices that differ, a momentum out of range, or tensors
            that share memory with one that is written (so no tensor may be listed twice), or
            whose own elements do where they are written; the message names the indices.
        TypeError: something that is not a dense floating-point tensor.
        RuntimeError: a CUDA graph is being captured, and no call with tensors on the GPU went
            before.

    """
    teacher, student = list(teacher_tensors), list(student_tensors)
    copies = [] if shadow is None else list(shadow)
    _check_length("student_tensors", student, teacher)
    if shadow is not None:
        _check_length("shadow", copies, teacher)
    momentum = _check_momentum(momentum)
    if torch.compiler.is_compiling():
        _traceable_ema_(teacher, student, copies, momentum, impl)
        return
    plain = are_plain([*teacher, *copies, *student])
    if not plain:
        teacher, student, copies = _local_parts(teacher, student, copies)
        plain = are_plain([*teacher, *copies, *student])
    if teacher and plain and not (isinstance(momentum, Tensor) and not are_plain([momentum])):
        _eager_ema_(teacher, student, copies, momentum, impl)
    else:
        _traceable_ema_(teacher, student, copies, momentum, impl)


def _eager_ema_(
    teacher: list[Tensor],
    student: list[Tensor],
    copies: list[Tensor],
    momentum: float | Tensor,
    impl: str,
) -> None:
    """The update of tensors that have memory; their checks are remembered with their plan."""
    if isinstance(momentum, Tensor) and momentum.is_cpu and not teacher[0].is_cpu:
        momentum = momentum.item()  # it is on the host: nothing waits
    device = momentum.device if isinstance(momentum, Tensor) else None
    head = ("ema", impl, choose_impl(impl, teacher[:1]), device, bool(copies))

    def make() -> Plan:
        _check_tensors(teacher, student, copies, momentum)
        _check_memory(teacher, student, copies)
        return _make_plan(teacher, student, copies, impl)

    _run(plan_for(head, [*teacher, *copies, *student], make), teacher, student, copies, momentum)


def _traceable_ema_(
    teacher: list[Tensor],
    student: list[Tensor],
    copies: list[Tensor],
    momentum: float | Tensor,
    impl: str,
) -> None:
    """The update under torch.compile, or of tensors without memory of their own."""
    _check_tensors(teacher, student, copies, momentum)
    chosen = choose_impl(impl, [*teacher, *student, *copies])
    if not teacher:
        return
    if chosen == "triton":
        scalar, on_device = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
        torch.ops.fastdino_kernels.ema_update_(teacher, student, copies, scalar, on_device)
    else:
        plan = Plan(chosen, rest=tuple(range(len(teacher))))
        _run(plan, teacher, student, copies, momentum)


def _make_plan(
    teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], impl: str
) -> Plan:
    chosen = choose_impl(impl, [*teacher, *student, *copies])
    roles = [teacher, student, copies] if copies else [teacher, student]
    flat: list[int] = []
    if chosen == "triton":
        from .ema_triton import CHUNK

        device = teacher[0].device
        groups = enumerate(zip(*roles, strict=True))
        flat = [i for i, group in groups if group[0].device == device and are_flat(group)]
    rest = tuple(sorted(set(range(len(teacher))) - set(flat)))
    if not flat:
        return Plan(chosen, rest=rest)
    table = build_table([[role[i] for i in flat] for role in roles], flat, CHUNK)
    return Plan(chosen, table, rest)


def _run(
    plan: Plan,
    teacher: list[Tensor],
    student: list[Tensor],
    copies: list[Tensor],
    momentum: float | Tensor,
) -> None:
    if plan.table is not None:
        from .ema_triton import launch_ema

        launch_ema(plan.table, momentum)
        # Autograd notices what PyTorch wrote, not what a kernel did.
        torch.autograd.graph.increment_version([*teacher, *copies])
    if not plan.rest:
        return
    teacher, student = [teacher[i] for i in plan.rest], [student[i] for i in plan.rest]
    if plan.impl == "reference":
        _reference_ema_(teacher, student, momentum)
    else:
        torch_ema_(teacher, student, momentum)
    if copies:
        torch._foreach_copy_([copies[i] for i in plan.rest], teacher)


def _ema_op(
    teacher: list[Tensor],
    student: list[Tensor],
    shadow: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    """What a traced graph runs; see the schema below."""
    given = momentum if momentum_tensor is None else momentum_tensor
    _eager_ema_(teacher, student, shadow, given, "triton")


# Not torch.library.custom_op, whose wrappers take longer than the kernel.
_LIBRARY = torch.library.Library("fastdino_kernels", "FRAGMENT")
_LIBRARY.define(
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor(b!)[] shadow, float momentum, "
    "Tensor? momentum_tensor) -> ()"
)
_LIBRARY.impl("ema_update_", _ema_op, "CompositeExplicitAutograd")
torch.library.register_fake("fastdino_kernels::ema_update_", lambda *_: None, lib=_LIBRARY)


def torch_ema_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """ema_update_ of checked tensors by multi-tensor operations."""
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


def _local_parts(
    teacher: list[Tensor], student: list[Tensor], copies: list[Tensor]
) -> tuple[list[Tensor], ...]:
    """This process's part of every DTensor: an elementwise update needs no other."""
    for name, others in (("student_tensors", student), ("shadow", copies)):
        for index, (t, other) in enumerate(zip(teacher, others, strict=False)):
            check_sharded_alike(f"teacher_tensors[{index}]", t, f"{name}[{index}]", other)
    return tuple(list(map(local_part, tensors)) for tensors in (teacher, student, copies))


def _check_momentum(momentum: object) -> float | Tensor:
    if isinstance(momentum, Tensor):
        check_float_tensor("momentum", momentum)
        if momentum.dim() != 0:
            raise ValueError(
                f"momentum must be a float or a 0-d tensor, got shape {tuple(momentum.shape)}"
            )
        return momentum.detach()
    if not is_number(momentum):
        raise TypeError(f"momentum must be a float or a 0-d tensor, got {type(momentum).__name__}")
    assert isinstance(momentum, (int, float))
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    return momentum


def _check_length(name: str, tensors: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(tensors) != len(teacher):
        raise ValueError(
            f"teacher_tensors and {name} must have the same length, "
            f"got {len(teacher)} and {len(tensors)}"
        )


def _check_tensors(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    copies: Sequence[Tensor],
    momentum: float | Tensor,
) -> None:
    for name, others in (("student_tensors", student), ("shadow", copies)):
        for index, (t, other) in enumerate(zip(teacher, others, strict=False)):
            _check_pair(f"teacher_tensors[{index}]", t, f"{name}[{index}]", other)
    for index, t in enumerate(teacher):
        if isinstance(momentum, Tensor) and momentum.device not in (t.device, torch.device("cpu")):
            raise ValueError(
                f"momentum is on {momentum.device} but teacher_tensors[{index}] on {t.device}: "
                "expected one device"
            )


def _check_pair(name_x: str, x: object, name_y: str, y: object) -> None:
    x, y = check_float_tensor(name_x, x), check_float_tensor(name_y, y)
    if x.shape != y.shape:
        raise ValueError(
            f"{name_x} and {name_y} must have the same shape, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.device != y.device:
        raise ValueError(
            f"{name_x} and {name_y} must be on the same device, got {x.device} and {y.device}"
        )
    if x is y:
        raise ValueError(f"{name_x} and {name_y} are the same tensor: expected two")


def _check_memory(
    teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor]
) -> None:
    """Nothing that is written may be in the memory of anything else, whatever its index."""
    lists = (("teacher_tensors", teacher), ("shadow", copies), ("student_tensors", student))
    names = [f"{name}[{index}]" for name, tensors in lists for index in range(len(tensors))]
    tensors, written = [*teacher, *copies, *student], len(teacher) + len(copies)
    for name, tensor in zip(names[:written], tensors, strict=False):
        if overlaps_itself(tensor):
            raise ValueError(
                f"{name} is written: expected a tensor whose elements share no memory, "
                f"got strides {tensor.stride()}"
            )
    overlap = find_overlap(tensors, written)
    if overlap is None:
        return
    x, y = overlap
    if tensors[x].data_ptr() == tensors[y].data_ptr():
        raise ValueError(f"{names[x]} and {names[y]} are the same tensor: expected two")
    raise ValueError(f"{names[x]} and {names[y]} share memory: expected none in common")

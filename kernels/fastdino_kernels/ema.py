"""Exponential moving average of the teacher, for all parameters at once.

In Triton one launch updates the whole network, whatever its dtypes, and writes low-precision copies
in the same pass: 12 bytes per parameter in fp32 (two reads, one write), 14 with a bf16 copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_float_tensor,
    check_lengths,
    check_memory,
    check_range,
    check_same_device,
    check_same_shape,
    check_scalar,
)
from .dispatch import choose_impl
from .dtensor import local_parts
from .operators import LIBRARY, ops, register_fake
from .pointer_table import Plan, are_flat, are_plain, build_table, plan_for


class _Tensors(NamedTuple):
    """Lists of one length; no copies at all is an empty list."""

    teacher: list[Tensor]
    student: list[Tensor]
    copies: list[Tensor]

    def all(self) -> list[Tensor]:
        """Return all tensors, those that are written first."""
        return [*self.teacher, *self.copies, *self.student]

    def pairs(self) -> Iterator[tuple[str, Tensor, str, Tensor]]:
        """Yield (name, teacher, name, other) for each teacher with its student and its copy."""
        for name, others in (("student_tensors", self.student), ("shadow", self.copies)):
            for i, (t, other) in enumerate(zip(self.teacher, others, strict=False)):
                yield f"teacher_tensors[{i}]", t, f"{name}[{i}]", other


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

    Triton needs a pair to be dense with the same strides on both sides (both contiguous, both
    channels_last, both transposed, ...) and on the first pair's device; PyTorch updates the other
    pairs of the same call. Under torch.compile pass a tensor as momentum: a new float causes a
    recompilation. DTensors are updated shard by shard.

    Args:
        teacher_tensors: fp16/bf16/fp32/fp64 tensors of any shape, updated in place.
        student_tensors: as many, of the same shapes and devices; dtypes may differ.
        momentum: in [0, 1]. A float, or a 0-d tensor, whose value is not checked. On an accelerator
            it stays there, and a captured CUDA graph reads it anew. A 0-d fp32 tensor rounds
            1 - momentum (7e-5 relative at .9996); fp64 does not.
        shadow: copies of the teacher, often in lower precision, rewritten in the same call.
        impl: "triton" (one launch; no fp64), "torch" (multi-tensor operations), or "auto".

    Raises:
        ValueError: lengths, shapes or devices that differ, a momentum out of range, or written
            tensors that share memory with another tensor (so no tensor may be listed twice) or
            within themselves; the message has the indices.
        TypeError: an argument that is not a dense floating-point tensor.
        RuntimeError: a CUDA graph is being captured, and no earlier call had tensors on the GPU.

    """
    tensors = _Tensors(
        list(teacher_tensors), list(student_tensors), [] if shadow is None else list(shadow)
    )
    named = dict(zip(("teacher_tensors", "student_tensors", "shadow"), tensors, strict=True))
    check_lengths(named if shadow is not None else dict(list(named.items())[:2]))
    momentum = check_scalar("momentum", momentum)
    check_range("momentum", momentum, most=1)
    if torch.compiler.is_compiling():
        _traceable_ema_(tensors, momentum, impl)
        return
    plain = are_plain(tensors.all())
    if not plain:
        tensors = _Tensors(*local_parts(named))  # type: ignore[arg-type]
        plain = are_plain(tensors.all())
    if (
        tensors.teacher
        and plain
        and not (isinstance(momentum, Tensor) and not are_plain([momentum]))
    ):
        _eager_ema_(tensors, momentum, impl)
    else:
        _traceable_ema_(tensors, momentum, impl)


def _eager_ema_(tensors: _Tensors, momentum: float | Tensor, impl: str) -> None:
    """Update tensors that have memory; their checks are cached with their plan."""
    teacher = tensors.teacher
    if isinstance(momentum, Tensor) and momentum.is_cpu and not teacher[0].is_cpu:
        momentum = momentum.item()  # already on the host: no synchronisation
    device = momentum.device if isinstance(momentum, Tensor) else None
    head = ("ema", impl, choose_impl(impl, teacher[:1]), device, bool(tensors.copies))

    def make() -> Plan:
        _check_tensors(tensors, momentum)
        _check_memory(tensors)
        return _make_plan(tensors, impl)

    _run(plan_for(head, tensors.all(), make), tensors, momentum)


def _traceable_ema_(tensors: _Tensors, momentum: float | Tensor, impl: str) -> None:
    """Update under torch.compile, or tensors without memory of their own."""
    _check_tensors(tensors, momentum)
    chosen = choose_impl(impl, tensors.all())
    if not tensors.teacher:
        return
    if chosen == "triton":
        scalar, on_device = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
        ops.ema_update_(*tensors, scalar, on_device)
    else:
        _run(Plan(chosen, rest=tuple(range(len(tensors.teacher)))), tensors, momentum)


def _make_plan(tensors: _Tensors, impl: str) -> Plan:
    chosen = choose_impl(impl, tensors.all())
    roles = [role for role in tensors if role]
    flat: list[int] = []
    if chosen == "triton":
        from .ema_triton import CHUNK

        device = tensors.teacher[0].device
        groups = enumerate(zip(*roles, strict=True))
        flat = [i for i, group in groups if group[0].device == device and are_flat(group)]
    rest = tuple(sorted(set(range(len(tensors.teacher))) - set(flat)))
    if not flat:
        return Plan(chosen, rest=rest)
    table = build_table([[role[i] for i in flat] for role in roles], flat, CHUNK)
    return Plan(chosen, table, rest)


def _run(plan: Plan, tensors: _Tensors, momentum: float | Tensor) -> None:
    if plan.table is not None:
        from .ema_triton import launch_ema

        launch_ema(plan.table, momentum)
        # Autograd cannot see the writes of a kernel.
        torch.autograd.graph.increment_version([*tensors.teacher, *tensors.copies])
    if not plan.rest:
        return
    teacher, student, copies = ([role[i] for i in plan.rest] if role else [] for role in tensors)
    torch_ema_(teacher, student, momentum)
    if copies:
        torch._foreach_copy_(copies, teacher)


def _ema_op(
    teacher: list[Tensor],
    student: list[Tensor],
    shadow: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    """Run the update of a traced graph; see the schema below."""
    chosen = momentum if momentum_tensor is None else momentum_tensor
    _eager_ema_(_Tensors(teacher, student, shadow), chosen, "triton")


# Not torch.library.custom_op, whose wrappers take longer than the kernel.
LIBRARY.define(
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor(b!)[] shadow, float momentum, "
    "Tensor? momentum_tensor) -> ()"
)
LIBRARY.impl("ema_update_", _ema_op, "CompositeExplicitAutograd")
register_fake("ema_update_", lambda *_: None)


def torch_ema_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """Update checked tensors by multi-tensor operations."""
    # A multi-tensor operation is one launch only if all of its tensors agree.
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
        momentum = momentum.item()  # already on the host: no synchronisation
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


def _check_tensors(tensors: _Tensors, momentum: float | Tensor) -> None:
    for name_x, x, name_y, y in tensors.pairs():
        check_float_tensor(name_x, x)
        check_float_tensor(name_y, y)
        check_same_shape(name_x, x, name_y, y)
        check_same_device(name_x, x, name_y, y)
        if x is y:
            raise ValueError(f"{name_x} and {name_y} are the same tensor: expected two")
    for i, t in enumerate(tensors.teacher):
        if isinstance(momentum, Tensor) and momentum.device not in (t.device, torch.device("cpu")):
            raise ValueError(
                f"momentum is on {momentum.device} but teacher_tensors[{i}] on {t.device}: "
                "expected one device"
            )


def _check_memory(tensors: _Tensors) -> None:
    lists = {"teacher_tensors": tensors.teacher, "shadow": tensors.copies}
    lists["student_tensors"] = tensors.student  # last, because it is only read
    named = [(f"{name}[{i}]", x) for name, some in lists.items() for i, x in enumerate(some)]
    check_memory(named, written=len(tensors.teacher) + len(tensors.copies))

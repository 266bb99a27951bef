"""Arguments of adamw_ema_update_, as all of its implementations use them, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .checks import (
    check_float_tensor,
    check_memory,
    check_range,
    check_same_shape,
    check_scalar,
    is_number,
)
from .clip import check_max_norm
from .pointer_table import Ranges, are_plain, overlaps_ranges

# These divide a part of the kernel's chunk.
UNIT_COLUMNS = tuple(1 << i for i in range(11))


@dataclass(frozen=True)
class Tensors:
    """Lists of one length: the i-th tensors belong to parameter i; None if there is no tensor."""

    parameters: list[Tensor]
    gradients: list[Tensor | None]
    exp_avgs: list[Tensor | None]
    exp_avg_sqs: list[Tensor | None]
    teachers: list[Tensor | None]
    shadows: list[Tensor | None]  # copies of the parameters, in any dtype
    teacher_shadows: list[Tensor | None]

    def named(self) -> dict[str, list[Tensor | None]]:
        """Return the lists by name, which is also the argument's name in the public function."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def take(self, indices: Iterable[int]) -> Tensors:
        """Select the tensors of some parameters."""
        indices = list(indices)
        return Tensors(*([some[i] for i in indices] for some in self.named().values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Group:
    """Hyperparameters of the parameters first, first + 1, ..., first + count - 1."""

    first: int
    count: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float | Tensor


@dataclass(frozen=True)
class Call:
    """The tensors to update and all options. Parameters beyond the last group have no gradient.

    unit_rows: the index of the parameter whose teacher's copy has rows of norm 1, or None.
    steps: fp32 [parameters in the groups]; norms: [as many], or None if they are not needed.
    skip, found_inf, grad_scale, refused_steps: 0-d, see adamw_ema_update_.
    Numbers that are tensors are on the parameters' device.
    """

    tensors: Tensors
    groups: list[Group]
    steps: Tensor
    norms: Tensor | None
    max_norm: float | None
    momentum: float | Tensor
    skip: Tensor | None
    found_inf: Tensor | None
    grad_scale: Tensor | None
    refused_steps: Tensor | None
    unit_rows: int | None = None


def check_hyperparameter(
    name: str, value: object, device: torch.device, most: float = math.inf
) -> float | Tensor:
    """Return a number in [0, most], or a 0-d tensor on the device.

    A 0-d tensor on the CPU becomes a number if the device is another one.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: a number out of range, a tensor of another shape or on another device.
    """
    scalar = check_scalar(name, value)
    if isinstance(scalar, Tensor):
        if scalar.device == device:
            return scalar
        if not scalar.is_cpu:
            raise ValueError(
                f"{name} is on {scalar.device} but the parameters on {device}: expected one device"
            )
        scalar = scalar.item()  # already on the host: no synchronisation
    check_range(name, scalar, most)
    return float(scalar)


def make_group(first: int, count: int, numbers: Mapping[str, Any], device: torch.device) -> Group:
    """Make a group of checked hyperparameters: lr, betas, eps, weight_decay.

    Raises: TypeError, ValueError: as check_hyperparameter; betas that are not two in [0, 1).
    """
    betas, eps = numbers["betas"], numbers["eps"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(map(is_number, betas)):
        raise TypeError(f"betas must be two floats, got {betas!r}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {tuple(betas)}")
    if not is_number(eps):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    return Group(
        first,
        count,
        check_hyperparameter("lr", numbers["lr"], device),
        float(betas[0]),
        float(betas[1]),
        float(check_hyperparameter("eps", eps, device)),
        check_hyperparameter("weight_decay", numbers["weight_decay"], device),
    )


def check_call(call: Call) -> None:
    """Check all arguments but the lists of tensors, whose checks are cached with the plan.

    Raises: TypeError, ValueError: the message has the argument's name.
    """
    device = call.tensors.parameters[0].device
    count = sum(group.count for group in call.groups)
    if call.max_norm is not None:
        check_max_norm(call.max_norm)
    for name, tensor in (("steps", call.steps), ("norms", call.norms)):
        if tensor is None:
            continue
        if check_float_tensor(name, tensor).shape != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {tuple(tensor.shape)}")
        _check_device(name, tensor, device)
    if call.steps.dtype != torch.float32 or not call.steps.is_contiguous():
        raise ValueError(
            f"steps must be contiguous fp32, got {call.steps.dtype}, strides {call.steps.stride()}"
        )
    for name in ("skip", "found_inf", "grad_scale", "refused_steps"):
        tensor = getattr(call, name)
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 0:
            raise ValueError(f"{name} must be a 0-d tensor, got shape {tuple(tensor.shape)}")
        _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} but parameters[0] on {device}: expected one device"
        )


def check_unit_rows(tensors: Tensors, index: int | None) -> None:
    """Raise ValueError unless each program of the kernel has whole rows of the normalised copy."""
    if index is None:
        return
    if not 0 <= index < len(tensors.parameters):
        raise ValueError(f"unit_rows must be the index of a parameter, got {index}")
    p = tensors.parameters[index]
    columns = p.shape[-1] if p.dim() == 2 else 0
    if columns not in UNIT_COLUMNS or not p.is_contiguous() or not are_plain([p]):
        raise ValueError(
            f"unit_rows: expected parameters[{index}] to be a contiguous tensor [K, D] that is not "
            f"sharded, D a power of two up to {UNIT_COLUMNS[-1]}, got {tuple(p.shape)}, "
            f"strides {p.stride()}"
        )
    if tensors.teacher_shadows[index] is None:
        raise ValueError(f"unit_rows is given: expected teacher_shadows[{index}]")


def check_state(tensors: Tensors) -> None:
    """Check types, shapes, devices and memory of all tensors but the gradients.

    Raises: TypeError, ValueError: the message has the tensors' names.
    """
    device = check_float_tensor("parameters[0]", tensors.parameters[0]).device
    named = tensors.named()
    for i, belonging in enumerate(zip(*named.values(), strict=True)):
        p = check_float_tensor(f"parameters[{i}]", belonging[0])
        for name, tensor in zip(named, belonging, strict=True):
            if name != "gradients" and tensor is not None:
                _check_fits(i, name, tensor, p, device)
        _, _, exp_avg, exp_avg_sq, teacher, _, teacher_shadow = belonging
        if (exp_avg is None) != (exp_avg_sq is None):
            raise ValueError(f"exp_avgs[{i}] and exp_avg_sqs[{i}]: expected both or none")
        if teacher_shadow is not None and teacher is None:
            raise ValueError(f"teacher_shadows[{i}] is given: expected teachers[{i}]")
    _check_memory(replace(tensors, gradients=[None] * len(tensors.parameters)))


def check_gradients(tensors: Tensors, written: Ranges) -> None:
    """Check the gradients, after check_state has checked all other tensors.

    Args:
        tensors: of the call.
        written: memory of all tensors but the gradients.

    Raises: as check_state.
    """
    device = tensors.parameters[0].device
    for i, (p, gradient) in enumerate(zip(tensors.parameters, tensors.gradients, strict=True)):
        if gradient is None:
            continue
        _check_fits(i, "gradients", gradient, p, device)
        if tensors.exp_avgs[i] is None:
            raise ValueError(
                f"gradients[{i}] is given: expected exp_avgs[{i}] and exp_avg_sqs[{i}]"
            )
        if overlaps_ranges(gradient, written):
            _check_memory(tensors)


def _check_fits(i: int, name: str, tensor: Tensor, p: Tensor, device: torch.device) -> None:
    check_float_tensor(f"{name}[{i}]", tensor)
    check_same_shape(f"parameters[{i}]", p, f"{name}[{i}]", tensor)
    _check_device(f"{name}[{i}]", tensor, device)


def _check_memory(tensors: Tensors) -> None:
    lists = tensors.named()
    lists["gradients"] = lists.pop("gradients")  # last, because they are only read
    named = [
        (f"{name}[{i}]", tensor)
        for name, some in lists.items()
        for i, tensor in enumerate(some)
        if tensor is not None
    ]
    read = sum(gradient is not None for gradient in tensors.gradients)
    check_memory(named, written=len(named) - read)

"""What one call of adamw_ema_update_ works on, for all of its implementations; and its checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .clip import check_max_norm
from .dispatch import check_float_tensor, is_number
from .pointer_table import Ranges, are_plain, find_overlap, lies_in, overlaps_itself

# What divides a part of the kernel's chunk.
UNIT_COLUMNS = tuple(1 << i for i in range(11))


@dataclass(frozen=True)
class Tensors:
    """Lists of one length: the i-th of each belong to one parameter; None: there is none."""

    parameters: list[Tensor]
    gradients: list[Tensor | None]
    exp_avgs: list[Tensor | None]
    exp_avg_sqs: list[Tensor | None]
    teachers: list[Tensor | None]
    shadows: list[Tensor | None]  # copies of the parameters, in any dtype
    teacher_shadows: list[Tensor | None]

    def names(self) -> list[str]:
        """The lists' names, which the public function's arguments have too."""
        return [field.name for field in fields(self)]

    def lists(self) -> list[list[Tensor | None]]:
        """The lists, in the order of their names."""
        return [getattr(self, name) for name in self.names()]

    def take(self, indices: Iterable[int]) -> Tensors:
        """What belongs to these parameters."""
        indices = list(indices)
        return Tensors(*([tensors[i] for i in indices] for tensors in self.lists()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Group:
    """The hyperparameters of parameters first, first + 1, ..., first + count - 1."""

    first: int
    count: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float | Tensor


@dataclass(frozen=True)
class Call:
    """All that is updated, and by what. Parameters beyond the last group have no gradient.

    unit_rows: the index of the parameter whose teacher's copy has rows of norm 1, or None.
    steps: fp32 [those in the groups]; norms: [as many], or None where nothing needs them.
    skip, found_inf, grad_scale, refused_steps: 0-d, see adamw_ema_update_.
    A number that is a tensor is on the parameters' device.
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
    """`value` itself, a number in [0, most] or a 0-d tensor; a number if it is on the host.

    Raises:
        TypeError: something else.
        ValueError: a number out of range, a tensor of another shape or on another device.
    """
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        if value.dim() != 0:
            raise ValueError(
                f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}"
            )
        if value.device == device:
            return value.detach()
        if not value.is_cpu:
            raise ValueError(
                f"{name} is on {value.device} but the parameters on {device}: expected one device"
            )
        value = value.item()  # it is on the host: nothing waits
    if not is_number(value):
        raise TypeError(f"{name} must be a float or a 0-d tensor, got {type(value).__name__}")
    assert isinstance(value, (int, float))
    if not 0 <= value <= most:
        expected = ">= 0" if math.isinf(most) else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return float(value)


def make_group(
    first: int,
    count: int,
    lr: object,
    betas: object,
    eps: object,
    weight_decay: object,
    device: torch.device,
) -> Group:
    """A group of checked hyperparameters; betas and eps are numbers.

    Raises: TypeError, ValueError: as check_hyperparameter; betas that are not two in [0, 1).
    """
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(map(is_number, betas)):
        raise TypeError(f"betas must be two floats, got {betas!r}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {tuple(betas)}")
    if not is_number(eps):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    return Group(
        first,
        count,
        check_hyperparameter("lr", lr, device),
        float(betas[0]),
        float(betas[1]),
        float(check_hyperparameter("eps", eps, device)),
        check_hyperparameter("weight_decay", weight_decay, device),
    )


def check_call(call: Call) -> None:
    """What is not remembered with the plan of a call: everything but its lists of tensors.

    Raises: TypeError, ValueError: the message names the argument.
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
    """Raises ValueError unless each program of the kernel has whole rows of what is normalised."""
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


def check_lengths(tensors: Tensors) -> None:
    """ValueError unless all lists are of one length."""
    n = len(tensors.parameters)
    for name, some in zip(tensors.names(), tensors.lists(), strict=True):
        if len(some) != n:
            raise ValueError(
                f"parameters and {name} must have the same length, got {n} and {len(some)}"
            )


def check_state(tensors: Tensors) -> None:
    """All but the gradients: types, shapes, devices, and that none is in another's memory.

    Raises: TypeError, ValueError: the message names the tensors.
    """
    device = check_float_tensor("parameters[0]", tensors.parameters[0]).device
    names = tensors.names()
    for i, belonging in enumerate(zip(*tensors.lists(), strict=True)):
        p = check_float_tensor(f"parameters[{i}]", belonging[0])
        for name, tensor in zip(names, belonging, strict=True):
            if name != "gradients" and tensor is not None:
                _check_fits(i, name, tensor, p, device)
        _, _, exp_avg, exp_avg_sq, teacher, _, teacher_shadow = belonging
        if (exp_avg is None) != (exp_avg_sq is None):
            raise ValueError(f"exp_avgs[{i}] and exp_avg_sqs[{i}]: expected both or none")
        if teacher_shadow is not None and teacher is None:
            raise ValueError(f"teacher_shadows[{i}] is given: expected teachers[{i}]")
    _check_memory(replace(tensors, gradients=[None] * len(tensors.parameters)))


def check_gradients(tensors: Tensors, written: Ranges) -> None:
    """The gradients, of parameters that check_state has passed.

    Args:
        tensors: of the call.
        written: where all but the gradients lie.

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
        if lies_in(gradient, written):
            _check_memory(tensors)


def _check_fits(i: int, name: str, tensor: Tensor, p: Tensor, device: torch.device) -> None:
    check_float_tensor(f"{name}[{i}]", tensor)
    if tensor.shape != p.shape:
        raise ValueError(
            f"parameters[{i}] and {name}[{i}] must have the same shape, "
            f"got {tuple(p.shape)} and {tuple(tensor.shape)}"
        )
    _check_device(f"{name}[{i}]", tensor, device)


def _check_memory(tensors: Tensors) -> None:
    """Nothing that is written may be in the memory of anything else, whatever its index."""
    named = [
        (name == "gradients", f"{name}[{i}]", tensor)
        for name, some in zip(tensors.names(), tensors.lists(), strict=True)
        for i, tensor in enumerate(some)
        if tensor is not None
    ]
    named.sort(key=lambda item: item[0])  # what is only read comes last
    written = sum(not read for read, _, _ in named)
    for _, name, tensor in named[:written]:
        if overlaps_itself(tensor):
            raise ValueError(
                f"{name} is written: expected a tensor whose elements share no memory, "
                f"got strides {tensor.stride()}"
            )
    overlap = find_overlap([tensor for _, _, tensor in named], written)
    if overlap is not None:
        x, y = (named[index][1] for index in overlap)
        raise ValueError(f"{x} and {y} share memory: expected none in common")

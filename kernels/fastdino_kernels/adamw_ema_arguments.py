"""Arguments of adamw_ema_update_, as all of its implementations use them, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_number, check_range, check_same_device, check_scalar
from .memory import Ranges
from .tensor_lists import Lists, Some, are_plain, check_lists, check_no_overlap, holes, present

# Columns of a parameter whose teacher's copy is normalised: they divide a part of a chunk.
UNIT_COLUMNS = tuple(1 << i for i in range(11))


# The lists of a call, by the names of the public function; gradients last, as they are only read.
LISTS = (
    "parameters",
    "exp_avgs",
    "exp_avg_sqs",
    "teachers",
    "shadows",
    "teacher_shadows",
    "gradients",
)


@dataclass(frozen=True)
class Group:
    """Hyperparameters of the next `count` parameters."""

    count: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float | Tensor


@dataclass(frozen=True)
class Call:
    """The tensors to update and all options, as in adamw_ema_update_.

    lists: LISTS, of one length, None for a missing tensor. Parameters beyond the groups have no
        gradient.
    steps: one count [] for each parameter in the groups, None without moments.
    Numbers that are tensors are on the parameters' device.
    """

    lists: Lists
    steps: Some
    groups: list[Group]
    max_norm: float | None
    each: bool
    momentum: float | Tensor
    norms: Tensor | None = None
    skip: Tensor | None = None
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    refused_steps: Tensor | None = None
    unit_rows: int | None = None

    @property
    def needs_norms(self) -> bool:
        """Return True if the norms have to be measured."""
        return self.norms is None and not (self.max_norm is None and self.refused_steps is None)


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


def make_group(count: int, numbers: Mapping[str, Any], device: torch.device) -> Group:
    """Make a group of checked hyperparameters: lr, betas, eps, weight_decay.

    Raises: TypeError, ValueError: as check_hyperparameter; betas that are not two in [0, 1).
    """
    betas, eps = numbers["betas"], numbers["eps"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"betas must be two floats, got {betas!r}")
    beta1, beta2 = (_host_number(f"betas[{i}]", beta) for i, beta in enumerate(betas))
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be in [0, 1), got {tuple(betas)}")
    return Group(
        count,
        check_hyperparameter("lr", numbers["lr"], device),
        beta1,
        beta2,
        float(check_hyperparameter("eps", check_number("eps", eps), device)),
        check_hyperparameter("weight_decay", numbers["weight_decay"], device),
    )


def _host_number(name: str, value: object) -> float:
    """Return a number, given as such or as a tensor of one element on the CPU."""
    if isinstance(value, Tensor):
        if not value.is_cpu or value.numel() != 1:
            raise ValueError(
                f"{name} must be a float, or a tensor of one element on the CPU, got shape "
                f"{tuple(value.shape)} on {value.device}"
            )
        return float(value)
    return check_number(name, value)


def is_each(clip: object) -> bool:
    """Return True for "each", False for "all"; raise ValueError for anything else."""
    if clip not in ("each", "all"):
        raise ValueError(f"clip must be 'each' or 'all', got {clip!r}")
    return clip == "each"


def check_options(call: Call) -> None:
    """Check all but the lists and the groups.

    Raises: TypeError, ValueError: the message has the argument's name.
    """
    parameter = call.lists["parameters"][0]
    assert parameter is not None
    shapes = {"norms": (len(call.steps),) if call.each else ()}
    for name in ("norms", "skip", "found_inf", "grad_scale", "refused_steps"):
        tensor, shape = getattr(call, name), shapes.get(name, ())
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        check_same_device("parameters[0]", parameter, name, tensor)


def check_state(call: Call, local: Lists) -> None:
    """Check all tensors but those of the options.

    Raises: TypeError, ValueError: the message has the tensors' names.
    """
    check_lists(local)
    parameters, exp_avgs, exp_avg_sqs, teachers, _, copies, _ = local.values()
    first = parameters[0]
    assert first is not None
    for i, parameter in enumerate(parameters):
        assert parameter is not None
        check_same_device("parameters[0]", first, f"parameters[{i}]", parameter)
        if (exp_avgs[i] is None) != (exp_avg_sqs[i] is None):
            raise ValueError(f"exp_avgs[{i}] and exp_avg_sqs[{i}]: expected both or none")
        if copies[i] is not None and teachers[i] is None:
            raise ValueError(f"teacher_shadows[{i}] is given: expected teachers[{i}]")
    for i, step in enumerate(call.steps):
        if step is not None and (step.shape, step.dtype) != ((), torch.float32):
            raise ValueError(f"steps[{i}] must be fp32 [], got {step.dtype} {tuple(step.shape)}")
        if step is not None:
            check_same_device("parameters[0]", first, f"steps[{i}]", step)
    _check_unit_rows(call)
    check_no_overlap(local, len(local) - 1)


def check_gradients(local: Lists, memory: Ranges) -> None:
    """Check the gradients, given the memory of all other tensors, which are checked."""
    parameters, exp_avgs, *_, gradients = local.values()
    check_lists({"parameters": parameters, "gradients": gradients})
    for i in holes(exp_avgs):
        if gradients[i] is not None:
            raise ValueError(
                f"gradients[{i}] is given: expected exp_avgs[{i}] and exp_avg_sqs[{i}]"
            )
    if any(map(memory.meet, present([gradients]))):
        check_no_overlap(local, len(local) - 1)


def _check_unit_rows(call: Call) -> None:
    """Raise ValueError unless each program of the kernel has whole rows of the normalised copy."""
    index, parameters = call.unit_rows, call.lists["parameters"]
    if index is None:
        return
    if not 0 <= index < len(parameters):
        raise ValueError(f"unit_rows must be the index of a parameter, got {index}")
    p = parameters[index]
    assert p is not None
    columns = p.shape[-1] if p.dim() == 2 else 0
    if columns not in UNIT_COLUMNS or not p.is_contiguous() or not are_plain([[p]]):
        raise ValueError(
            f"unit_rows: expected parameters[{index}] to be a contiguous tensor [K, D] that is not "
            f"sharded, D a power of two up to {UNIT_COLUMNS[-1]}, got {tuple(p.shape)}, "
            f"strides {p.stride()}"
        )
    if call.lists["teacher_shadows"][index] is None:
        raise ValueError(f"unit_rows is given: expected teacher_shadows[{index}]")

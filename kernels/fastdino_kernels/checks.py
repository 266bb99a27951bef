"""Argument checks shared by the public functions."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .memory import find_overlap, overlaps_itself
from .operators import needs_dispatcher

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_float_tensor(name: str, tensor: object) -> Tensor:
    """Return `tensor`; raise TypeError unless it is a dense fp16, bf16, fp32 or fp64 tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    return tensor


def is_number(value: object) -> bool:
    """Return True for a real number, not a bool.

    NumPy's scalars count, and the symbolic numbers of torch.compile.
    """
    if isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real)


def check_number(name: str, value: object, expected: str = "a float") -> float:
    """Return a real number as Python's own type; raise TypeError if it is something else."""
    if not is_number(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if isinstance(value, (torch.SymFloat, torch.SymInt)) or type(value) in (int, float):
        return value  # type: ignore[return-value]
    return float(value)  # type: ignore[arg-type]


def check_integer(name: str, value: object) -> int:
    """Return an integer, not a bool, as Python's own type; raise TypeError otherwise."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def check_scalar(name: str, value: object) -> float | Tensor:
    """Return a number, or a 0-d floating-point tensor without its graph.

    Raises: TypeError, ValueError: `value` is something else; `name` is the argument's name.
    """
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        if value.dim() != 0:
            raise ValueError(
                f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}"
            )
        return value.detach()
    return check_number(name, value, "a float or a 0-d tensor")


def check_positive(name: str, value: object) -> float:
    """Return a number that is > 0 and finite; raise ValueError or TypeError otherwise."""
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {number}")
    return number


def check_range(name: str, value: float | Tensor, most: float = math.inf) -> None:
    """Raise ValueError for a number outside [0, most]; the values of tensors are not read."""
    if not isinstance(value, Tensor) and not 0 <= value <= most:
        expected = ">= 0" if math.isinf(most) else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_temperature(
    name: str, value: object, dtype: torch.dtype, device: torch.device
) -> float | Tensor:
    """Return a number > 0, or a 0-d tensor of `dtype` on `device`, whose value is not read.

    Raises: TypeError, ValueError: `value` is something else.
    """
    temp = check_scalar(name, value)
    if isinstance(temp, Tensor):
        if temp.device != device:
            raise ValueError(f"{name} must be on {device} like the logits, got {temp.device}")
        return temp.to(dtype)
    temp = check_positive(name, temp)
    if torch.compiler.is_compiling():
        # Each new float argument of an operator would be compiled anew.
        return torch.ones((), dtype=dtype, device=device) * temp
    return temp


def check_denominator(
    value: object, dtype: torch.dtype, device: torch.device
) -> float | Tensor | None:
    """Return a number > 0, a 0-d tensor of `dtype` on `device`, or None, the default.

    A tensor may be of integers, such as a count, and its value is not read.

    Raises: TypeError, ValueError: `value` is something else.
    """
    if value is None:
        return None
    if isinstance(value, Tensor) and value.dtype in INTEGER_DTYPES:
        value = value.to(dtype)
    return check_temperature("denominator", value, dtype, device)


def check_row_weights(
    weights: object, shapes: Mapping[str, tuple[int, ...]], like: Tensor
) -> Tensor | None:
    """Return the weights [S, B] of rows, without their graph; None if there are none.

    Their sign is checked on a CPU only: on a GPU the host would have to wait for it.

    Args:
        weights: a floating-point tensor of one of the shapes, or None.
        shapes: name and value of each allowed shape; the last one's size is that of the rows.
        like: the logits, on whose device the weights must be.

    Raises: TypeError, ValueError: `weights` is something else.
    """
    if weights is None:
        return None
    weights = check_float_tensor("weights", weights).detach()
    if weights.shape not in shapes.values():
        expected = " or ".join(f"{name} = {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"weights must be {expected}, got shape {list(weights.shape)}")
    check_same_device("weights", weights, "student", like)
    if weights.device.type == "cpu" and not needs_dispatcher([weights]) and weights.numel() > 0:
        smallest = weights.min().item()
        if smallest < 0:
            raise ValueError(f"weights must be >= 0, got {smallest:g}")
    return weights


def check_lengths(named: Mapping[str, Sequence[object]]) -> None:
    """Raise ValueError unless all lists have the length of the first one."""
    (first, reference), *others = named.items()
    for name, tensors in others:
        if len(tensors) != len(reference):
            raise ValueError(
                f"{first} and {name} must have the same length, "
                f"got {len(reference)} and {len(tensors)}"
            )


def check_same_shape(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """Raise ValueError unless two tensors have the same shape."""
    if x.shape != y.shape:
        raise ValueError(
            f"{name_x} and {name_y} must have the same shape, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )


def check_same_device(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """Raise ValueError unless two tensors are on the same device."""
    if x.device != y.device:
        raise ValueError(
            f"{name_x} and {name_y} must be on the same device, got {x.device} and {y.device}"
        )


def check_center(center: object, teacher: Tensor) -> None:
    """Raise TypeError or ValueError unless `center` fits the teacher's logits [..., K]."""
    center = check_float_tensor("center", center)
    prototypes = teacher.shape[-1]
    if center.dim() not in (1, 2) or center.shape[-1] != prototypes or center.numel() != prototypes:
        raise ValueError(
            f"center must be [K] or [1, K] with K = {prototypes}, got shape {tuple(center.shape)}"
        )
    check_same_device("center", center, "teacher", teacher)


def check_inplace_backward(name: str, student: Tensor, other: Tensor) -> None:
    """Raise ValueError if writing over the student's logits would change other values as well."""
    if torch.compiler.is_compiling():  # traced tensors have no address
        return
    if student.is_neg():
        raise ValueError(
            "inplace_backward writes over the student's logits: expected a tensor of its own, got "
            "a negative view; call resolve_neg() first"
        )
    if overlaps_itself(student):
        raise ValueError(
            "inplace_backward writes over the student's logits: expected a tensor whose elements "
            f"share no memory, got strides {student.stride()}"
        )
    if student.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0:
        raise ValueError(
            "inplace_backward writes over the student's logits: expected them in memory of their "
            f"own, got student and {name} in the same storage"
        )


def check_memory(named: Sequence[tuple[str, Tensor]], written: int) -> None:
    """Raise ValueError if writing to some tensors would change other values as well.

    Args:
        named: (name, tensor) of all tensors, those that are written first.
        written: number of tensors that are written.
    """
    for name, tensor in named[:written]:
        if tensor.is_neg():
            raise ValueError(
                f"{name} is written: expected no negative view, as conj().imag, got one; write to "
                "tensor.resolve_neg()"
            )
        if overlaps_itself(tensor):
            raise ValueError(
                f"{name} is written: expected a tensor whose elements share no memory, "
                f"got strides {tensor.stride()}"
            )
    overlap = find_overlap([tensor for _, tensor in named], written)
    if overlap is not None:
        x, y = (named[index][0] for index in overlap)
        raise ValueError(f"{x} and {y} share memory: expected none in common")

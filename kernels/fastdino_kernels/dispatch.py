"""Choosing the implementation of a kernel, and the checks that every public function shares."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Sequence

import torch

from .pointer_table import overlaps_itself

ENVIRONMENT_VARIABLE = "FASTDINO_KERNELS"
IMPLS = ("auto", "triton", "torch", "reference")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.compiler.assume_constant_result
def _environment_default() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _compiler_problem() -> str | None:
    if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))):
        return None
    return "Triton needs a C compiler: gcc, clang, or what the environment variable CC names"


@torch.compiler.assume_constant_result
def triton_problem(device_type: str) -> str | None:
    """Why Triton's kernels cannot run on tensors of this device type; None where they can."""
    if not _has_triton():
        return "triton is not installed"
    if device_type == "cpu" and _triton_interprets():
        return None
    if device_type == "cuda":
        return _compiler_problem()
    return f"Triton needs CUDA tensors (or, on a CPU, TRITON_INTERPRET=1), got {device_type}"


def choose_impl(impl: str, tensors: Sequence[torch.Tensor]) -> str:
    """Name of the implementation to run on `tensors`: "triton", "torch" or "reference".

    Args:
        impl: what the caller asked for; "auto" defers to the environment variable
            FASTDINO_KERNELS, and where that is unset or "auto" too, takes Triton on CUDA tensors
            of at most 32 bits and vectorised PyTorch for all others.
        tensors: what the kernel will read and write.

    Raises: ValueError: a name that does not exist, or Triton asked for where it cannot run.

    """
    asked, source = impl, "impl"
    if impl == "auto":
        asked, source = _environment_default(), ENVIRONMENT_VARIABLE
    if asked not in IMPLS:
        allowed = ", ".join(repr(name) for name in IMPLS)
        raise ValueError(f"{source} must be one of {allowed}, got {asked!r}")
    if asked not in ("auto", "triton"):
        return asked
    problem = _triton_problem(tensors)
    if asked == "auto":
        # bool() of a tuple is what older PyTorch cannot trace.
        on_gpu = len(tensors) > 0 and tensors[0].device.type == "cuda"
        return "triton" if on_gpu and problem is None else "torch"
    if problem is not None:
        raise ValueError(f"{source}='triton': {problem}; use 'torch' or 'auto'")
    return "triton"


def _triton_problem(tensors: Sequence[torch.Tensor]) -> str | None:
    for device_type in {tensor.device.type for tensor in tensors}:
        if (problem := triton_problem(device_type)) is not None:
            return problem
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "the kernels compute in fp32, got a tensor of torch.float64"
    return None


def chosen_impl(device: torch.device | str = "cpu") -> str:
    """Name of the implementation that impl="auto" runs on a device, for a line of a log."""
    return choose_impl("auto", [torch.empty(0, device=device)])


def check_float_tensor(name: str, tensor: object) -> torch.Tensor:
    """`tensor` itself; TypeError unless it is a dense fp16, bf16, fp32 or fp64 tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    return tensor


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 where any tensor is fp64, else fp32: half precision is only ever stored."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def is_number(value: object) -> bool:
    """A real number that is not a bool; a number that torch.compile traces counts too."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float, torch.SymFloat, torch.SymInt))


def check_temperature(
    name: str, value: object, dtype: torch.dtype, device: torch.device
) -> float | torch.Tensor:
    """A float > 0, or a 0-d tensor of `dtype` on `device`, whose value nobody waits for."""
    if isinstance(value, torch.Tensor):
        check_float_tensor(name, value)
        if value.dim() != 0:
            raise ValueError(
                f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on {device} like the logits, got {value.device}")
        return value.detach().to(dtype)
    if not is_number(value):
        raise TypeError(f"{name} must be a float or a 0-d tensor, got {type(value).__name__}")
    assert isinstance(value, (int, float))
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if torch.compiler.is_compiling():
        # As an argument of an operator, each new float would be compiled anew.
        return torch.ones((), dtype=dtype, device=device) * value
    return value


def check_inplace_backward(name: str, student: torch.Tensor, other: torch.Tensor) -> None:
    """ValueError where writing over the student's logits would change something else as well."""
    if torch.compiler.is_compiling():  # traced tensors have no address
        return
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


def pair_count(student_crops: int, teacher_crops: int, ignore_diagonal: bool) -> int:
    """Pairs of a student crop and a teacher crop, without those of a crop with itself."""
    own = min(student_crops, teacher_crops) if ignore_diagonal else 0
    return student_crops * teacher_crops - own


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)

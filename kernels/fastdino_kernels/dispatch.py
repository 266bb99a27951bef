"""Choosing the implementation of a kernel, and the checks that every public function shares."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

ENVIRONMENT_VARIABLE = "FASTDINO_KERNELS"
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.compiler.assume_constant_result
def _environment_default() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"


def choose_impl(impl: str, available: Sequence[str], automatic: str) -> str:
    """Name of the implementation to run.

    Args:
        impl: what the caller asked for; "auto" defers to the environment variable
            FASTDINO_KERNELS, and where that is unset or "auto" too, to `automatic`.
        available: the implementations that this function has, without "auto".
        automatic: the best of them for the caller's tensors.

    Raises: ValueError: a name that is neither "auto" nor available.

    """
    asked, source = impl, "impl"
    if impl == "auto":
        asked, source = _environment_default(), ENVIRONMENT_VARIABLE
    if asked == "auto":
        return automatic
    if asked not in available:
        allowed = ", ".join(repr(name) for name in ("auto", *available))
        raise ValueError(f"{source} must be one of {allowed}, got {asked!r}")
    return asked


def chosen_impl() -> str:
    """Name of the implementation that impl="auto" runs, for a line of a log."""
    return choose_impl("auto", ("torch", "reference"), automatic="torch")


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

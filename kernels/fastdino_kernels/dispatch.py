"""Selection of a kernel's implementation: Triton or vectorised PyTorch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "FASTDINO_KERNELS"
IMPLS = ("auto", "triton", "torch")


@torch.compiler.assume_constant_result
def _environment_default() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def triton_interprets() -> bool:
    """Return True if TRITON_INTERPRET=1 runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _compiler_problem() -> str | None:
    if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))):
        return None
    return "Triton needs a C compiler: install gcc or clang, or set the environment variable CC"


@torch.compiler.assume_constant_result
def triton_problem(device_type: str) -> str | None:
    """Return why Triton's kernels cannot run on a device type, or None if they can."""
    if not _has_triton():
        return "triton is not installed"
    if device_type == "cpu" and triton_interprets():
        return None
    if device_type == "cuda":
        return _compiler_problem()
    return f"Triton needs CUDA tensors (or, on a CPU, TRITON_INTERPRET=1), got {device_type}"


def backend_options(*, maxnreg: int) -> dict[str, int]:
    """Return those of the compiler's options that the active Triton backend has.

    An option that a backend does not have makes each launch fail.

    Args:
        maxnreg: most registers per thread; NVIDIA's backend has it, AMD's does not.
    """
    if triton_interprets():
        return {}
    driver = importlib.import_module("triton.runtime.driver").driver.active
    return {"maxnreg": maxnreg} if "maxnreg" in _option_names(driver) else {}


@functools.lru_cache(maxsize=8)
def _option_names(driver: Any) -> frozenset[str]:
    """Return the names of the compiler options of a driver's backend."""
    backend = importlib.import_module("triton.compiler").make_backend(driver.get_current_target())
    return frozenset(vars(backend.parse_options({})))


def choose_impl(impl: str, tensors: Sequence[torch.Tensor]) -> str:
    """Return the implementation to run on `tensors`: "triton" or "torch".

    Args:
        impl: "auto", "triton" or "torch". "auto" reads the environment variable FASTDINO_KERNELS.
            If that is unset or "auto" too, CUDA tensors of at most 32 bits use Triton and all
            others use PyTorch.
        tensors: all tensors that the kernel will read and write.

    Raises: ValueError: an unknown name, or Triton was requested and cannot run.

    """
    requested, source = impl, "impl"
    if impl == "auto":
        requested, source = _environment_default(), ENVIRONMENT_VARIABLE
    if requested not in IMPLS:
        allowed = ", ".join(repr(name) for name in IMPLS)
        raise ValueError(f"{source} must be one of {allowed}, got {requested!r}")
    if requested == "torch":
        return requested
    problem = _triton_problem(tensors)
    if requested == "auto":
        # Older PyTorch cannot trace bool() of a tuple.
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
    """Return the implementation that impl="auto" selects on a device."""
    return choose_impl("auto", [torch.empty(0, device=device)])


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return fp64 if any tensor is fp64, else fp32: half precision is only a storage format."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current device, on which Triton launches."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)

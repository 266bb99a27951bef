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
# The oldest GPUs that Triton's documentation lists (Ampere). Its compiler does not check this.
OLDEST_CAPABILITY = (8, 0)


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
def toolchain_problem() -> str | None:
    """Return why Triton cannot compile for any GPU, or None if it can."""
    return _compiler_problem() if _has_triton() else "triton is not installed"


@functools.cache
def _capability_problem(device: torch.device) -> str | None:
    # Without a GPU, "cuda" is a fake tensor's device, or a question about other machines.
    if torch.version.hip or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    oldest, got = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
    return f"Triton supports GPUs of compute capability {oldest} or newer, this one has {got}"


@torch.compiler.assume_constant_result
def triton_problem(device: torch.device | str) -> str | None:
    """Return why Triton's kernels cannot run on a device, or None if they can."""
    device = torch.device(device)
    if not _has_triton():
        return toolchain_problem()
    if device.type == "cpu" and triton_interprets():
        return None
    if device.type == "cuda":
        return toolchain_problem() or _capability_problem(device)
    return f"Triton needs CUDA tensors (or, on a CPU, TRITON_INTERPRET=1), got {device.type}"


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
            If that is unset or "auto" too, CUDA tensors of at most 32 bits use Triton if the GPU
            supports it, and all others use PyTorch.
        tensors: all tensors that the kernel will read and write.

    Raises: ValueError: an unknown name, or Triton was requested and cannot run.

    """
    requested, source = _requested(impl)
    if requested == "torch":
        return requested
    # Older PyTorch cannot trace bool() of a tuple.
    on_gpu = len(tensors) > 0 and tensors[0].device.type == "cuda"
    return _resolve(requested, source, on_gpu, _triton_problem(tensors))


def explain_impl(device: torch.device | str) -> tuple[str, str]:
    """Return the implementation that impl="auto" selects on a device, and the reason.

    Raises: ValueError: as choose_impl, for the value of FASTDINO_KERNELS.
    """
    device = torch.device(device)
    requested, source = _requested("auto")
    problem = triton_problem(device)
    if requested != "auto":
        return _resolve(requested, source, False, problem), f"{source}={requested}"
    chosen = _resolve(requested, source, device.type == "cuda", problem)
    if chosen == "torch" and device.type != "cpu":
        assert problem is not None
        return chosen, problem
    return chosen, f"the default on a {'CPU' if device.type == 'cpu' else 'GPU'}"


def chosen_impl(device: torch.device | str = "cpu") -> str:
    """Return the implementation that impl="auto" selects on a device."""
    return explain_impl(device)[0]


def _requested(impl: str) -> tuple[str, str]:
    """Return the requested implementation and the name of the setting that requests it."""
    requested, source = impl, "impl"
    if impl == "auto":
        requested, source = _environment_default(), ENVIRONMENT_VARIABLE
    if requested not in IMPLS:
        allowed = ", ".join(repr(name) for name in IMPLS)
        raise ValueError(f"{source} must be one of {allowed}, got {requested!r}")
    return requested, source


def _resolve(requested: str, source: str, on_gpu: bool, problem: str | None) -> str:
    if requested == "torch" or (requested == "auto" and (problem or not on_gpu)):
        return "torch"
    if problem is not None:
        raise ValueError(f"{source}='triton': {problem}; use 'torch' or 'auto'")
    return "triton"


def _triton_problem(tensors: Sequence[torch.Tensor]) -> str | None:
    for device in {tensor.device for tensor in tensors}:
        if (problem := triton_problem(device)) is not None:
            return problem
    if torch.float64 in [tensor.dtype for tensor in tensors]:
        return "the kernels compute in fp32, got a tensor of torch.float64"
    return None


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return fp64 if any tensor is fp64, else fp32: half precision is only a storage format."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the enclosing autocast region, None outside of one."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Disable autocast: operations compute in the dtypes that they are given.

    torch.autocast itself refuses devices without autocast, such as "meta".
    """
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current device, on which Triton launches."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)

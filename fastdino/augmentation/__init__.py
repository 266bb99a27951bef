"""Multi-crop augmentation: random crop parameters and the backends that apply them."""

from __future__ import annotations

import importlib

import torch
from fastdino_kernels.dispatch import triton_problem


def fused_problem(device: torch.device | str) -> str | None:
    """Return why the fused crops are unavailable on this device, or None if they work."""
    if torch.device(device).type == "cuda":
        problem = triton_problem(device)
        return problem and f"no fused crops on CUDA: {problem}"
    return _import_problem("cpu", "Numba", "numba", 'pip install "fastdino[train]"')


def dali_problem(device: torch.device | str = "cpu") -> str | None:
    """Return why DALI is unavailable on every device, or None if it works."""
    extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"
    return _import_problem("dali", "DALI", "nvidia", f'pip install "fastdino[dali-{extra}]"')


def _import_problem(module: str, name: str, package: str, install: str) -> str | None:
    """Return why a module of this package cannot be imported, or None if it can."""
    try:
        importlib.import_module(f"fastdino.augmentation.{module}")
    except Exception as error:  # Libraries that do not fit the machine raise many types.
        missing = isinstance(error, ModuleNotFoundError) and (error.name or package)
        if missing and missing.partition(".")[0] == package:
            return f"{name} is not installed: {install}"
        return f"{name} does not work here: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return str(error).partition("\n")[0] or type(error).__name__

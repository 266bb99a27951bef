"""The one switch between implementations of softmax attention.

Legend: B sequences, N tokens, H heads, D channels a head.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdino.errors import ConfigError


@dataclass(frozen=True)
class AttentionChoice:
    """The implementation taken, and why: `reason` is one phrase for the run's first line."""

    name: str
    reason: str


def choose_attention(
    wanted: str, device: torch.device, dtype: torch.dtype = torch.float16
) -> AttentionChoice:
    """Resolves --attention {auto, xformers, sdpa} for a device and the dtype of queries and keys.

    Raises: ConfigError: xformers was asked for by name and cannot run there.
    """
    if wanted == "sdpa":
        return AttentionChoice("sdpa", "asked for")
    problem = xformers_problem(device, dtype)
    if problem is None:
        return AttentionChoice("xformers", "asked for" if wanted == "xformers" else "fastest here")
    if wanted == "xformers":
        raise ConfigError(f"--attention xformers cannot run: {problem}; use --attention sdpa")
    return AttentionChoice("sdpa", f"no xformers: {problem}")


def xformers_problem(device: torch.device, dtype: torch.dtype = torch.float16) -> str | None:
    """Why xformers cannot train on `device` in this dtype, or None where it can: it is tried."""
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed"
    if device.type != "cuda":
        return "it has no CPU kernels"
    try:
        ops = _xformers_ops()
        query = torch.zeros(1, 16, 1, 64, dtype=dtype, device=device, requires_grad=True)
        ops.memory_efficient_attention(query, query, query).sum().backward()
    except (ImportError, AttributeError, OSError, ValueError, RuntimeError) as error:
        return (str(error).strip() or repr(error)).splitlines()[0]
    return None


@functools.cache
def _xformers_ops() -> Any:
    """xformers.ops, with the CUDA 12 runtime that its extension links against loaded first.

    Beside a CUDA 13 torch that library is missing, and every CUDA op is then refused at call time;
    the wheel nvidia-cuda-runtime-cu12 carries it.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        library = Path(root) / "cuda_runtime" / "lib" / "libcudart.so.12"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import xformers.ops

    return xformers.ops


def attend(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V.

    Args:
        query, key, value: [B, N, H, D], one dtype and device.
        backend: a name that choose_attention returned.

    Returns: [B, N, H, D].
    """
    if backend == "xformers" and query.dtype != torch.float64:
        return _xformers_ops().memory_efficient_attention(query, key, value)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

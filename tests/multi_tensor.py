"""Shared parts of the tests of ema_update_, clip_grad_norms_ and adamw_ema_update_."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels.pointer_table import ROW, PointerTable
from torch import Tensor

SHAPES = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]
HALVES = [torch.float32, torch.bfloat16, torch.float16]
FLOATS = [torch.float64, *HALVES]
EPS = torch.finfo(torch.float32).eps

TRITON = [("triton", "cpu"), pytest.param(("triton", "cuda"), marks=pytest.mark.gpu)]
triton_only = pytest.mark.parametrize("target", TRITON, indirect=True, ids="-".join)
# NumPy warns when the interpreter computes with NaN, or inf * 0.
numpy_warns = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(dtype=torch.float32, seed=0, device="cpu", shapes=SHAPES) -> list[Tensor]:
    """Draw normal tensors; several dtypes take turns."""
    dtypes = [dtype] if isinstance(dtype, torch.dtype) else dtype
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(device, dtypes[index % len(dtypes)])
        for index, shape in enumerate(shapes)
    ]


def lengths_around(chunk: int) -> list[int]:
    """Return lengths next to the boundaries of a kernel's chunks and parts."""
    return [1, 15, 1023, 1024, 1025, chunk - 1, chunk, chunk + 1, 2 * chunk + 1025]


def far_table(chunk: int, tensors: list[Tensor], codes: tuple[int | None, ...]) -> PointerTable:
    """Return a table of fp32 tensors of 2^31 elements and a few, of which only the last few exist.

    Args:
        chunk: elements of one program.
        tensors: the last elements, as many in each role, fewer than a chunk.
        codes: the dtype code of each role.
    """
    before, device = 2**31, tensors[0].device
    row = [-(before // chunk), before + len(tensors[0]), 0, 0]
    row += [tensor.data_ptr() - 4 * before for tensor in tensors]
    rows = torch.tensor([row + [0] * (ROW - len(row))], device=device)
    return PointerTable(rows, torch.zeros(1, dtype=torch.int64, device=device), codes)

"""Shared parts of the tests of ema_update_, clip_grad_norms_ and adamw_ema_update_."""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels.pointer_table import CODE_BITS, FP32, Chunks, Pointers
from fastdino_kernels.tensor_lists import Tables
from torch import Tensor

SHAPES = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]
HALVES = [torch.float32, torch.bfloat16, torch.float16]
FLOATS = [torch.float64, *HALVES]
EPS = torch.finfo(torch.float32).eps
LONG = (1 << 23) + 5  # of these, PyTorch's norm on a CPU is off by 2e-4

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


def long_normal(size: int = LONG, seed: int = 0) -> Tensor:
    """Draw more normal numbers than fp32 can add one after the other."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def strided(device) -> list[Tensor]:
    """Make dense tensors that are not contiguous."""
    images = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    return [images, torch.randn(5, 4, device=device).t()]


def frames_around(chunk, fills, dtype, device) -> list[tuple[Tensor, slice]]:
    """Make tensors [len(fills), n], whose rows are filled, and slices for the tensors inside.

    Lengths are next to the boundaries of a kernel's chunks and parts. The second half of the slices
    starts one element in: such addresses are not multiples of 16.
    """
    lengths = [1, 15, 1023, 1024, 1025, chunk - 1, chunk, chunk + 1, 2 * chunk + 1025]
    values = torch.tensor(fills, dtype=dtype, device=device)[:, None]
    return [
        (values.repeat(1, -(-length // 64) * 64 + 64), slice(start, start + length))
        for start in (16, 17)
        for length in lengths
    ]


def assert_frame(frame: Tensor, inside: slice, fills, values, rtol=0.0) -> None:
    """Compare the rows with `values` inside and with `fills` outside."""
    expected = frame.new_tensor(fills)[:, None].expand_as(frame).clone()
    expected[:, inside] = frame.new_tensor(values)[:, None]
    torch.testing.assert_close(frame, expected, rtol=rtol, atol=0, equal_nan=True)


def capture(step):
    """Run step() once to warm up, then capture it; return the CUDA graph and step's result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def far_tables(chunk: int, tensors: list[Tensor], *columns: int) -> Tables:
    """Return tables of fp32 tensors of 2^31 elements and a few, of which only the last few exist.

    Args:
        chunk: elements of one program.
        tensors: the last elements, as many in each role, fewer than a chunk.
        columns: more words.
    """
    before, device = 2**31, tensors[0].device
    rows = torch.tensor([[-(before // chunk), before + len(tensors[0])]], device=device)
    owners = torch.zeros(1, dtype=torch.int64, device=device)
    words = [(tensor.data_ptr() - 4 * before) << CODE_BITS | FP32 for tensor in tensors]
    pointers = Pointers(torch.tensor([[*words, *columns]], device=device), (FP32,) * len(tensors))
    return Tables(Chunks(rows, owners), pointers)

"""Addresses, lengths and strides of rows that the pairwise kernels may read as 16-byte vectors."""

import pytest
import torch
from fastdino_kernels.pairwise_triton import _are_aligned

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def rows(dtype, start: int, length: int, stride: int) -> torch.Tensor:
    """Return a view [2, 3, length] whose rows are `stride` elements apart, from `start` on."""
    memory = torch.zeros(start + 6 * stride + length, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided((2, 3, length), (3 * stride, stride, 1), start)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["start", "length", "stride"])
def test_only_multiples_of_16_bytes_are_aligned(which, dtype):
    whole = rows(dtype, 0, 24, 48)
    assert _are_aligned(whole, None, whole)
    for elements in range(1, 33):
        layout = {"start": 0, "length": 24, "stride": 48}
        layout[which] = elements + (48 if which == "stride" else 0)
        view = rows(dtype, **layout)
        expected = elements * dtype.itemsize % 16 == 0
        assert _are_aligned(view) == expected
        assert _are_aligned(whole, None, view) == _are_aligned(view, whole) == expected

"""Chunks of rows of the losses without logits: their sizes, and the products in fp32."""

import pytest
import torch
from fastdino_kernels.row_chunks import (
    Logits,
    add_product_,
    automatic_chunk_rows,
    product,
    row_chunks,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.linear_layers import error

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20


@pytest.mark.parametrize("rows", [0, 1, 7, 64, 385])
@pytest.mark.parametrize("chunk_rows", [1, 3, 64, 384, 1000])
def test_chunks_cover_the_rows_in_equal_parts(rows, chunk_rows):
    chunks = list(row_chunks(rows, 4, CPU, chunk_rows))
    assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    assert len(lengths) == -(-rows // chunk_rows)
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert lengths == sorted(lengths, reverse=True)  # the first one's buffer holds all


@pytest.mark.parametrize(
    ("K", "crops", "size", "device", "expected"),
    [
        (65536, 2, 2, GPU, 384),  # patches in bf16
        (65536, 2, 4, CPU, 48),
        (65536, 12, 2, GPU, 64),  # class tokens of 10 + 2 crops
        (262144, 12, 2, GPU, 16),
        (1 << 30, 2, 4, GPU, 1),
    ],
)
def test_automatic_chunks(K, crops, size, device, expected):
    assert automatic_chunk_rows(crops * K * size, device) == expected


def test_documented_peak_of_the_largest_target():
    """The logits of a chunk and autocast's copies of two weights [65536, 256] take 200 MB."""
    chunk = automatic_chunk_rows(2 * 65536 * 2, GPU) * 2 * 65536 * 2
    assert chunk + 2 * 65536 * 256 * 2 < 200e6


def test_logits_of_chunks_share_memory():
    logits = Logits(torch.randn(9, 4), torch.float32)
    first, second = logits.of(torch.randn(2, 3, 4)), logits.of(torch.randn(2, 1, 4))
    assert (first.shape, second.shape) == ((2, 3, 9), (2, 1, 9))
    assert first.data_ptr() == second.data_ptr()
    x = torch.randn(5, 2, 4)
    assert torch.equal(logits.of(x), x @ logits.weight.t())


@pytest.mark.parametrize("replace", [False, True])
def test_products_of_half_precision_are_written_in_fp32_on_cuda(replace):
    with FakeTensorMode():
        x = torch.empty(9, 3, dtype=torch.bfloat16, device="cuda")
        total, y = torch.empty(9, 2, device="cuda"), x[:3, :2]
        add_product_(total, x, y, replace=replace)
        assert (total.dtype, product(x, y, torch.float32).dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_are_summed_up_in_the_wider_dtype(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = torch.randn(20_000, 3).to(dtype), torch.randn(3, 2).to(dtype)
    total = torch.ones(20_000, 2, dtype=wide)
    expected = 1 + 2 * (x.double() @ y.double())
    for _ in range(2):
        add_product_(total, x, y)
    replaced = torch.full_like(total, torch.nan)
    add_product_(replaced, x, y, replace=True)
    limit = 1e-6 if dtype == wide else torch.finfo(dtype).eps
    assert error(total, expected) < limit
    assert error(replaced, x.double() @ y.double()) < limit
    result = product(x, y, wide)
    assert result.dtype == wide
    assert error(result, x.double() @ y.double()) < limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_products_of_half_precision_are_summed_up_in_fp32(dtype):
    """A sum of ones in half precision would not grow beyond 2048 or 256."""
    total, x, y = torch.zeros(3, 2), torch.ones(3, 1, dtype=dtype), torch.ones(1, 2, dtype=dtype)
    for _ in range(2500):
        add_product_(total, x, y)
    assert torch.equal(total, torch.full((3, 2), 2500.0))

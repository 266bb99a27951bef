"""Products of rows and prototypes in chunks of rows, whose logits share one buffer.

Legend: N rows (B images), D features, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_integer

# Bytes of the logits of a chunk. Each chunk reads the weights and reads and writes their gradient
# once, about 14 K D bytes in half precision, so that small chunks are slow. On a CPU fewer rows
# amortise that, because its products take longer.
CHUNK_BYTES, CPU_CHUNK_BYTES = 96 << 20, 24 << 20
# Rows of a chunk are a multiple of it, if there are as many: the tiles of matrix products.
ROW_TILE = 64
# Prototypes whose products are converted to fp32 at a time, where a product cannot write fp32.
PROTOTYPE_BLOCK = 8192


def check_chunk_rows(chunk_rows: object) -> None:
    """Raise TypeError or ValueError unless chunk_rows is None or an int >= 1."""
    if chunk_rows is not None and check_integer("chunk_rows", chunk_rows) < 1:
        raise ValueError(f"chunk_rows must be >= 1 or None, got {chunk_rows}")


def row_chunks(
    rows: int, row_bytes: int, device: torch.device, chunk_rows: int | None
) -> Iterator[slice]:
    """Yield slices that cover the rows; the first are the longest, by one row if not equal.

    Args:
        rows: N.
        row_bytes: bytes of all logits of a row (of an image, if it has several rows).
        device: where the logits will be.
        chunk_rows: most rows of a slice; None: as automatic_chunk_rows.

    """
    most = automatic_chunk_rows(row_bytes, device) if chunk_rows is None else chunk_rows
    count = -(-rows // most)
    start = 0
    for i in range(count):
        stop = start + rows // count + (i < rows % count)
        yield slice(start, stop)
        start = stop


def automatic_chunk_rows(row_bytes: int, device: torch.device) -> int:
    """Return how many rows have logits of 96 MiB, on a CPU of 24 MiB, in multiples of 64 if >= 64.

    For K = 65536, two logits per row and prototype: 384 rows in half precision on a GPU, 48 in fp32
    on a CPU.
    """
    rows = (CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES) // max(row_bytes, 1)
    return max(1, rows if rows < ROW_TILE else rows // ROW_TILE * ROW_TILE)


class Logits:
    """Logits of the rows of one layer, chunk after chunk in the same memory.

    Args:
        weight: [K, D].
        dtype: of the products; the weight is converted once.

    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.row_bytes = len(weight) * dtype.itemsize
        self._buffer: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return x W^T [.., n, K] of rows x [.., n, D] of the dtype, until the next call."""
        rows = x.flatten(0, -2)
        if self._buffer is None or len(self._buffer) < len(rows):
            self._buffer = None  # freed before its successor is made
            shape = (len(rows), len(self.weight))
            self._buffer = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        out = torch.mm(rows, self.weight.t(), out=self._buffer[: len(rows)])
        return out.view(*x.shape[:-1], len(self.weight))


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x @ y in `dtype`, that of both or fp32."""
    if x.dtype != dtype and _writes_fp32(x):
        return torch.mm(x, y, out_dtype=dtype)
    return torch.mm(x, y).to(dtype)


def add_product_(total: Tensor, x: Tensor, y: Tensor, *, replace: bool = False) -> None:
    """Add x @ y [K, D] to `total`, whose dtype is that of both or fp32.

    Round a half-precision product before the addition if it cannot be written in fp32.

    Args:
        total: changed in place.
        x, y: factors of one dtype.
        replace: write the product instead; `total` may be uninitialised.

    """
    beta = 0 if replace else 1  # 0: total is not read, not even NaN
    if x.dtype == total.dtype:
        total.addmm_(x, y, beta=beta)
    elif _writes_fp32(x):
        torch.addmm(total, x, y, beta=beta, out_dtype=total.dtype, out=total)
    else:
        for start in range(0, len(total), PROTOTYPE_BLOCK):
            block = slice(start, start + PROTOTYPE_BLOCK)
            part = torch.mm(x[block], y)
            total[block] = part if replace else part.to(total.dtype).add_(total[block])


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over logits of some dtypes: fp64 if any is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _writes_fp32(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.version.hip is None

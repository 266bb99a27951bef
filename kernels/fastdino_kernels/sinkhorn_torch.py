"""The passes of Sinkhorn-Knopp in vectorised PyTorch: CPU, MPS, fp64; sinkhorn.py calls them.

A CPU works on blocks of rows, in two buffers that stay in its caches. There, computing exp anew in
each pass takes less time than storing an [N, K] matrix of exponentials, whose pages alone cost more
to create than the exponentials.

Legend: N rows, n rows of a block, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .pairwise_torch import sum_of_rows

# Elements of a block on a CPU, 4 MB in fp32. All threads wait for each other after each operation
# on a block, which on a busy machine costs more than smaller blocks gain in the caches.
BLOCK_ELEMENTS = 1 << 20


def columns(teacher: Tensor, temp: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the results of the operator sinkhorn_columns."""
    largest = teacher.amax(dim=0).to(compute_dtype(teacher))
    finite = largest.masked_fill(largest == -torch.inf, 0.0)
    sums = torch.zeros_like(largest)
    scale = 1 / (temp * math.log(2))  # torch.exp2 takes half the time of torch.exp
    buffer = _buffer(teacher)
    for block in _blocks(teacher):
        x = torch.sub(teacher[block], finite, out=buffer[: block.stop - block.start])
        sums += sum_of_rows(x.mul_(scale).exp2_())
    return largest, sums


def masses(teacher: Tensor, center: Tensor, temp: float | Tensor) -> Tensor:
    """Return the result of the operator sinkhorn_masses."""
    result = torch.zeros_like(center)
    buffer, probs = _buffer(teacher), _buffer(teacher)
    for block in _blocks(teacher):
        rows = block.stop - block.start
        x = _scaled(teacher[block], center, temp, buffer[:rows])
        result += sum_of_rows(torch.softmax(x, dim=1, out=probs[:rows]))
    return result


def write_probabilities(
    probs: Tensor, teacher: Tensor, center: Tensor, temp: float | Tensor
) -> None:
    """Write the result of the operator sinkhorn_probabilities to `probs`."""
    buffer = _buffer(teacher)
    for block in _blocks(teacher):
        x = _scaled(teacher[block], center, temp, buffer[: block.stop - block.start])
        torch.softmax(x, dim=1, out=probs[block])


def _block_rows(teacher: Tensor) -> int:
    if teacher.device.type != "cpu":
        return len(teacher)
    return min(len(teacher), max(1, BLOCK_ELEMENTS // teacher.shape[1]))


def _blocks(teacher: Tensor) -> Iterator[slice]:
    step = _block_rows(teacher)
    for start in range(0, len(teacher), step):
        yield slice(start, min(start + step, len(teacher)))


def _buffer(teacher: Tensor) -> Tensor:
    """Return memory [n, K] for the rows of a block."""
    return teacher.new_empty(_block_rows(teacher), teacher.shape[1], dtype=compute_dtype(teacher))


def _scaled(logits: Tensor, center: Tensor, temp: float | Tensor, out: Tensor) -> Tensor:
    """Write (x - center)/temp to `out`."""
    return torch.sub(logits, center, out=out).mul_(1 / temp)

"""2-norms of tensors and of DTensors, accurate for any number of elements.

On a CPU, PyTorch's own norm adds the squares of a whole tensor one after the other in the lanes of
one register. In fp32 the error grows with the number of elements: 7e-4 of the norm of 65536 x 256
normal numbers. Here a long tensor is measured in rows, and its norm is that of the rows' norms.
On accelerators PyTorch adds in a tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .dtensor import local_lists, norms_over_shards
from .tensor_lists import Some, by_dtype, present

# Longer rows lose digits, shorter ones take more time. Biases of a ViT-L are not longer than a row.
ROW = 1 << 12


def norm(tensor: Tensor) -> Tensor:
    """Return the 2-norm [] of a tensor, or of all shards of a DTensor, as measure computes it."""
    whole = [tensor]
    return measure(whole, local_lists({"tensor": whole})["tensor"], "tensor")[0]


def measure(whole: Some, local: Some, name: str) -> Tensor:
    """Return the 2-norms [n] of at least one tensor by multi-tensor operations, 0 for None.

    fp64 if any tensor is fp64, else fp32; half precision is computed in fp32.

    Args:
        whole: tensors or DTensors; the norms are those of all their shards.
        local: what local_lists returns for them.
        name: the list's name, for errors.
    """
    some = present([local])
    like = torch.zeros((), dtype=compute_dtype(*some), device=some[0].device)
    norms = [like] * len(local)
    for indices, group in by_dtype(local):
        dtype = compute_dtype(*group[:1])
        rows = [_row_norms(tensor, dtype) for tensor in group]
        for index, value in zip(indices, torch._foreach_norm(rows, 2.0, dtype=dtype)):
            norms[index] = value.to(like)
    stacked = torch.stack(norms)
    return stacked if local is whole else norms_over_shards(stacked, name, whole)


def norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of returned norms: fp64 if every tensor is fp64, else fp32."""
    double = all(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _row_norms(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the same norm that is short enough to be one row."""
    while tensor.numel() > ROW and tensor.device.type == "cpu":
        if rest := tensor.numel() % ROW:
            flat = _in_memory_order(tensor).reshape(-1)
            rows = torch.linalg.vector_norm(flat[:-rest].view(-1, ROW), dim=1, dtype=dtype)
            last = torch.linalg.vector_norm(flat[-rest:], dim=0, keepdim=True, dtype=dtype)
            tensor = torch.cat([rows, last])
        else:
            rows = _in_memory_order(tensor).reshape(-1, ROW)
            tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return tensor


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view without transposed dimensions, so that only gaps in memory need a copy."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))

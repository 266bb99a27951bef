"""2-norms of tensors and of DTensors, accurate for any number of elements.

On a CPU, PyTorch's own norm adds the squares of a whole tensor one after the other in the lanes of
one register, so that in fp32 the error grows with the number of elements: README.md has a figure
and its command. Here a long tensor is measured in rows, and its norm is that of the rows' norms. On
accelerators PyTorch adds in a tree.

Traced norms of tensors on a CPU are one operator, because the number of rows depends on the sizes,
which are symbols in a graph for several shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import compute_dtype
from .dtensor import local_lists, norms_over_shards
from .operators import LIBRARY, ops, register_fake
from .tensor_lists import Some, are_plain, by_dtype, present

# Longer rows lose digits, shorter ones take more time. Biases of a ViT-L are not longer than a row.
ROW = 1 << 12


def norm(tensor: Tensor) -> Tensor:
    """Return the 2-norm [] of a tensor, or of all shards of a DTensor, as measure computes it."""
    return measure([tensor], "tensor")[0]


def measure(tensors: Some, name: str) -> Tensor:
    """Return the 2-norms [n] of tensors or DTensors by multi-tensor operations, 0 for None.

    fp64 if any tensor is fp64, else fp32; half precision is computed in fp32. The norm of a DTensor
    is that of all its shards. Norms have no gradient.

    Args:
        tensors: at least one that is not None, whose device is that of the result.
        name: the list's name, for errors.

    Raises: ValueError: all are None, or a DTensor is a pending sum.
    """
    local = local_lists({name: tensors})[name]
    some = present([local])
    if not some:
        raise ValueError(f"{name} must have at least one tensor, got {len(local)} times None")
    like = torch.zeros((), dtype=compute_dtype(*some), device=some[0].device)
    norms = [like] * len(local)
    for indices, group in by_dtype(local):
        for index, value in zip(indices, _norms(group)):
            norms[index] = value.to(like)
    stacked = torch.stack(norms)
    if local is not tensors:
        stacked = norms_over_shards(stacked, name, tensors)
    return stacked.detach()


def norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of returned norms: fp64 if every tensor is fp64, else fp32."""
    double = all(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the norms [] of tensors of one dtype."""
    traced = torch.compiler.is_compiling() or not are_plain([tensors])
    if traced and any(tensor.is_cpu for tensor in tensors):
        norms: list[Tensor] = ops.norms(tensors)
        return norms
    return _norms_of_rows(tensors)


def _norms_of_rows(tensors: list[Tensor]) -> list[Tensor]:
    dtype = compute_dtype(*tensors[:1])
    rows = [_row_norms(tensor, dtype) for tensor in tensors]
    return list(torch._foreach_norm(rows, 2.0, dtype=dtype))


def _fake_norms(tensors: list[Tensor]) -> list[Tensor]:
    dtype = compute_dtype(*tensors[:1])
    return [tensor.new_empty((), dtype=dtype) for tensor in tensors]


# Used by traced graphs; for eager calls the dispatcher takes longer.
LIBRARY.define("norms(Tensor[] tensors) -> Tensor[]")
LIBRARY.impl("norms", _norms_of_rows, "CompositeExplicitAutograd")
register_fake("norms", _fake_norms)


def _row_norms(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the same norm that is short enough to be one row."""
    while tensor.is_cpu and tensor.numel() > ROW:
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

"""DTensors: the local shard of each, and norms over the shards of all ranks.

torch.distributed is not imported before a DTensor exists, because that takes a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tensor_lists import Lists, Some, are_plain, label


def local_lists(lists: Lists) -> Lists:
    """Return the local shards, in the same memory; the same object if there are no DTensors.

    Raises: ValueError: a tensor is sharded unlike the tensor of the same index in the first list.
    """
    if are_plain(lists.values()):
        return lists
    (first, references), *_ = lists.items()
    for name, some in lists.items():
        for i, (x, y) in enumerate(zip(references, some)):
            ours, theirs = (getattr(tensor, "placements", None) for tensor in (x, y))
            if y is not None and ours != theirs:
                raise ValueError(
                    f"{label(first, i)} and {label(name, i)} must be sharded alike, "
                    f"got {ours} and {theirs}"
                )
    return {name: [_local(tensor) for tensor in some] for name, some in lists.items()}


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def norms_over_shards(norms: Tensor, name: str, tensors: Some) -> Tensor:
    """Return the 2-norms [n] of the n tensors of a list, given those of this rank's shards.

    Tensors that are sharded alike share one all-reduce per sharded dimension of their mesh, so all
    ranks must call this with the same tensors in the same order.

    Raises: ValueError: a tensor is a pending (Partial) sum.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        together.setdefault(_shard_groups(tensor, label(name, index)), []).append(index)
    parts = list(norms.unbind())
    for groups, indices in together.items():
        if not groups:
            continue
        squares = torch.stack([parts[index] for index in indices]).square()
        for group in groups:
            torch.distributed.all_reduce(squares, group=group)
        for index, norm in zip(indices, squares.sqrt().unbind()):
            parts[index] = norm
    return torch.stack(parts)


def _shard_groups(tensor: Any, name: str) -> tuple[Any, ...]:
    """Return the process groups whose ranks hold different elements; none for a plain tensor."""
    placements: Sequence[Any] = getattr(tensor, "placements", ())
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name} must be sharded or replicated, got {tuple(placements)}: a pending sum has no "
            "norm yet, redistribute it first"
        )
    sharded = (i for i, placement in enumerate(placements) if not placement.is_replicate())
    return tuple(tensor.device_mesh.get_group(i) for i in sharded)

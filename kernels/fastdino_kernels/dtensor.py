"""DTensors: the local shard of each, and norms over the shards of all ranks.

torch.distributed is not imported before a DTensor exists, because that takes a while.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Return True for a DTensor, whose elements may be spread over several ranks."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, in the same memory, or any other tensor unchanged."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def local_parts(named: Mapping[str, Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
    """Return the local shards of lists of tensors; None stays None.

    Raises: ValueError: a tensor is sharded unlike the tensor of the same index in the first list.
    """
    (first, references), *_ = named.items()
    for name, tensors in named.items():
        for i, (x, y) in enumerate(zip(references, tensors, strict=False)):
            ours, theirs = (getattr(tensor, "placements", None) for tensor in (x, y))
            if y is not None and ours != theirs:
                raise ValueError(
                    f"{first}[{i}] and {name}[{i}] must be sharded alike, got {ours} and {theirs}"
                )
    return [[t if t is None else local_part(t) for t in tensors] for tensors in named.values()]


def norms_over_shards(
    norms: Tensor, tensors: Sequence[Tensor | None], names: Sequence[str]
) -> Tensor:
    """Return the 2-norms [n] of n tensors, given the norms of this rank's shards.

    Tensors that are sharded alike share one all-reduce per sharded dimension of their mesh, so all
    ranks must call this with the same tensors in the same order.

    Raises: ValueError: a tensor is a pending (Partial) sum; the message has its name from `names`.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups = () if tensor is None else _shard_groups(tensor, names[index])
        together.setdefault(groups, []).append(index)
    parts = list(norms.unbind())
    for groups, indices in together.items():
        if not groups:
            continue
        squares = torch.stack([parts[index] for index in indices]).square()
        for group in groups:
            torch.distributed.all_reduce(squares, group=group)
        for index, norm in zip(indices, squares.sqrt().unbind(), strict=True):
            parts[index] = norm
    return torch.stack(parts)


def _shard_groups(tensor: Tensor, name: str) -> tuple[Any, ...]:
    """Return the process groups whose ranks hold different elements; none for a plain tensor."""
    if not is_sharded(tensor):
        return ()
    placements: Sequence[Any] = tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name} must be sharded or replicated, got {tuple(placements)}: a pending sum has no "
            "norm yet, redistribute it first"
        )
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate())

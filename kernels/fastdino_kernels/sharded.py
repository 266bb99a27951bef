"""DTensors: the part of each that this process holds, and norms over the parts of all processes.

Nothing here imports torch.distributed before there is a DTensor, which takes a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, which may lie on several processes."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor, in the same memory; any other tensor itself."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def check_sharded_alike(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """ValueError where the parts of two tensors are not those of the same elements."""
    ours, theirs = (getattr(tensor, "placements", None) for tensor in (x, y))
    if ours != theirs:
        raise ValueError(f"{name_x} and {name_y} must be sharded alike, got {ours} and {theirs}")


def norms_over_shards(
    norms: Tensor, tensors: Sequence[Tensor | None], names: Sequence[str]
) -> Tensor:
    """[n]: the 2-norms of n tensors, from those of this process's parts.

    Tensors that are sharded alike share an all-reduce for each sharded dimension of their mesh, so
    all processes must call this with the same tensors in the same order.

    Raises: ValueError: one of the tensors (`names` tells which) is a sum that is still pending.
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
    """The process groups whose members hold different elements; none for a plain tensor."""
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

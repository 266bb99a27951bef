"""Collectives of the losses that depend on all ranks' rows; without a process group, no-ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, which builds without distributed do not have


def world_size(group: Group | None) -> int:
    """Return the number of ranks of a group, of the default one for None; 1 if there is none.

    Raises: ValueError: this rank does not belong to the group.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    size = torch.distributed.get_world_size(group)
    if size < 1:
        raise ValueError("group must contain this rank, got a group of other ranks")
    return size


def all_reduce_max_(tensor: Tensor, group: Group | None) -> None:
    """Replace each element by its largest value on all ranks."""
    if world_size(group) > 1:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group)


def all_reduce_sum_(tensor: Tensor, group: Group | None) -> None:
    """Replace each element by its sum over all ranks."""
    if world_size(group) > 1:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.SUM, group)


def check_equal_on_ranks(name: str, sizes: tuple[int, ...], like: Tensor, group: Group) -> None:
    """Raise ValueError on every rank unless all ranks have the same sizes.

    Only for tensors on a CPU: elsewhere, reading the result would wait for the device, and the
    backend reports the mismatch (with TORCH_DISTRIBUTED_DEBUG=DETAIL in words).
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling() or world_size(group) == 1:
        return
    limits = torch.tensor([[*sizes], [-size for size in sizes]])
    all_reduce_max_(limits, group)
    most, least = limits[0].tolist(), (-limits[1]).tolist()
    if most != least:
        raise ValueError(
            f"{name} must be the same on all ranks, got {list(sizes)} on this one, and values "
            f"from {least} to {most}"
        )

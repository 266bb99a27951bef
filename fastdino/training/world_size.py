"""Resuming a run with another number of processes."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastdino.config import TrainConfig
from fastdino.errors import CheckpointError


def explain_world_size(
    state: dict[str, Any], config: TrainConfig, world_size: int, *, batch_norm: bool
) -> str:
    """Return what another number of processes than the checkpoint's changes; "" for the same.

    Args:
        state: the checkpoint.
        config, world_size: of this run.
        batch_norm: the networks have batch norm.

    Raises: CheckpointError: the global batch is another one, which only the number of processes
        changed.
    """
    saved, before = state.get("args"), len(state.get("generators", []))
    if not isinstance(saved, dict) or before in (0, world_size):  # the paper's code has neither
        return ""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = {name: value for name, value in saved.items() if name in known}
    theirs, ours = TrainConfig(**settings).split_batch(before), config.split_batch(world_size)
    old_batch, new_batch = theirs.images_per_step * before, ours.images_per_step * world_size
    if old_batch != new_batch:
        raise CheckpointError(
            f"the checkpoint's run had a global batch of {old_batch} images on {before} "
            f"process(es), this one has {new_batch} on {world_size}: use --global_batch_size "
            f"{old_batch}, which keeps it with any number of processes, without --grad_accum"
        )
    changes = ["sums are rounded differently"]
    if config.koleo_weight:
        changes.append("KoLeo compares the images of other groups")
    if theirs.images * before != ours.images * world_size:
        per_pass = f"over {ours.images * world_size} images (was {theirs.images * before})"
        changes += [f"batch norm is {per_pass}"] if batch_norm else []
        changes += [f"Sinkhorn-Knopp is {per_pass}"] if config.centering == "sinkhorn" else []
    if config.drop_path_rate and not config.depth_follows_images:
        changes.append("stochastic depth draws other numbers")
    return (
        f"resuming on {world_size} process(es) a run of {before}: images, their order and crops, "
        f"and all schedules are the same; {', '.join(changes)}"
    )

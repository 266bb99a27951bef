"""Order of the samples in an epoch, and their division into steps and ranks.

Legend: n samples, W = world size, G = batch * W samples per step over all ranks (global batch).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fastdino.errors import DataError


def epoch_order(
    n: int, *, seed: int, epoch: int, rank: int, world_size: int, total: int | None = None
) -> NDArray[np.int64]:
    """Return one rank's samples of an epoch, [ceil(n / world_size)] or [total / world_size].

    The order is that of torch's DistributedSampler(shuffle=True, seed=seed) after set_epoch(epoch):
    if world_size does not divide n, the first samples are repeated at the end.

    Args:
        total: samples of all ranks, a multiple of world_size, repeating the first ones as needed.
    """
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order = torch.randperm(n, generator=generator).numpy()
    return np.resize(order, total or -(-n // world_size) * world_size)[rank::world_size]


def steps_per_epoch(n: int, batch: int, world: int, last_batch: str = "paper") -> int:
    """Return the batches per epoch; `last_batch` decides about the last, incomplete one.

    "paper": repeat samples until W divides them, then drop the incomplete batch, as the paper's
        code does (DistributedSampler and a DataLoader with drop_last).
    "drop": floor(n / G); no sample is repeated.
    "pad": ceil(n / G); the first samples are repeated.
    "drop" and "pad" depend on G only. "paper" also depends on W if a batch lacks fewer than W
    samples.

    Raises: DataError: not even one batch.
    """
    if last_batch == "pad":
        return -(-n // (batch * world))
    samples = n // world if last_batch == "drop" else -(-n // world)
    if samples < batch:
        ranks = f" on each of {world} ranks" if world > 1 else ""
        raise DataError(
            f"{n} images give {samples} per epoch{ranks}, fewer than one batch of {batch}: "
            "lower --batch_size_per_gpu (or --grad_accum or --global_batch_size) until a batch is "
            f"at most {samples}, or repeat images with --last_batch pad"
        )
    return samples // batch


@dataclass
class EpochPlan:
    """The batches of one rank: the samples of every step of every epoch.

    A step uses the next G samples of the epoch's order, dealt to the ranks one by one. The samples
    of a step, and those remaining after it, therefore depend on G but not on W.

    Raises: DataError: fewer samples than a batch.
    """

    n: int
    batch: int
    seed: int
    rank: int
    world_size: int
    last_batch: str = "paper"
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = steps_per_epoch(self.n, self.batch, self.world_size, self.last_batch)

    def batches(self, epoch: int, start_step: int) -> list[list[int]]:
        """Return the sample indices of each step of an epoch from start_step on.

        Raises: ValueError: start_step is not in 0..steps.
        """
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step must be from 0 to {self.steps}, got {start_step}")
        order = epoch_order(
            self.n,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            total=self.steps * self.batch * self.world_size,
        )
        return order[start_step * self.batch :].reshape(-1, self.batch).tolist()

"""In which order an epoch sees the samples, and which of them a process takes in which step.

Legend: n samples, W processes, G = batch * W samples in a step of all processes.
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
    """The samples of one process in one epoch, [ceil(n / world_size)] or [total / world_size].

    It is the order of torch's DistributedSampler(shuffle=True, seed=seed) after set_epoch(epoch):
    the first samples come again at the end, where world_size does not divide n.

    Args:
        total: samples of all processes, a multiple of world_size; the first ones come again.
    """
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order = torch.randperm(n, generator=generator).numpy()
    return np.resize(order, total or -(-n // world_size) * world_size)[rank::world_size]


def steps_per_epoch(n: int, batch: int, world: int, last_batch: str = "paper") -> int:
    """Batches an epoch. `last_batch` says what becomes of the last, incomplete one:

    "paper": samples are repeated until W divides them, then an incomplete batch is dropped: what
        the paper's code does (DistributedSampler, and a DataLoader with drop_last).
    "drop": floor(n / G): no sample comes twice. "pad": ceil(n / G): the first samples come again.
    The last two depend on G alone, the first on W too where a batch lacks fewer than W samples.

    Raises: DataError: there is not even one.
    """
    if last_batch == "pad":
        return -(-n // (batch * world))
    samples = n // world if last_batch == "drop" else -(-n // world)
    if samples < batch:
        processes = f" on each of {world} processes" if world > 1 else ""
        raise DataError(
            f"{n} images give {samples} an epoch{processes}, fewer than one batch of {batch}: "
            f"lower --batch_size_per_gpu (or --grad_accum) until a batch is at most {samples}, or "
            "repeat images with --last_batch pad"
        )
    return samples // batch


@dataclass
class EpochPlan:
    """The batches of one process: which samples, in which step of which epoch.

    A step takes the next G samples of the epoch's order, dealt to the processes one by one: which
    samples a step sees, and which are left after it, depends on G, not on W.

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
        """The samples of the steps start_step, start_step + 1, ... of an epoch.

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

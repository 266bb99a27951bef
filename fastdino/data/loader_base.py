"""The interface of the three loaders and the code they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from fastdino.data.bad_images import BadImages
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.sampler import EpochPlan

if TYPE_CHECKING:
    from fastdino.config import TrainConfig


class CropLoader(ABC):
    """Batches of crops, fully determined by (config, source, rank, world_size, epoch, step).

    Unreadable images are replaced by the next readable one. Only one epoch runs at a time: starting
    another ends the current one. B = batch_size_per_gpu * grad_accum; N = local_crops_number.

    Attributes:
        source: the images.
        steps_per_epoch: batches per epoch.
        skipped: path -> reason of the files that became unreadable after the scan; source.skipped
            has those of the scan.
        description: libraries, device and workers, for the first line of a run's log.

    Raises:
        DataError: fewer images than a batch; while running, more than max_bad_share unreadable.
    """

    description: str

    def __init__(
        self, config: TrainConfig, source: ImageDataset, rank: int = 0, world_size: int = 1
    ) -> None:
        self.source = source
        self._config = config
        self._batch_size = config.batch_size_per_gpu * config.grad_accum
        self._plan = EpochPlan(
            len(source), self._batch_size, config.seed, rank, world_size, config.last_batch
        )
        self.steps_per_epoch = self._plan.steps
        self._bad = BadImages(len(source), config.max_bad_share, source.broken)
        self.skipped = self._bad.skipped
        self._run = 0  # counts the started epochs
        self._closed = False

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Tensor]]:
        """Yield the batches of an epoch from start_step on.

        A batch is 2 + N tensors [B, 3, size, size], fp32, global crops first.

        Raises:
            ValueError: start_step is not in 0..steps_per_epoch.
            RuntimeError: while iterating, another epoch was started or the loader was closed.
        """
        batches = self._plan.batches(epoch, start_step)
        self._run += 1
        self._stop()
        return self._checked_batches(self._run, epoch, batches)

    def close(self) -> None:
        """Stop the workers and free their memory."""
        self._closed = True
        self._stop()
        self._shut_down()

    def _checked_batches(
        self, run: int, epoch: int, batches: list[list[int]]
    ) -> Iterator[list[Tensor]]:
        self._check(run)
        for crops in self._batches(epoch, batches):
            yield crops
            self._check(run)

    def _check(self, run: int) -> None:
        if self._closed:
            raise RuntimeError("the loader is closed")
        if run != self._run:
            raise RuntimeError("another epoch was started on this loader")

    @abstractmethod
    def _batches(self, epoch: int, batches: list[list[int]]) -> Iterator[list[Tensor]]:
        """Yield the crops of each batch, given as the indices of its samples."""

    def _stop(self) -> None:  # noqa: B027
        """Stop preparing batches of the current epoch."""

    @abstractmethod
    def _shut_down(self) -> None:
        """Stop the workers and free their memory; called again by each close()."""

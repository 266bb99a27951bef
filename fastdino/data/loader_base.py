"""The interface of the three loaders and the code they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from fastdino.data.bad_images import BadImages
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import silence_pillow
from fastdino.data.sampler import EpochPlan
from fastdino.environment import cpu_count

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

T = TypeVar("T")
AHEAD = 2  # batches prepared beyond the one that is waited for


class CropLoader(ABC):
    """Batches of crops, fully determined by (config, dataset, rank, world_size, epoch, step).

    Unreadable images are replaced by the next readable one. Only one epoch runs at a time: starting
    another ends the current one. B = images per step and process; N = local_crops_number; W =
    world_size.

    Attributes:
        dataset: the images.
        steps_per_epoch: batches per epoch.
        skipped: path -> reason of the files that became unreadable after the scan; dataset.skipped
            has those of the scan.
        description: libraries, device and workers, for the first line of a run's log.

    Raises:
        DataError: fewer images than a batch; while running, more than max_bad_share unreadable.
    """

    description: str

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset = dataset
        self._device = torch.device(device)
        self._config = config
        self._batch_size = config.split_batch(world_size).images_per_step
        last_batch = config.last_batch
        if config.global_batch_size and last_batch == "paper":
            last_batch = "drop"  # as the paper's in one process: the steps must not depend on W
        self._plan = EpochPlan(
            len(dataset), self._batch_size, config.seed, rank, world_size, last_batch
        )
        self.steps_per_epoch = self._plan.steps
        self._bad = BadImages(len(dataset), config.max_bad_share, dataset.broken)
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


class ThreadedLoader(CropLoader, Generic[T]):
    """A loader whose threads prepare batches ahead: _prepare's results of type T."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, **options: Any) -> None:
        super().__init__(config, dataset, **options)
        self._num_threads = max(1, min(config.num_workers, cpu_count()))
        self._threads = ThreadPoolExecutor(self._num_threads)  # one task per image
        self._preparers = ThreadPoolExecutor(AHEAD)  # one task per batch
        self._pending: deque[Future[T]] = deque()

    @abstractmethod
    def _prepare(self, epoch: int, batch: list[int]) -> T:
        """Prepare the batch of these samples; called in a thread of _preparers."""

    def _prefetch(self, epoch: int, batches: list[list[int]]) -> Iterator[T]:
        """Yield every prepared batch while the threads prepare the next ones."""
        silence_pillow()  # here, because warning filters are not per thread
        for step in range(len(batches)):
            ahead = batches[step + len(self._pending) : step + 1 + AHEAD]
            self._pending += [self._preparers.submit(self._prepare, epoch, x) for x in ahead]
            yield self._pending.popleft().result()

    def _stop(self) -> None:
        while self._pending:
            self._pending.pop().cancel()

    def _shut_down(self) -> None:
        self._preparers.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._preparers.shutdown(wait=True)

"""The loader of --crops torchvision: the paper's chain in the workers of a DataLoader."""

from __future__ import annotations

import atexit
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastdino.augmentation.params import draw_crops
from fastdino.augmentation.pillow import make_crop
from fastdino.data.bad_images import BadImages
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import quiet_pillow, reason_of
from fastdino.data.sampler import EpochPlan
from fastdino.data.workers import end_workers, init_worker
from fastdino.environment import cpu_count
from fastdino.errors import DataError

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

# Crops, and the broken samples (index, reason) that were passed over to get them; in place of the
# crops, the text of the DataError where there are none.
_Sample = tuple[list[Tensor] | str, list[tuple[int, str]]]


class TorchvisionLoader:
    """Crops from torch's DataLoader, bit for bit the paper's for the same draws.

    Each image is decoded once. An image that cannot be decoded gives way to the next good one and
    is named in `skipped`.
    Batches: 2 + N tensors [B, 3, size, size], fp32, on the CPU (pinned for CUDA).
    One epoch at a time: starting another ends the one before.

    Raises: DataError: fewer images than a batch; in the run, more than max_bad_share broken ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: ImageDataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        why: str = "the paper's chain, exact",
    ) -> None:
        batch = config.batch_size_per_gpu * config.grad_accum
        self.source = source
        self._plan = EpochPlan(len(source), batch, config.seed, rank, world_size, config.last_batch)
        self.steps_per_epoch = self._plan.steps
        self._bad = BadImages(len(source), config.max_bad_share, source.broken)
        self.skipped = self._bad.skipped
        workers = min(config.num_workers, cpu_count())
        self._sampler = _EpochSampler(self._plan)
        self._loader: DataLoader[Any] | None = DataLoader(
            _CropDataset(config, source),
            batch_sampler=self._sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.device(device).type == "cuda",
            worker_init_fn=init_worker,
            collate_fn=_collate,
            generator=torch.Generator(),  # an epoch's start then draws nothing from the run's own
        )
        self._at_exit: Callable[[], None] | None = None
        self._run = 0
        self.description = (
            f"torchvision {torchvision.__version__} and Pillow {PIL.__version__} on CPU, "
            f"{workers} workers ({why})"
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Tensor]]:
        """The batches from start_step on; raises ValueError for a step that there is not."""
        self._sampler.start(epoch, start_step)
        self._run += 1
        return self._batches(self._run)

    def _batches(self, run: int) -> Iterator[list[Tensor]]:
        self._check(run)
        assert self._loader is not None
        if self._at_exit is None:
            gc.collect()  # See init_worker: the workers may be forked now.
        iterator = iter(self._loader)
        if self._at_exit is None and self._loader.num_workers > 0:
            # Runs before multiprocessing's own hook, which would wait for them for ever.
            self._at_exit = partial(end_workers, weakref.ref(iterator), os.getpid())
            atexit.register(self._at_exit)
        for crops, skipped in iterator:
            for index, reason in skipped:
                self._bad.add(index, self.source.path(index), reason)
            if isinstance(crops, str):
                raise DataError(crops)
            yield crops
            self._check(run)

    def _check(self, run: int) -> None:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        if run != self._run:
            raise RuntimeError("another epoch was started on this loader")

    def close(self) -> None:
        """Ends the workers."""
        self._run += 1
        self._loader = None
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit()
            self._at_exit = None


class _EpochSampler:
    """A batch sampler over (epoch, sample), so that nothing else can decide the crops."""

    def __init__(self, plan: EpochPlan) -> None:
        self._plan = plan
        self._batches: list[list[tuple[int, int]]] = []

    def start(self, epoch: int, start_step: int) -> None:
        batches = self._plan.batches(epoch, start_step)
        self._batches = [[(epoch, index) for index in batch] for batch in batches]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class _CropDataset(Dataset[Any]):
    """(epoch, sample) -> its crops, and the broken samples that it stands in for."""

    def __init__(self, config: TrainConfig, source: ImageDataset) -> None:
        self._config, self._source = config, source
        self._bad = BadImages(len(source), config.max_bad_share, source.broken)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        with quiet_pillow():
            return self._sample(*key)

    def _sample(self, epoch: int, index: int) -> _Sample:
        known = self._bad.reasons
        try:
            image, used = self._read(index)
        except DataError as error:
            return str(error), list(known.items())
        # Those it knew before too: the main process may never have got the sample that told it.
        passed = range(index, used if used >= index else used + len(self))
        skipped = [(i % len(self), known[i % len(self)]) for i in passed]
        size = (image.height, image.width)
        global_params, local_params = draw_crops(self._config, epoch, [used], [size])
        crops = [
            make_crop(image, crop, pixels)
            for params, pixels in (
                (global_params, self._config.global_crops_size),
                (local_params, self._config.local_crops_size),
            )
            for crop in params.of_sample(0)
        ]
        return crops, skipped

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image of the first good sample from index on, and which one that is."""
        while True:
            index = self._bad.next_good(index)
            try:
                return self._source.read_rgb(index), index
            except MemoryError:
                raise
            except Exception as error:  # Pillow's plugins raise all kinds on broken files.
                reason = reason_of(error)
            self._bad.add(index, self._source.path(index), reason)


def _collate(samples: list[_Sample]) -> _Sample:
    """A batch; where there were too many broken files, the text that epoch() then raises."""
    skipped = [one for _, some in samples for one in some]
    for crops, _ in samples:
        if isinstance(crops, str):
            return crops, skipped
    return default_collate([crops for crops, _ in samples]), skipped

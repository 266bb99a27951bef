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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastdino.augmentation.params import draw_crops
from fastdino.augmentation.pillow import make_crop
from fastdino.data.bad_images import BadImages
from fastdino.data.decoding import read_first_good
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import quiet_pillow
from fastdino.data.loader_base import CropLoader
from fastdino.data.workers import end_workers, init_worker
from fastdino.environment import cpu_count
from fastdino.errors import DataError

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

# Crops, or the message of a DataError; and the unreadable samples (index, reason) skipped on the
# way.
_Sample = tuple[list[Tensor] | str, list[tuple[int, str]]]


class TorchvisionLoader(CropLoader):
    """Crops made by torchvision and Pillow, bit for bit the paper's for the same draws.

    Each image is decoded once. Batches are on the CPU (pinned for CUDA).
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset, **options: Any) -> None:
        super().__init__(config, dataset, **options)
        workers = min(config.num_workers, cpu_count())
        # (epoch, index) of each batch's samples, which alone determine the crops.
        self._keys: list[list[tuple[int, int]]] = []
        self._loader: DataLoader[Any] | None = DataLoader(
            _CropDataset(config, dataset),
            batch_sampler=self._keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=init_worker,
            collate_fn=_collate,
            generator=torch.Generator(),  # so that the global generator is not advanced
        )
        self._at_exit: Callable[[], None] | None = None
        self.description = (
            f"torchvision {torchvision.__version__} and Pillow {PIL.__version__} on CPU, "
            f"{workers} workers"
        )

    def _batches(self, epoch: int, batches: list[list[int]]) -> Iterator[list[Tensor]]:
        assert self._loader is not None
        self._keys[:] = [[(epoch, index) for index in batch] for batch in batches]
        starts_workers = self._at_exit is None and self._loader.num_workers > 0
        if starts_workers:
            gc.collect()  # The workers may be forked now: see init_worker.
        iterator = iter(self._loader)
        if starts_workers:
            # Runs before multiprocessing's own hook, which would wait for the workers forever.
            self._at_exit = partial(end_workers, weakref.ref(iterator), os.getpid())
            atexit.register(self._at_exit)
        for crops, skipped in iterator:
            for index, reason in skipped:
                self._bad.add(index, self.dataset.path(index), reason)
            if isinstance(crops, str):
                raise DataError(crops)
            yield crops

    def _shut_down(self) -> None:
        self._loader = None
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit()
            self._at_exit = None


class _CropDataset(Dataset[Any]):
    """Crops of a sample, and the unreadable samples it replaces, for keys (epoch, index)."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset) -> None:
        self._config, self._dataset = config, dataset
        self._bad = BadImages(len(dataset), config.max_bad_share, dataset.broken)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        with quiet_pillow():
            return self._sample(*key)

    def _sample(self, epoch: int, index: int) -> _Sample:
        reasons = self._bad.reasons
        try:
            used, image = read_first_good(self._dataset, self._bad, index, self._dataset.read_rgb)
        except DataError as error:
            return str(error), list(reasons.items())
        # Includes samples already known as unreadable: the main process may not have received the
        # sample that reported them.
        replaced = range(index, used if used >= index else used + len(self))
        skipped = [(i % len(self), reasons[i % len(self)]) for i in replaced]
        drawn = draw_crops(self._config, epoch, [used], [(image.height, image.width)])
        sizes = (self._config.global_crops_size, self._config.local_crops_size)
        crops = [
            make_crop(image, crop, size)
            for params, size in zip(drawn, sizes, strict=True)
            for crop in params.of_sample(0)
        ]
        return crops, skipped


def _collate(samples: list[_Sample]) -> _Sample:
    """Stack the crops of a batch, or return the first DataError's message."""
    skipped = [sample for _, some in samples for sample in some]
    for crops, _ in samples:
        if isinstance(crops, str):
            return crops, skipped
    return default_collate([crops for crops, _ in samples]), skipped

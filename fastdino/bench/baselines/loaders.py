"""The data loaders that the benchmark compares; each runs in a process of its own.

A baseline is called with a number of batches, delivers them with all 2 + N crops on the device of
the run, and returns a Sample. The decoders deliver images instead of crops.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from fastdino_kernels import CropParams, multi_crop_groups
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdino.augmentation.pillow import MEAN, STD
from fastdino.bench.baselines.crop_transforms import MultiCrop, lightly_crops, paper_crops, v2_crops
from fastdino.bench.harness import Sample
from fastdino.bench.measurement import Call, device_time, synchronize
from fastdino.bench.worker_process import session_cpu_seconds
from fastdino.config import TrainConfig
from fastdino.data import build_loader, draw_crops
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import AS_STORED
from fastdino.data.loader_base import CropLoader
from fastdino.runtime import resolve_crops

# Batches per epoch of our loaders: enough that an epoch rarely ends within a round.
_STEPS = 1 << 12
# Batches whose launches fit into a GPU's queue, and an upper bound of the host's time for each. The
# GPU sleeps until they are queued.
_QUEUED, _HOST_SECONDS = 50, 4e-3
# Batches that the kernel's benchmark uses in turn: with their crops more than a GPU's L2 cache.
_ROTATED = 3
Group = tuple[CropParams, int]


@dataclass(frozen=True)
class LoaderTask:
    """Inputs of a loader; equal for all baselines."""

    dataset: ImageDataset
    config: TrainConfig
    device: str

    @property
    def on_gpu(self) -> bool:
        """Return True if the crops are delivered on a GPU."""
        return torch.device(self.device).type == "cuda"


def _since(cpu: float | None) -> float | None:
    now = session_cpu_seconds()
    return None if cpu is None or now is None else now - cpu


def training_loader(
    config: TrainConfig, images: ImageDataset, device: torch.device | str
) -> CropLoader:
    """Build the loader that a training run of this config has."""
    crops, decode = resolve_crops(config, device)
    return build_loader(config, images, crops=crops.value, decode=decode.value, device=device)


class OwnLoader:
    """One of our loaders, as in a training run.

    Raises: ModuleNotFoundError: DALI or Numba is needed and not installed.
    """

    def __init__(self, task: LoaderTask, crops: str, decode: str = "auto") -> None:
        if crops == "dali" or decode == "gpu":
            importlib.import_module("fastdino.data.loader_dali")
        elif crops == "fused" and not task.on_gpu:
            importlib.import_module("fastdino.augmentation.cpu_kernels")
        config = dataclasses.replace(task.config, crops=crops, decode=decode)
        images = np.arange(_STEPS * config.batch_size_per_gpu) % len(task.dataset)
        self._loader = training_loader(config, task.dataset.subset(images), task.device)
        self._epoch = 0

    def batches(self, number: int) -> Iterator[list[Tensor]]:
        """Yield the last `number` batches of an epoch, so that the epoch ends with them."""
        steps = self._loader.steps_per_epoch
        while number:
            count = min(number, steps)
            self._epoch += 1
            yield from self._loader.epoch(self._epoch, steps - count)
            number -= count

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()


class WorkerLoader:
    """Batches of 2 + N crops [B, 3, size, size] from the workers of torch's DataLoader."""

    def __init__(self, task: LoaderTask, crops: Callable[[TrainConfig], MultiCrop]) -> None:
        config = task.config
        self._indices = _CyclicBatches(len(task.dataset), config.batch_size_per_gpu)
        self._loader: DataLoader[Any] | None = DataLoader(
            _CropDataset(crops(config), task.dataset),
            batch_sampler=self._indices,
            num_workers=config.num_workers,
            persistent_workers=True,
            pin_memory=task.on_gpu,
        )

    def batches(self, number: int) -> Iterator[list[Tensor]]:
        """Yield `number` batches."""
        assert self._loader is not None
        self._indices.number = number
        yield from self._loader

    def close(self) -> None:
        """End the workers."""
        self._loader = None


class _CropDataset(Dataset[Sequence[Tensor]]):
    def __init__(self, crops: MultiCrop, dataset: ImageDataset) -> None:
        self._crops, self._dataset = crops, dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        """Return the crops of one image."""
        return self._crops(self._dataset.read_rgb(index))


class _CyclicBatches:
    """Batch sampler that repeats the images; each iteration yields `number` batches."""

    def __init__(self, images: int, batch: int) -> None:
        self._images, self._batch, self._next = images, batch, 0
        self.number = 0

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.number):
            batch = range(self._next, self._next + self._batch)
            self._next += self._batch
            yield [index % self._images for index in batch]

    def __len__(self) -> int:
        return self.number


class Decoding:
    """Decoded images from files in memory, without crops."""

    def __init__(self, task: LoaderTask, decode: Callable[[list[bytes]], Any]) -> None:
        self._files = [task.dataset.read_bytes(i) for i in range(len(task.dataset))]
        self._indices = _CyclicBatches(len(self._files), task.config.batch_size_per_gpu)
        self._decode = decode

    def batches(self, number: int) -> Iterator[Any]:
        """Yield `number` batches of images."""
        self._indices.number = number
        for batch in self._indices:
            yield self._decode([self._files[i] for i in batch])

    def close(self) -> None:
        """Do nothing: the threads end with the process."""


def _pillow_decoding(task: LoaderTask) -> Decoding:
    pool = ThreadPoolExecutor(task.config.num_workers)

    def decode(files: list[bytes]) -> list[NDArray[np.uint8]]:
        return list(pool.map(lambda file: np.asarray(AS_STORED.decode(file)), files))

    return Decoding(task, decode)


def _dali_decoding(task: LoaderTask) -> Decoding:
    from fastdino.data.dali_decoding import DaliDecoder

    decoder = DaliDecoder(task.config.batch_size_per_gpu, task.config.num_workers)
    return Decoding(task, decoder.decode)


# Each yields batches on request, without working before the first or after the last one.
BatchMaker = OwnLoader | WorkerLoader | Decoding


class Delivery:
    """Measure the delivery of batches: images, wall seconds, CPU seconds of all processes."""

    def __init__(self, maker: BatchMaker, task: LoaderTask) -> None:
        self._maker, self._task = maker, task

    def __call__(self, batches: int) -> Sample:
        """Deliver `batches` batches to the device."""
        cpu, start = session_cpu_seconds(), time.perf_counter()
        done = 0
        for batch in self._maker.batches(batches):
            if self._task.on_gpu and isinstance(batch, (list, tuple)):
                batch = [crop.to(self._task.device, non_blocking=True) for crop in batch]
            done += 1
        synchronize(torch.device(self._task.device))
        seconds = time.perf_counter() - start
        assert done == batches
        return Sample(batches * self._task.config.batch_size_per_gpu, seconds, _since(cpu))

    def close(self) -> None:
        """Close the maker."""
        self._maker.close()


class KernelTimer:
    """Measure multi_crop alone, on batches in turn whose images are already on the GPU."""

    def __init__(self, task: LoaderTask) -> None:
        self._device = torch.device(task.device)
        self._batches = itertools.cycle([self._batch(task, number) for number in range(_ROTATED)])
        self._size = task.config.batch_size_per_gpu

    def __call__(self, batches: int) -> Sample:
        """Make the crops of `batches` batches; the seconds are the GPU's, without gaps."""
        cpu, seconds = session_cpu_seconds(), 0.0
        for start in range(0, batches, _QUEUED):
            calls: list[Call] = [self.make] * min(_QUEUED, batches - start)
            sleep = _HOST_SECONDS * len(calls)
            seconds += len(calls) * device_time(calls, self._device, sleep).seconds
        return Sample(batches * self._size, seconds, _since(cpu))

    def make(self) -> list[Tensor]:
        """Make the global and the local crops of the next batch, [B, N, 3, size, size] each."""
        images, groups = next(self._batches)
        return multi_crop_groups(images, groups, mean=MEAN, std=STD)

    def _batch(self, task: LoaderTask, number: int) -> tuple[list[Tensor], list[Group]]:
        """Return the images of a batch, and the parameters and the size of both kinds of crops."""
        config, dataset = task.config, task.dataset
        count = config.batch_size_per_gpu
        indices = np.arange(number * count, (number + 1) * count) % len(dataset)
        images = [np.array(dataset.read_rgb(int(i))) for i in indices]
        drawn = draw_crops(config, 0, indices, [image.shape[:2] for image in images])
        sizes = (config.global_crops_size, config.local_crops_size)
        on_device = [torch.from_numpy(image).to(self._device) for image in images]
        return on_device, list(zip(drawn, sizes, strict=True))


@dataclass(frozen=True)
class LoaderBaseline:
    """A loader of the benchmark.

    make: builds what delivers the batches; the kernel measures itself.
    title: for the report. pixels: relation of the crops to the paper's.
    """

    make: Callable[[LoaderTask], BatchMaker | KernelTimer]
    title: str
    pixels: str = ""


BASE = "paper"
BASELINES = {
    BASE: LoaderBaseline(
        partial(WorkerLoader, crops=paper_crops),
        "the paper's loader: torchvision's transforms on PIL images, DataLoader workers",
        "the reference",
    ),
    "lightly": LoaderBaseline(
        partial(WorkerLoader, crops=lightly_crops),
        "lightly's DINOTransform, DataLoader workers",
        "near",
    ),
    "torchvision-v2": LoaderBaseline(
        partial(WorkerLoader, crops=v2_crops),
        "torchvision's v2 transforms on uint8 tensors, DataLoader workers",
        "near",
    ),
    "torchvision": LoaderBaseline(
        partial(OwnLoader, crops="torchvision"), "ours, --crops torchvision", "equal"
    ),
    "dali": LoaderBaseline(partial(OwnLoader, crops="dali"), "ours, --crops dali", "near"),
    "fused": LoaderBaseline(partial(OwnLoader, crops="fused"), "ours, --crops fused", "equal"),
    "fused-pillow": LoaderBaseline(
        partial(OwnLoader, crops="fused", decode="pillow"),
        "ours, --crops fused --decode pillow",
        "equal",
    ),
    "fused-nvjpeg": LoaderBaseline(
        partial(OwnLoader, crops="fused", decode="gpu"), "ours, --crops fused --decode gpu", "near"
    ),
    "decode-pillow": LoaderBaseline(
        _pillow_decoding, "Pillow's decoding alone, from memory, threads"
    ),
    "decode-dali": LoaderBaseline(
        _dali_decoding, "DALI's decoding alone on the CPU, from memory, threads"
    ),
    "kernel": LoaderBaseline(
        KernelTimer, "multi_crop alone, on decoded images on the GPU", "equal"
    ),
}
GPU_ONLY = ("fused-nvjpeg", "kernel")


def start_loader(name: str, task: LoaderTask) -> Callable[[int], Sample]:
    """Build the measurement of a baseline in this process."""
    made = BASELINES[name].make(task)
    return made if isinstance(made, KernelTimer) else Delivery(made, task)

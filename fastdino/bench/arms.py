"""What the benchmark of loaders compares. Each arm runs in a process of its own.

An arm is called with a number of batches, delivers them, all 2 + N crops of each, on the device of
the run, and returns a Sample. The decoders deliver pictures, not crops.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from fastdino_kernels import CropParams, multi_crop
from numpy.typing import NDArray
from torch import Tensor

from fastdino.augmentation.pillow import MEAN, STD
from fastdino.bench.isolated import session_cpu_seconds
from fastdino.bench.rivals import (
    DataLoaderArm,
    MultiCrop,
    lightly_crops,
    paper_crops,
    v2_crops,
)
from fastdino.bench.timing import Sample
from fastdino.config import TrainConfig
from fastdino.data import build_loader, draw_crops
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import decode_rgb
from fastdino.runtime import resolve_crops

# Batches of our loaders' epochs: as good as never does one end within a round.
_STEPS = 1 << 12


@dataclass(frozen=True)
class Task:
    """The same for every arm: the images, the crops, the batch, the workers, and where they go."""

    source: ImageDataset
    config: TrainConfig
    device: str

    @property
    def on_gpu(self) -> bool:
        """Whether the crops are wanted on a GPU."""
        return torch.device(self.device).type == "cuda"


class Maker(Protocol):
    """What makes an arm's batches."""

    def batches(self, number: int) -> Iterator[Any]:
        """So many batches, from the first request to the last: nothing is made before or after."""
        ...

    def close(self) -> None:
        """Ends threads and processes."""
        ...


class Delivery:
    """Counts what a maker delivers: images, wall seconds, CPU seconds of all its processes."""

    def __init__(self, maker: Maker, task: Task) -> None:
        self._maker, self._task = maker, task

    def __call__(self, batches: int) -> Sample:
        """Delivers so many batches to the device."""
        cpu, start = session_cpu_seconds(), time.perf_counter()
        done = 0
        for batch in self._maker.batches(batches):
            if self._task.on_gpu and isinstance(batch, (list, tuple)):
                batch = [crop.to(self._task.device, non_blocking=True) for crop in batch]
            done += 1
        if self._task.on_gpu:
            torch.cuda.synchronize(self._task.device)
        seconds, cpu_after = time.perf_counter() - start, session_cpu_seconds()
        assert done == batches
        used = None if cpu is None or cpu_after is None else cpu_after - cpu
        return Sample(batches * self._task.config.batch_size_per_gpu, seconds, used)

    def close(self) -> None:
        """Ends the maker."""
        self._maker.close()


class OwnLoader:
    """One of our loaders, as a run has it.

    Raises: ModuleNotFoundError: it needs DALI or Numba, which is not there.
    """

    def __init__(self, task: Task, crops: str, decode: str = "auto") -> None:
        if crops == "dali" or decode == "gpu":
            importlib.import_module("fastdino.data.loader_dali")
        elif crops == "fused" and not task.on_gpu:
            importlib.import_module("fastdino.augmentation.cpu_kernels")
        config = dataclasses.replace(task.config, crops=crops, decode=decode)
        images = np.arange(_STEPS * config.batch_size_per_gpu) % len(task.source)
        backend, decoder = resolve_crops(config, task.device)
        self._loader = build_loader(
            config,
            task.source.subset(images),
            crops=backend.value,
            decode=decoder.value,
            device=task.device,
        )
        self._epoch = 0

    def batches(self, number: int) -> Iterator[list[Tensor]]:
        """The last ones of an epoch, so that it ends with them."""
        steps = self._loader.steps_per_epoch
        while number:
            taken = min(number, steps)
            self._epoch += 1
            yield from self._loader.epoch(self._epoch, steps - taken)
            number -= taken

    def close(self) -> None:
        """Ends the loader."""
        self._loader.close()


class Decoding:
    """Pictures of files in memory, a batch at a time; no crops."""

    def __init__(self, task: Task, decode: Callable[[list[bytes]], Any]) -> None:
        self._files = [task.source.read_bytes(i) for i in range(len(task.source))]
        self._batch, self._next = task.config.batch_size_per_gpu, 0
        self._decode = decode

    def batches(self, number: int) -> Iterator[Any]:
        """So many batches of pictures."""
        for _ in range(number):
            indices = range(self._next, self._next + self._batch)
            self._next += self._batch
            yield self._decode([self._files[i % len(self._files)] for i in indices])

    def close(self) -> None:
        """Its threads end with the process."""


def _pillow(task: Task) -> Maker:
    pool = ThreadPoolExecutor(task.config.num_workers)

    def decode(files: list[bytes]) -> list[NDArray[np.uint8]]:
        return list(pool.map(lambda file: np.asarray(decode_rgb(file)), files))

    return Decoding(task, decode)


def _dali(task: Task) -> Maker:
    from fastdino.data.dali_decoding import DaliDecoder

    decoder = DaliDecoder(task.config.batch_size_per_gpu, task.config.num_workers)
    return Decoding(task, decoder.decode)


class KernelAlone:
    """multi_crop on images and parameters that lie on the GPU already: the work of the kernel."""

    def __init__(self, task: Task) -> None:
        config, source = task.config, task.source
        indices = np.arange(config.batch_size_per_gpu) % len(source)
        pictures = [np.array(source.read_rgb(int(i))) for i in indices]
        self._images = [torch.from_numpy(picture).to(task.device) for picture in pictures]
        drawn = draw_crops(config, 0, indices, [picture.shape[:2] for picture in pictures])
        sizes = (config.global_crops_size, config.local_crops_size)
        self._launches = [
            (_on(task.device, params), size)
            for params, size in zip(drawn, sizes, strict=True)
            if params.top.shape[1]
        ]

    def __call__(self, batches: int) -> Sample:
        """Makes the crops of so many batches; the seconds are the GPU's."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cpu = session_cpu_seconds()
        begin.record()
        for _ in range(batches):
            self._make()
        end.record()
        end.synchronize()
        after = session_cpu_seconds()
        used = None if cpu is None or after is None else after - cpu
        return Sample(batches * len(self._images), begin.elapsed_time(end) * 1e-3, used)

    def _make(self) -> list[Tensor]:
        return [
            multi_crop(self._images, params, size=size, mean=MEAN, std=STD)
            for params, size in self._launches
        ]


def _on(device: str, params: CropParams) -> CropParams:
    moved = {
        field.name: getattr(params, field.name).to(device) for field in dataclasses.fields(params)
    }
    return CropParams(**moved)


def _in_data_loader(crops: Callable[[TrainConfig], MultiCrop], task: Task) -> Maker:
    return DataLoaderArm(crops(task.config), task.source, task.config, pin_memory=task.on_gpu)


@dataclass(frozen=True)
class Arm:
    """make: from the task, what delivers or, for the kernel, what measures itself.

    what: for the table. pixels: how near its crops are to the paper's.
    """

    make: Callable[[Task], Maker | KernelAlone]
    what: str
    pixels: str = ""


BASE = "paper"
ARMS = {
    BASE: Arm(
        partial(_in_data_loader, paper_crops),
        "the paper's loader: torchvision's transforms on PIL images, DataLoader workers",
        "the reference",
    ),
    "lightly": Arm(
        partial(_in_data_loader, lightly_crops),
        "lightly's DINOTransform, DataLoader workers",
        "near",
    ),
    "torchvision-v2": Arm(
        partial(_in_data_loader, v2_crops),
        "torchvision's v2 transforms on uint8 tensors, DataLoader workers",
        "near",
    ),
    "torchvision": Arm(
        partial(OwnLoader, crops="torchvision"), "ours, --crops torchvision", "equal"
    ),
    "dali": Arm(partial(OwnLoader, crops="dali"), "ours, --crops dali", "near"),
    "fused": Arm(partial(OwnLoader, crops="fused"), "ours, --crops fused", "equal"),
    "fused-pillow": Arm(
        partial(OwnLoader, crops="fused", decode="pillow"),
        "ours, --crops fused --decode pillow",
        "equal",
    ),
    "fused-nvjpeg": Arm(
        partial(OwnLoader, crops="fused", decode="gpu"), "ours, --crops fused --decode gpu", "near"
    ),
    "decode-pillow": Arm(_pillow, "Pillow's decoding alone, from memory, threads"),
    "decode-dali": Arm(_dali, "DALI's decoding alone on the CPU, from memory, threads"),
    "kernel": Arm(KernelAlone, "multi_crop alone, on decoded images on the GPU", "equal"),
}
# Those that only a GPU can run.
GPU_ARMS = ("fused-nvjpeg", "kernel")


def start_arm(name: str, task: Task) -> Callable[[int], Sample]:
    """What measures an arm, in this process."""
    made = ARMS[name].make(task)
    return made if isinstance(made, KernelAlone) else Delivery(made, task)

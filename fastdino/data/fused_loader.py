"""Exact crops at full speed: decoded by threads, all crops of an image made in one pass.

On a CPU run fused.py makes them, in the same threads; on a CUDA run the kernel multi_crop does, on
a stream of its own, so that copies and crops overlap the training step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from fastdino_kernels import multi_crop
from numpy.typing import NDArray
from torch import Tensor

from fastdino.data.broken import BadFiles
from fastdino.data.crops import CropParams, draw_crops
from fastdino.data.order import EpochPlan
from fastdino.data.pil import MEAN, STD
from fastdino.data.reading import reason_of, silence_pillow
from fastdino.data.sources import ImageSource, cpu_count

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

_AHEAD = 2  # batches under way beyond the one that is waited for
_ALIGNMENT = 16  # bytes, of an image in the memory of its batch
_Image = NDArray[np.uint8]
# What was drawn for crops of one resolution, and their side in pixels.
_Drawn = tuple[CropParams, int]


class FusedLoader:
    """Crops from one pass over each image, bit for bit the paper's for the same draws.

    Each image is decoded once, by Pillow. One that cannot be decoded gives way to the next good one
    and is named in `skipped`.
    Batches: 2 + N tensors [B, 3, size, size], fp32, on `device`.
    One epoch at a time: starting another ends the one before.

    Raises: DataError: fewer images than a batch; in the run, more than max_bad_share broken ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: ImageSource,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        why: str = "exact",
    ) -> None:
        self._config, self.source = config, source
        batch = config.batch_size_per_gpu * config.grad_accum
        self._plan = EpochPlan(len(source), batch, config.seed, rank, world_size, config.last_batch)
        self.steps_per_epoch = self._plan.steps
        self._bad = BadFiles(len(source), config.max_bad_share, source.broken)
        self.skipped = self._bad.skipped
        threads = max(1, min(config.num_workers, cpu_count()))
        self._threads = ThreadPoolExecutor(threads)  # a task for each image
        self._preparers = ThreadPoolExecutor(_AHEAD)  # of batches
        self._waiting: deque[Future[_Batch]] = deque()
        self._run = 0
        self._closed = False
        self._maker: _Maker
        if torch.device(device).type == "cuda":
            self._maker = _OnGpu(torch.device(device))
        else:
            self._maker = _OnCpu(self._threads)
        self.description = f"fused, {self._maker.name}, {threads} threads ({why})"

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Tensor]]:
        """The batches from start_step on; raises ValueError for a step that there is not."""
        batches = self._plan.batches(epoch, start_step)
        self._stop()
        return self._batches(self._run, epoch, batches)

    def close(self) -> None:
        """Ends the threads."""
        self._stop()
        self._closed = True
        self._preparers.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._preparers.shutdown(wait=True)

    def _stop(self) -> None:
        """Ends the epoch that is under way."""
        self._run += 1
        while self._waiting:
            self._waiting.pop().cancel()

    def _check(self, run: int) -> None:
        if self._closed:
            raise RuntimeError("the loader is closed")
        if run != self._run:
            raise RuntimeError("another epoch was started on this loader")

    def _batches(self, run: int, epoch: int, batches: list[list[int]]) -> Iterator[list[Tensor]]:
        self._check(run)
        silence_pillow()  # here, as a thread cannot do it for itself alone
        for step in range(len(batches)):
            ahead = batches[step + len(self._waiting) : step + 1 + _AHEAD]
            self._waiting += [self._preparers.submit(self._prepare, epoch, one) for one in ahead]
            batch = self._waiting.popleft().result()
            yield batch.take()
            self._check(run)

    def _prepare(self, epoch: int, batch: list[int]) -> _Batch:
        indices, images = zip(*self._threads.map(self._read, batch), strict=True)
        drawn = draw_crops(self._config, epoch, indices, [image.shape[:2] for image in images])
        sizes = (self._config.global_crops_size, self._config.local_crops_size)
        return self._maker.make(images, list(zip(drawn, sizes, strict=True)))

    def _read(self, index: int) -> tuple[int, _Image]:
        """The first good sample from index on: its place, and the picture [height, width, 3]."""
        while True:
            index = self._bad.good(index)
            try:
                return index, np.asarray(self.source.read_rgb(index))
            except MemoryError:
                raise
            except Exception as error:  # Pillow's plugins raise all kinds on broken files.
                reason = reason_of(error)
            self._bad.add(index, self.source.paths[index], reason)


@dataclass
class _Batch:
    """The crops; from a GPU, with the event after which they are there."""

    crops: list[Tensor]
    made: torch.cuda.Event | None = None

    def take(self) -> list[Tensor]:
        """The crops, for the current stream."""
        if self.made is not None:
            stream = torch.cuda.current_stream(self.crops[0].device)
            stream.wait_event(self.made)
            for crop in self.crops:
                crop.record_stream(stream)  # so that their memory is not reused before it is done
        return self.crops


class _Maker(Protocol):
    """Makes the crops of a batch; called from several threads."""

    name: str

    def make(self, images: Sequence[_Image], drawn: Sequence[_Drawn]) -> _Batch: ...


class _OnCpu:
    """Crops by fused.py in the threads of a pool."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        from fastdino.data.fused import fused_crops  # needs Numba, which a CUDA run does not

        self.name = f"Numba {version('numba')} on CPU"
        self._pool, self._fused_crops = pool, fused_crops

    def make(self, images: Sequence[_Image], drawn: Sequence[_Drawn]) -> _Batch:
        # One by one, so that each crop's tensor is contiguous.
        single = [
            (_crop_of(params, n), size)
            for params, size in drawn
            for n in range(params.top.shape[1])
        ]
        crops = self._fused_crops(images, single, mean=MEAN, std=STD, pool=self._pool)
        return _Batch([crop.squeeze(1) for crop in crops])


def _crop_of(params: CropParams, n: int) -> CropParams:
    """Crop n alone, [B, 1]."""
    return CropParams(
        **{field.name: getattr(params, field.name)[:, n : n + 1] for field in fields(params)}
    )


class _OnGpu:
    """Crops by fastdino_kernels.multi_crop, in one launch a resolution, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()  # Triton compiles at the first launch: in one thread
        self.name = f"Triton {version('triton')} on {self._device}"

    def make(self, images: Sequence[_Image], drawn: Sequence[_Drawn]) -> _Batch:
        pinned, places = _packed(images)
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            memory = pinned.to(self._device, non_blocking=True)
            decoded = [
                memory[start : start + image.size].view(image.shape)
                for start, image in zip(places, images, strict=True)
            ]
            crops = [
                crop
                for params, size in drawn
                for crop in _crops(decoded, params, size).transpose(0, 1).contiguous()
            ]
            made = torch.cuda.Event()
            made.record(self._stream)
        return _Batch(crops, made)


def _packed(images: Sequence[_Image]) -> tuple[Tensor, list[int]]:
    """All images in one piece of pinned memory, to travel in one copy, and where each begins."""
    places, end = [], 0
    for image in images:
        places.append(end)
        end += -(-image.size // _ALIGNMENT) * _ALIGNMENT
    # Its allocator waits for the copy before it gives the memory to another batch.
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    flat = pinned.numpy()
    for start, image in zip(places, images, strict=True):
        flat[start : start + image.size] = image.reshape(-1)
    return pinned, places


def _crops(images: Sequence[Tensor], params: CropParams, size: int) -> Tensor:
    return multi_crop(images, params, size=size, mean=MEAN, std=STD, impl="triton")

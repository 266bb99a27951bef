"""Exact crops at full speed: decoded by threads, all crops of an image made in one pass.

On a CPU run fused.py makes them, in the same threads; on a CUDA run the kernel multi_crop does, on
a stream of its own, so that copies and crops overlap the training step.

The main thread may capture that step in a CUDA graph meanwhile, with capture_error_mode
"thread_local": all that a background thread does on the GPU is on the loader's stream, pinned
memory is allocated while batches still grow and then used again, and of the loader's work the main
thread itself does take() alone, between steps.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import numpy as np
import PIL
import torch
from fastdino_kernels import multi_crop
from torch import Tensor

from fastdino.augmentation.params import CropParams, draw_crops
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data.bad_images import BadImages
from fastdino.data.decoding import Decoder, Picture, PictureReader
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import silence_pillow
from fastdino.data.sampler import EpochPlan
from fastdino.environment import cpu_count

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

_AHEAD = 2  # batches under way beyond the one that is waited for
_ALIGNMENT = 16  # bytes, of an image in the memory of its batch
# What was drawn for crops of one resolution, and their side in pixels.
_Drawn = tuple[CropParams, int]


class FusedLoader:
    """Crops from one pass over each image, bit for bit the paper's for the same draws.

    Each image is decoded once, as `decode` says: "pillow", "dali" (on the CPU, the same pixels) or
    "nvjpeg" (on the GPU, near ones: the crops are then exact for these). One that cannot be decoded
    gives way to the next good one and is named in `skipped`.
    Batches: 2 + N tensors [B, 3, size, size], fp32, on `device`.
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
        why: str = "exact",
        decode: str = "pillow",
        why_decode: str = "exact",
    ) -> None:
        self._config, self.source = config, source
        batch = config.batch_size_per_gpu * config.grad_accum
        self._plan = EpochPlan(len(source), batch, config.seed, rank, world_size, config.last_batch)
        self.steps_per_epoch = self._plan.steps
        self._bad = BadImages(len(source), config.max_bad_share, source.broken)
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
        self._decoder: Decoder | None = None
        if decode != "pillow":
            from fastdino.data.dali_decoding import DaliDecoder  # DALI may be absent

            self._decoder = DaliDecoder(
                batch,
                threads,
                stream=self._maker.stream if decode == "nvjpeg" else None,
                hw_decoder_load=config.hw_decoder_load,
            )
        self._reader = PictureReader(source, self._bad, self._threads, self._decoder)
        decoder = self._decoder.name if self._decoder else f"Pillow {PIL.__version__}"
        self.description = (
            f"fused, {self._maker.name}, {threads} threads ({why}), "
            f"decoded by {decoder} ({why_decode})"
        )

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
        self._maker.close()
        if self._decoder is not None:
            self._decoder.close()

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
        indices, pictures = self._reader.read(batch)
        sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
        drawn = draw_crops(self._config, epoch, indices, sizes)
        sides = (self._config.global_crops_size, self._config.local_crops_size)
        return self._maker.make(pictures, list(zip(drawn, sides, strict=True)))


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
    """Makes the crops of a batch; called from several threads.

    stream: what the crops are made on, and the pictures have to be there for; None on the CPU.
    """

    name: str
    stream: torch.cuda.Stream | None

    def make(self, pictures: Sequence[Picture], drawn: Sequence[_Drawn]) -> _Batch: ...

    def close(self) -> None: ...


class _OnCpu:
    """Crops by fused.py in the threads of a pool."""

    stream: torch.cuda.Stream | None = None

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        from fastdino.augmentation.cpu import fused_crops  # needs Numba, which a CUDA run does not

        self.name = f"Numba {version('numba')} on CPU"
        self._pool, self._fused_crops = pool, fused_crops

    def make(self, pictures: Sequence[Picture], drawn: Sequence[_Drawn]) -> _Batch:
        arrays = [picture for picture in pictures if isinstance(picture, np.ndarray)]
        # One by one, so that each crop's tensor is contiguous.
        single = [
            (_crop_of(params, n), size)
            for params, size in drawn
            for n in range(params.top.shape[1])
        ]
        crops = self._fused_crops(arrays, single, mean=MEAN, std=STD, pool=self._pool)
        return _Batch([crop.squeeze(1) for crop in crops])

    def close(self) -> None:
        pass


def _crop_of(params: CropParams, n: int) -> CropParams:
    """Crop n alone, [B, 1]."""
    return CropParams(
        **{field.name: getattr(params, field.name)[:, n : n + 1] for field in fields(params)}
    )


class _OnGpu:
    """Crops by fastdino_kernels.multi_crop, in one launch a resolution, on a stream of its own.

    What keeps memory from being used again too early:
    - pinned memory: _Staging waits for the event after the copy that read it last;
    - the copied pictures: allocated and freed on the stream that works on them;
    - a decoder's pictures on the GPU: held until the event after their crops has passed;
    - the crops: _Batch.take() records the stream that goes on with them.
    """

    stream: torch.cuda.Stream | None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self.stream = self._stream = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()  # Triton compiles at the first launch: in one thread
        self._staging = _Staging()
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self.name = f"Triton {version('triton')} on {self._device}"

    def make(self, pictures: Sequence[Picture], drawn: Sequence[_Drawn]) -> _Batch:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            on_gpu = self._staging.upload(pictures, self._device)
            with self._lock:
                self._release(_AHEAD)
                crops = [
                    crop
                    for params, size in drawn
                    for crop in _crops(on_gpu, params, size).transpose(0, 1).contiguous()
                ]
                made = self._stream.record_event()
                self._held.append((made, [p for p in pictures if isinstance(p, Tensor)]))
        return _Batch(crops, made)

    def _release(self, keep: int) -> None:
        """Drops the pictures whose crops are made, and waits for more than `keep` batches."""
        while self._held and (len(self._held) > keep or self._held[0][0].query()):
            self._held[0][0].synchronize()
            self._held.popleft()

    def close(self) -> None:
        with self._lock:
            self._release(0)


class _Staging(threading.local):
    """Pinned memory of one thread, through which pictures go to a GPU: used for batch after batch.

    A thread's own, so that another can fill its own meanwhile.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def upload(self, pictures: Sequence[Picture], device: torch.device) -> list[Tensor]:
        """The pictures on the device, in one copy on the current stream; those there as they are.

        They are good for that stream.
        """
        arrays = [picture for picture in pictures if isinstance(picture, np.ndarray)]
        places, end = _places([array.size for array in arrays])
        if self._copied is not None:
            self._copied.synchronize()
        if end > len(self._memory):
            # With room for batches somewhat larger: in the long run none is allocated.
            self._memory = torch.empty(end + end // 4, dtype=torch.uint8, pin_memory=True)
        flat = self._memory.numpy()
        for start, array in zip(places, arrays, strict=True):
            flat[start : start + array.size] = array.reshape(-1)
        copied = self._memory[:end].to(device, non_blocking=True)
        self._copied = torch.cuda.current_stream(device).record_event()
        uploaded = (
            copied[start : start + array.size].view(array.shape)
            for start, array in zip(places, arrays, strict=True)
        )
        return [next(uploaded) if isinstance(p, np.ndarray) else p for p in pictures]


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of several pieces begins, aligned, in one piece of memory; and where that ends."""
    ends = itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
    *places, end = ends
    return places, end


def _crops(pictures: Sequence[Tensor], params: CropParams, size: int) -> Tensor:
    """Of params on the CPU, whose values multi_crop therefore checks before it copies them."""
    return multi_crop(pictures, params, size=size, mean=MEAN, std=STD, impl="triton")

"""The loader of --crops fused: exact crops, made in one pass over each decoded image.

On the CPU, augmentation/cpu.py makes the crops in the threads that decode. On a CUDA device, the
kernel multi_crop makes them on a separate stream, so that copies and crops overlap the training
step.

The main thread may meanwhile capture that step in a CUDA graph with capture_error_mode
"thread_local". Background threads therefore use only the loader's stream, pinned memory is
allocated only while batches still grow and reused afterwards, and the main thread does no loader
work on the GPU except take(), between steps.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
from fastdino_kernels import multi_crop_groups
from torch import Tensor

from fastdino.augmentation.params import CropParams, draw_crops, select
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data.decoding import Decoder, Picture, PictureReader
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.loader_base import AHEAD, ThreadedLoader

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

_ALIGNMENT = 16  # bytes, of each image in the memory of its batch
# Parameters of crops of one resolution, and their side in pixels.
_Drawn = tuple[CropParams, int]


class FusedLoader(ThreadedLoader["_Batch"]):
    """Crops made in one pass over each image, bit for bit the paper's for the same draws.

    Each image is decoded once. `decode` is "pillow", "cpu" (DALI, the same pixels) or "gpu"
    (nvJPEG, similar pixels: the crops are then exact for these). Batches are on `device`.
    """

    def __init__(
        self, config: TrainConfig, dataset: ImageDataset, *, decode: str = "pillow", **options: Any
    ) -> None:
        super().__init__(config, dataset, **options)
        self._backend: _CpuBackend | _CudaBackend
        if self._device.type == "cuda":
            self._backend = _CudaBackend(self._device)
        else:
            self._backend = _CpuBackend(self._threads)
        self._decoder: Decoder | None = None
        if decode != "pillow":
            from fastdino.data.dali_decoding import DaliDecoder  # DALI is optional

            self._decoder = DaliDecoder(
                self._batch_size,
                self._num_threads,
                stream=self._backend.stream if decode == "gpu" else None,
                hw_decoder_load=config.hw_decoder_load,
            )
        self._reader = PictureReader(dataset, self._bad, self._threads, self._decoder)
        decoder = self._decoder.name if self._decoder else f"Pillow {PIL.__version__}"
        self.description = (
            f"{self._backend.name}, {self._num_threads} threads, decoded by {decoder}"
        )

    def _batches(self, epoch: int, batches: list[list[int]]) -> Iterator[list[Tensor]]:
        for batch in self._prefetch(epoch, batches):
            yield batch.take()

    def _shut_down(self) -> None:
        super()._shut_down()
        self._backend.close()
        if self._decoder is not None:
            self._decoder.close()

    def _prepare(self, epoch: int, batch: list[int]) -> _Batch:
        indices, pictures = self._reader.read(batch)
        sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
        drawn = draw_crops(self._config, epoch, indices, sizes)
        sides = (self._config.global_crops_size, self._config.local_crops_size)
        return self._backend.make(pictures, list(zip(drawn, sides, strict=True)))


@dataclass
class _Batch:
    """The crops and, on a GPU, the event that marks them complete."""

    crops: list[Tensor]
    complete: torch.cuda.Event | None = None

    def take(self) -> list[Tensor]:
        """Return the crops for use on the current stream."""
        if self.complete is not None:
            stream = torch.cuda.current_stream(self.crops[0].device)
            stream.wait_event(self.complete)
            for crop in self.crops:
                crop.record_stream(stream)  # keeps their memory until the stream has used them
        return self.crops


class _CpuBackend:
    """Crops made by augmentation/cpu.py in the threads of a pool; called from several threads."""

    stream = None

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        from fastdino.augmentation.cpu import fused_crops  # imports Numba; a CUDA run needs none

        self.name = f"Numba {version('numba')} on CPU"
        self._pool, self._fused_crops = pool, fused_crops

    def make(self, pictures: Sequence[Picture], drawn: Sequence[_Drawn]) -> _Batch:
        arrays = [picture for picture in pictures if isinstance(picture, np.ndarray)]
        # One at a time, so that the tensor of each crop is contiguous.
        single = [
            (select(params, crops=slice(n, n + 1)), size)
            for params, size in drawn
            for n in range(params.top.shape[1])
        ]
        crops = self._fused_crops(arrays, single, pool=self._pool)
        return _Batch([crop.squeeze(1) for crop in crops])

    def close(self) -> None:
        pass


class _CudaBackend:
    """Crops made by fastdino_kernels.multi_crop_groups on a separate stream.

    It is called from several threads. Images must be ready for work on `stream`. Memory is not
    reused too early:
    - pinned memory: _Staging waits for the event after the copy that read it last;
    - the copied images: allocated and freed on the stream that reads them;
    - images that a decoder left on the GPU: held until the event after their crops;
    - the crops: _Batch.take() records the stream that uses them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()  # Triton must compile in one thread, at the first launch
        self._staging = _Staging()
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self.name = f"Triton {version('triton')} on {self._device}"

    def make(self, pictures: Sequence[Picture], drawn: Sequence[_Drawn]) -> _Batch:
        with torch.cuda.device(self._device), torch.cuda.stream(self.stream):
            on_gpu = self._staging.upload(pictures, self._device)
            with self._lock:
                self._release(AHEAD)
                crops = [
                    crop for of_one_size in _crops(on_gpu, drawn) for crop in of_one_size.unbind(1)
                ]
                complete = self.stream.record_event()
                self._held.append((complete, [p for p in pictures if isinstance(p, Tensor)]))
        return _Batch(crops, complete)

    def _release(self, keep: int) -> None:
        """Drop the images of completed batches, waiting until at most `keep` batches remain."""
        while self._held and (len(self._held) > keep or self._held[0][0].query()):
            self._held[0][0].synchronize()
            self._held.popleft()

    def close(self) -> None:
        with self._lock:
            self._release(0)


class _Staging(threading.local):
    """Pinned memory through which images are copied to a GPU, reused for every batch.

    Each thread has its own, so that several can fill theirs at once.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def upload(self, pictures: Sequence[Picture], device: torch.device) -> list[Tensor]:
        """Return the images on the device, copied at once; the current stream may use them."""
        arrays = [picture for picture in pictures if isinstance(picture, np.ndarray)]
        aligned = [-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays]
        *starts, end = itertools.accumulate(aligned, initial=0)
        if self._copied is not None:
            self._copied.synchronize()
        if end > len(self._memory):
            # Leaves room for larger batches, so that allocations soon stop.
            self._memory = torch.empty(end + end // 4, dtype=torch.uint8, pin_memory=True)
        flat = self._memory.numpy()
        for start, array in zip(starts, arrays, strict=True):
            flat[start : start + array.size] = array.reshape(-1)
        copied = self._memory[:end].to(device, non_blocking=True)
        self._copied = torch.cuda.current_stream(device).record_event()
        uploaded = (
            copied[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        )
        return [next(uploaded) if isinstance(p, np.ndarray) else p for p in pictures]


def _crops(pictures: Sequence[Tensor], drawn: Sequence[_Drawn]) -> list[Tensor]:
    """Make crops [B, N, 3, size, size] of each resolution; those of one number are contiguous.

    The parameters are on the CPU, so that their values are checked.

    Raises: ValueError: a parameter is out of range.
    """
    return multi_crop_groups(pictures, drawn, mean=MEAN, std=STD, impl="triton")

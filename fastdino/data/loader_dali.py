"""The loader of --crops dali: crops made by a DALI pipeline.

A file that cannot be decoded must never reach the pipeline, where its error can end the process.
Each file is therefore decoded on the CPU first.
"""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.augmentation import dali
from fastdino.augmentation.params import draw_crops
from fastdino.data.dali_decoding import DaliDecoder
from fastdino.data.decoding import read_first_good
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.loader_base import ThreadedLoader

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

# Formats and modes that DALI decodes to Pillow's image, unlike 16-bit gray, which it scales, or
# rotated TIFF.
_SAME_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_SAME_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK")


class DaliLoader(ThreadedLoader[dali.Batch]):
    """Crops made by a DALI pipeline on the CPU or a GPU, approximately the paper's.

    DALI decodes. A file that only Pillow decodes, or that Pillow decodes to another image, is
    passed on decoded. Batches are on the device of the pipeline.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset, **options: Any) -> None:
        super().__init__(config, dataset, **options)
        self._device_id = dali.device_index(self._device)
        self._prepared: Iterator[dali.Batch] = iter(())
        sizes = [config.global_crops_size] * 2
        sizes += [config.local_crops_size] * config.local_crops_number
        self._pipeline: Any = dali.crop_pipeline(
            lambda: next(self._prepared),
            sizes,
            dali.SOLARIZED,
            self._device_id is not None,
            dataset.conversion.exif,
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=2,
            exec_dynamic=True,
        )
        self._pipeline.build()
        self._thread = threading.local()
        # Keeps the decoders of all threads alive. A forked process frees the thread-local objects
        # of the other threads, where a pipeline's destructor would wait forever for lost threads.
        self._decoders: list[DaliDecoder] = []
        place = "CPU" if self._device_id is None else f"GPU {self._device_id}"
        self.description = f"DALI {dali.VERSION} on {place}, {self._num_threads} threads"

    def _batches(self, epoch: int, batches: list[list[int]]) -> Iterator[list[Tensor]]:
        self._drain()
        self._prepared = self._prefetch(epoch, batches)
        for _ in batches:
            yield dali.run_pipeline(self._pipeline, self._device_id)

    def _drain(self) -> None:
        """Drop the batches of an earlier epoch from the pipeline."""
        while not self._pipeline.empty():
            try:
                self._pipeline.run()
            except StopIteration:
                break
        self._pipeline.reset()

    def _stop(self) -> None:
        super()._stop()
        self._prepared = iter(())

    def _shut_down(self) -> None:
        super()._shut_down()
        self._pipeline = None
        for decoder in self._decoders:
            decoder.close()
        gc.collect()  # Frees the pipeline now: in a process forked later its destructor would hang.

    def _prepare(self, epoch: int, batch: list[int]) -> dali.Batch:
        indices, loaded = zip(*self._threads.map(self._read, batch), strict=True)
        sizes, images = zip(*loaded, strict=True)
        return dali.pack_batch(
            images, draw_crops(self._config, epoch, indices, sizes), dali.SOLARIZED
        )

    def _read(self, index: int) -> tuple[int, tuple[tuple[int, int], NDArray[np.uint8]]]:
        return read_first_good(self.dataset, self._bad, index, self._load)

    def _load(self, index: int) -> tuple[tuple[int, int], NDArray[np.uint8]]:
        """Return (height, width), and the pixels; for a GPU, which decodes again, a file."""
        data, conversion = self.dataset.read_bytes(index), self.dataset.conversion
        encoded = np.frombuffer(data, np.uint8)
        with Image.open(io.BytesIO(data)) as image:
            same = image.format in _SAME_FORMATS and image.mode in _SAME_MODES
            pixels = self._decode(data) if same else None
            if pixels is None:
                pixels = np.asarray(conversion.apply(image))
                if self._device_id is not None:
                    encoded = dali.as_png(pixels)
        size = (pixels.shape[0], pixels.shape[1])
        return size, pixels if self._device_id is None else encoded

    def _decode(self, data: bytes) -> NDArray[np.uint8] | None:
        """Decode a file with this thread's decoder; None if DALI refuses it."""
        decoder: DaliDecoder | None = getattr(self._thread, "decoder", None)
        if decoder is None:
            decoder = self._thread.decoder = DaliDecoder(1, 1, exif=self.dataset.conversion.exif)
            self._decoders.append(decoder)
        (pixels,) = decoder.decode([data])
        assert not isinstance(pixels, Tensor)
        return pixels

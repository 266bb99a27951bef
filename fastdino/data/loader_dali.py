"""Crops made by NVIDIA DALI's operators.

The boxes, the flips and all that is drawn are those of crops.py. The pixels are near the paper's,
not equal to them: where nothing else is said, at most .5 of 255 levels an operation, on average.
docs/crops.md has the table.

- The four colour operations come in one order (brightness, contrast, saturation, hue) instead of a
  random one, 1 level on average, and the first three do not clip in between, 2 levels.
- Hue turns in YIQ, not in HSV: 1 level on average on pale pictures, 8 on a vivid photograph, up to
  100 in a pixel: further off, on average, than no turn at all.
- Blur is a Gaussian where PIL's is made of boxes, and reflects at the edges where PIL replicates.

No file that cannot be decoded may reach the pipeline, where its error can end the process: each is
decoded by DALI on its own first.
"""

from __future__ import annotations

import gc
import io
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import nvidia.dali
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastdino.augmentation.params import SOLARIZE_P, CropParams, draw_crops
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data.bad_images import BadImages
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import reason_of, silence_pillow, upright
from fastdino.data.sampler import EpochPlan
from fastdino.environment import cpu_count

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

VERSION: str = nvidia.dali.__version__
# What DALI is fed for a crop, in this order; _crop_inputs makes it, _crop takes it.
_CROP_INPUTS = (
    types.INT32,  # start: top, left
    types.INT32,  # shape: height, width
    types.INT32,  # flip
    types.FLOAT,  # brightness
    types.FLOAT,  # contrast
    types.FLOAT,  # saturation, 0 where the crop turns gray
    types.FLOAT,  # hue, degrees
    types.FLOAT,  # blur radius
)
# The factors of brightness, contrast, saturation and hue that change nothing.
_NEUTRAL = np.array([1, 1, 1, 0], dtype=np.float32)
# The crops that can be solarized; no local one, which share the last entry of SOLARIZE_P.
_SOLARIZED = [n for n, p in enumerate(SOLARIZE_P) if p > 0]
assert max(_SOLARIZED) < 2
_PREFETCH = 2
_AHEAD = 2
# Of what Pillow calls so, DALI makes the same picture; of 16-bit gray or turned TIFF it does not.
_SAME_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_SAME_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK")
_Batch = tuple[list[NDArray[Any]] | NDArray[Any], ...]


class DaliLoader:
    """Crops from a DALI pipeline, on the CPU, or on the GPU that `device` names.

    DALI decodes; a file that only Pillow decodes, or decodes to another picture, is handed over
    decoded. One that neither can decode gives way to the next good one and is named in `skipped`.
    Batches: 2 + N tensors [B, 3, size, size], fp32, where the pipeline runs.
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
        why: str = "near PIL",
    ) -> None:
        self._config, self.source = config, source
        self._batch_size = config.batch_size_per_gpu * config.grad_accum
        self._plan = EpochPlan(
            len(source), self._batch_size, config.seed, rank, world_size, config.last_batch
        )
        self.steps_per_epoch = self._plan.steps
        self._bad = BadImages(len(source), config.max_bad_share, source.broken)
        self.skipped = self._bad.skipped
        self._threads = max(1, min(config.num_workers, cpu_count()))
        self._device_id = _device_id(torch.device(device))
        self._feed = _Feed()
        self._pipeline = self._build()
        self._decoders: list[Any] = []
        self._decoder = _Decoder(source.exif, self._decoders)
        self._readers = ThreadPoolExecutor(self._threads)  # of files
        self._preparers = ThreadPoolExecutor(_AHEAD)  # of batches
        self._run = 0
        place = "CPU" if self._device_id is None else f"GPU {self._device_id}"
        self.description = f"DALI {VERSION} on {place}, {self._threads} threads ({why})"

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Tensor]]:
        """The batches from start_step on; raises ValueError for a step that there is not."""
        batches = self._plan.batches(epoch, start_step)
        self._run += 1
        return self._batches(self._run, epoch, batches)

    def close(self) -> None:
        """Ends the threads and frees the pipeline's memory."""
        self._run += 1
        self._feed.stop()
        self._preparers.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._preparers.shutdown(wait=True)
        self._pipeline = None
        self._decoders.clear()
        gc.collect()  # Frees the pipeline now: in a process forked later its destructor would hang.

    def _build(self) -> Any:
        sizes = [self._config.global_crops_size] * 2
        sizes += [self._config.local_crops_size] * self._config.local_crops_number
        pipeline = _pipeline(
            self._feed,
            sizes,
            _SOLARIZED,
            self._device_id is not None,
            self.source.exif,
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=_PREFETCH,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    def _batches(self, run: int, epoch: int, batches: list[list[int]]) -> Iterator[list[Tensor]]:
        self._check(run)
        silence_pillow()  # here, as a thread cannot do it for itself alone
        self._start(epoch, batches)
        for _ in batches:
            yield _run(self._pipeline, self._device_id)
            self._check(run)

    def _check(self, run: int) -> None:
        if self._pipeline is None:
            raise RuntimeError("the loader is closed")
        if run != self._run:
            raise RuntimeError("another epoch was started on this loader")

    def _start(self, epoch: int, batches: list[list[int]]) -> None:
        """Empties the pipeline of an earlier epoch and points it at these batches."""
        self._feed.stop()
        while not self._pipeline.empty():
            try:
                self._pipeline.run()
            except StopIteration:
                break
        self._pipeline.reset()
        self._feed.start(
            lambda step: self._preparers.submit(self._prepare, epoch, batches[step]), len(batches)
        )

    def _prepare(self, epoch: int, batch: list[int]) -> _Batch:
        """What the pipeline is fed for a batch: the images and the draws."""
        indices, sizes, images = zip(*self._readers.map(self._read, batch), strict=True)
        return _batch(images, draw_crops(self._config, epoch, indices, sizes), _SOLARIZED)

    def _read(self, index: int) -> tuple[int, tuple[int, int], NDArray[np.uint8]]:
        """The first good sample from index on: its place, (height, width), and what to feed."""
        while True:
            index = self._bad.next_good(index)
            try:
                return index, *self._load(self.source.read_bytes(index))
            except MemoryError:
                raise
            except Exception as error:  # Pillow's plugins raise all kinds on broken files.
                reason = reason_of(error)
            self._bad.add(index, self.source.path(index), reason)

    def _load(self, data: bytes) -> tuple[tuple[int, int], NDArray[np.uint8]]:
        """(height, width), and the pixels; for a GPU, which decodes again, the file or a PNG."""
        encoded, exif = np.frombuffer(data, np.uint8), self.source.exif
        with Image.open(io.BytesIO(data)) as image:
            same = image.format in _SAME_FORMATS and image.mode in _SAME_MODES
            pixels = self._decoder(encoded) if same else None
            if pixels is None:
                pixels = np.asarray(upright(image) if exif else image.convert("RGB"))
                if self._device_id is not None:
                    encoded = _as_png(pixels)
        size = (pixels.shape[0], pixels.shape[1])
        return size, pixels if self._device_id is None else encoded


def dali_crops(
    images: Sequence[NDArray[np.uint8]],
    crops: Sequence[tuple[CropParams, int]],
    *,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The crops of B decoded images at each of several sizes, by the operators of the loader.

    For comparisons: a pipeline is built for every call.

    Args:
        images: B uint8 RGB arrays [H, W, 3] of any sizes.
        crops: pairs (params, size): the parameters of [B, N] crops, on the CPU, and the pixels of
            a crop's side. draw_crops gives two of them, global and local.
        device: where the pipeline runs.

    Returns: for each pair [B, N, 3, size, size], fp32, normalised, on `device`.
    """
    counts = [params.top.shape[1] for params, _ in crops]
    sizes = [size for (_, size), count in zip(crops, counts, strict=True) for _ in range(count)]
    device_id = _device_id(torch.device(device))
    solarized = list(range(len(sizes)))
    fed = [np.ascontiguousarray(image) if device_id is None else _as_png(image) for image in images]
    batches = iter([_batch(fed, [params for params, _ in crops], solarized)])
    pipeline = _pipeline(
        lambda: next(batches),
        sizes,
        solarized,
        device_id is not None,
        False,
        batch_size=len(images),
        num_threads=cpu_count(),
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    made = iter([crop.clone() for crop in _run(pipeline, device_id)])
    del pipeline
    gc.collect()  # As in DaliLoader.close.
    return [
        torch.stack([*itertools.islice(made, count)], dim=1)
        if count
        else torch.empty(len(images), 0, 3, size, size, device=device)
        for (_, size), count in zip(crops, counts, strict=True)
    ]


class _Decoder(threading.local):
    """DALI's decoder on the CPU, for one file at a time; each thread has its own.

    `held` gets them all: a forked process drops what is its other threads' own, and there a
    pipeline's destructor waits, for ever, for threads that a fork leaves behind.
    """

    def __init__(self, exif: bool, held: list[Any]) -> None:
        self._pipeline = _decode_only(
            exif,
            batch_size=1,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        held.append(self._pipeline)

    def __call__(self, data: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The picture, [height, width, 3]; None where DALI cannot decode it."""
        try:
            (images,) = self._pipeline.run(encoded=[data])
        except RuntimeError:
            return None
        return np.array(images.at(0))


class _Feed:
    """The pipeline's source: batches prepared in the background, one call a step.

    DALI asks for _PREFETCH batches ahead of the one it returns; this stays _AHEAD ahead of that.
    """

    def __init__(self) -> None:
        self._ahead: list[Future[_Batch]] = []
        self._todo: Iterator[Future[_Batch]] = iter(())

    def start(self, submit: Callable[[int], Future[_Batch]], steps: int) -> None:
        """Feeds the batches of submit(0), ..., submit(steps - 1)."""
        self._todo = map(submit, range(steps))
        self._ahead = list(itertools.islice(self._todo, _AHEAD))

    def stop(self) -> None:
        """From here on there is nothing to feed."""
        for future in self._ahead:
            future.cancel()
        self._todo, self._ahead = iter(()), []

    def __call__(self) -> _Batch:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.pop(0).result()
        self._ahead += itertools.islice(self._todo, 1)
        return batch


def _run(pipeline: Any, device_id: int | None) -> list[Tensor]:
    """A batch of the pipeline's: one tensor [B, 3, size, size] a crop."""
    # On the stream that goes on with the crops, so that DALI reuses their memory after it.
    stream = None if device_id is None else torch.cuda.current_stream(device_id)
    return [from_dlpack(output.as_tensor()) for output in pipeline.run(stream)]


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _batch(
    images: Sequence[NDArray[np.uint8]], drawn: Sequence[CropParams], solarized: Sequence[int]
) -> _Batch:
    """What _pipeline is fed: the images, and what was drawn for their crops."""
    crops = [(params, n) for params in drawn for n in range(params.top.shape[1])]
    inputs = [params.solarize[:, n].numpy() for params, n in (crops[i] for i in solarized)]
    inputs += [values for params, n in crops for values in _crop_inputs(params, n)]
    return (list(images), *map(np.ascontiguousarray, inputs))


def _crop_inputs(params: CropParams, n: int) -> list[NDArray[Any]]:
    """Crop n of all samples as _CROP_INPUTS says: arrays [B] or [B, 2]."""
    jitter = params.jitter[:, n, None].numpy()
    factors = np.where(jitter, params.jitter_factor[:, n].numpy(), _NEUTRAL)
    return [
        torch.stack([params.top[:, n], params.left[:, n]], dim=1).numpy(),
        torch.stack([params.height[:, n], params.width[:, n]], dim=1).numpy(),
        params.flip[:, n].int().numpy(),
        factors[:, 0],
        factors[:, 1],
        np.where(params.gray[:, n].numpy(), np.float32(0), factors[:, 2]),
        factors[:, 3] * np.float32(360),
        params.blur_radius[:, n].numpy(),
    ]


def _as_png(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


@pipeline_def
def _decode_only(exif: bool) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8)
    return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=exif)


@pipeline_def(enable_conditionals=True)
def _pipeline(
    feed: Callable[[], _Batch],
    sizes: Sequence[int],
    solarized: Sequence[int],
    on_gpu: bool,
    exif: bool,
) -> Any:
    """The crops of these sizes, in pixels; those numbered in `solarized` can be solarized."""
    dtypes = [types.UINT8, *[types.BOOL] * len(solarized), *_CROP_INPUTS * len(sizes)]
    image, *inputs = fn.external_source(source=feed, num_outputs=len(dtypes), dtype=dtypes)
    solarize = {n: inputs[i] for i, n in enumerate(solarized)}
    inputs = inputs[len(solarized) :]
    if on_gpu:
        # Fancy upsampling of the chroma is what libjpeg does; here it has to be asked for.
        image = fn.decoders.image(
            image,
            device="mixed",
            output_type=types.RGB,
            adjust_orientation=exif,
            jpeg_fancy_upsampling=True,
            affine=False,  # else processes of one machine may be tied to the same few cores
        )
    else:
        image = fn.reinterpret(image, layout="HWC")
    crops = []
    for n, size in enumerate(sizes):
        drawn = inputs[n * len(_CROP_INPUTS) : (n + 1) * len(_CROP_INPUTS)]
        crops.append(_crop(image, drawn, size, solarize.get(n)))
    return tuple(crops)


def _crop(image: Any, drawn: list[Any], size: int, solarize: Any) -> Any:
    start, shape, flip, brightness, contrast, saturation, hue, radius = drawn
    image = fn.slice(image, start=start, shape=shape, axes=(0, 1))
    image = fn.resize(
        image,
        resize_x=size,
        resize_y=size,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    # Brightness b scales the mean too: b * (mean + c * (x - mean)) is contrast after brightness.
    gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    mean = fn.reductions.mean(gray).cpu()
    image = fn.brightness_contrast(
        image, brightness=brightness, contrast=contrast, contrast_center=mean
    )
    image = fn.hsv(image, hue=hue, saturation=saturation)
    if radius > 0:
        image = fn.gaussian_blur(image, sigma=radius)
    if solarize is not None:
        image = _solarize(image, solarize)
    return fn.crop_mirror_normalize(
        image,
        mirror=flip,
        mean=[255 * m for m in MEAN],
        std=[255 * s for s in STD],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _solarize(image: Any, happens: Any) -> Any:
    if happens:
        image = fn.lookup_table(
            image,
            keys=list(range(256)),
            values=[level if level < 128 else 255 - level for level in range(256)],
            dtype=types.UINT8,
        )
    return image

"""pil.make_crop and fused_pixels.crops_of_image taken apart, with a clock between the stages."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from fastdino_kernels import Crop
from fastdino_kernels.crop_params import BLUR, FACTOR, FLAGS, FLIP, GRAY, JITTER, ORDER, SOLARIZE
from fastdino_kernels.multi_crop import normalized_levels
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastdino.augmentation import cpu_kernels
from fastdino.augmentation.cpu import crops_into, scratch, transpose_image
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.bench.arms import Task
from fastdino.bench.stages import STAGES, StageTimes
from fastdino.data import draw_crops
from fastdino.data.bad_images import BadImages
from fastdino.data.decoding import Decoder, PictureReader
from fastdino.runtime import choose_decode

_IMAGES = 24
_HUE = 3  # in the numbering of CropParams.jitter_order
_ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class Laps:
    """CPU seconds of this process by stage: others that want the processor do not count."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        """What has passed since the last call belongs to no stage."""
        self._last = time.process_time()

    def __call__(self, stage: str) -> None:
        """Books what has passed since the last call."""
        now = time.process_time()
        self.seconds[stage] += now - self._last
        self._last = now


def by_pillow(image: Image.Image, crops: list[tuple[Crop, int]], lap: Laps) -> list[Tensor]:
    """The crops of a decoded image, [3, size, size] each, as pil.make_crop makes them."""
    return [_by_pillow(image, crop, size, lap) for crop, size in crops]


def _by_pillow(image: Image.Image, crop: Crop, size: int, lap: Laps) -> Tensor:
    box = (crop.top, crop.left, crop.height, crop.width)
    image = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC)
    if crop.flip:
        image = F.hflip(image)
    lap("crop + resize")
    if crop.jitter:
        for operation in crop.jitter_order:
            image = _ADJUST[operation](image, crop.jitter_factor[operation])
            lap("hue" if operation == _HUE else "other colour")
    if crop.gray:
        image = F.to_grayscale(image, num_output_channels=3)
    lap("other colour")
    if crop.blur_radius > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=crop.blur_radius))
    lap("blur")
    if crop.solarize:
        image = ImageOps.solarize(image)
    lap("other colour")
    tensor = F.normalize(F.to_tensor(image), MEAN, STD)
    lap("tensor + normalize")
    return tensor


def by_fused(
    outs: Sequence[Tensor],
    image: NDArray[np.uint8],
    packed: Sequence[Tensor],
    levels: Tensor,
    lap: Laps,
) -> None:
    """What fused.crops_into does, with its arguments."""
    turned = transpose_image(image)
    lap("crop + resize")
    for rows, out in zip(packed, outs, strict=True):
        _by_fused(turned, len(image), rows, levels.numpy(), out.numpy(), lap)


def _by_fused(
    turned: NDArray[np.uint8],
    height: int,
    rows: Tensor,
    levels: NDArray[np.float32],
    outs: NDArray[np.float32],
    lap: Laps,
) -> None:
    size = outs.shape[-1]
    plane = size * size
    bytes_, ints = cpu_kernels.scratch_sizes(height, size)
    buffer, sums = scratch("bytes", np.uint8, bytes_), scratch("sums", np.int32, ints)
    rest, rgb = buffer[: -3 * plane], buffer[-3 * plane :]
    planes = [rgb[c * plane : (c + 1) * plane] for c in range(3)]
    images = rgb.reshape(3, size, size)
    lap("clock")
    for packed, floats, out in zip(
        rows.numpy(), rows.view(torch.float32).numpy(), outs, strict=True
    ):
        flags = int(packed[FLAGS])  # the type for which crops_of_image has compiled them
        cpu_kernels.resize(turned, packed, flags & FLIP, rest, sums, images)
        lap("crop + resize")
        if flags & JITTER:
            for operation in packed[ORDER:FACTOR]:
                cpu_kernels.jitter(operation, floats[FACTOR + operation], *planes)
                lap("hue" if operation == _HUE else "other colour")
        if flags & GRAY:
            cpu_kernels.gray(*planes)
        lap("other colour")
        if floats[BLUR] > 0:
            cpu_kernels.blur(images, floats[BLUR], rest, sums)
        lap("blur")
        cpu_kernels.write(rgb.reshape(3, plane), levels, flags & SOLARIZE, out.reshape(3, plane))
        lap("tensor + normalize")


class StageClock:
    """Times both ways over some images, in turn, as a loader with one thread has them."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(1)
        config, source = task.config, task.source
        self._source, self._shown = source, range(min(len(source), _IMAGES))
        decoder: Decoder | None = None
        if choose_decode("auto", "fused", "cpu").value == "cpu":
            from fastdino.data.dali_decoding import DaliDecoder

            decoder = DaliDecoder(len(self._shown), 1)
        bad = BadImages(len(source), 1.0, source.broken)
        self._reader = PictureReader(source, bad, ThreadPoolExecutor(1), decoder)

        sizes = (config.global_crops_size, config.local_crops_size)
        pictures = self._pictures()
        drawn = draw_crops(config, 0, self._shown, [picture.shape[:2] for picture in pictures])
        self._crops = [
            [
                (crop, size)
                for params, size in zip(drawn, sizes, strict=True)
                for crop in params.of_sample(i)
            ]
            for i in self._shown
        ]
        packed = [params.pack() for params in drawn]
        self._packed = [[rows[i] for rows in packed] for i in self._shown]
        self._levels = normalized_levels(MEAN, STD, torch.float32, torch.device("cpu"))
        self._outs = [
            torch.empty(rows.shape[1], 3, size, size)
            for rows, size in zip(packed, sizes, strict=True)
        ]
        self._round()  # compiles

    def _pictures(self) -> list[NDArray[np.uint8]]:
        _, pictures = self._reader.read(self._shown)
        return [np.asarray(picture) for picture in pictures]

    def __call__(self, rounds: int) -> StageTimes:
        """So many rounds over all images."""
        done = [self._round() for _ in range(rounds)]

        def median(way: int, stage: str) -> float:
            return statistics.median(laps[way].seconds[stage] for laps in done) / len(self._shown)

        return StageTimes(
            images=len(self._shown),
            rounds=rounds,
            pillow={stage: 1e3 * median(0, stage) for stage in STAGES},
            fused={stage: 1e3 * median(1, stage) for stage in STAGES},
            whole=1e3 * median(1, "whole"),
        )

    def _round(self) -> tuple[Laps, Laps]:
        """By Pillow and by ours; of the latter also in one piece, which is no stage."""
        pillow, fused = Laps(), Laps()
        pictures = self._pictures()
        fused("decode")
        for i, picture in zip(self._shown, pictures, strict=True):
            pillow.start()
            image = self._source.read_rgb(i)
            pillow("decode")
            by_pillow(image, self._crops[i], pillow)
            fused.start()
            by_fused(self._outs, picture, self._packed[i], self._levels, fused)
            fused.start()
            crops_into(self._outs, picture, self._packed[i], self._levels)
            fused("whole")
        return pillow, fused

"""Crops made by NVIDIA DALI's operators: the same draws, approximately the same pixels.

Boxes, flips and factors come from params.py. Pixels differ from the reference. Unless listed here,
an operation differs by at most 0.5 of 255 levels on average; docs/crops.md has the full table.

- Color jitter has a fixed order (brightness, contrast, saturation, hue) instead of a random one: 1
  level on average. The first three do not clip in between: 2 levels.
- Hue rotates in YIQ instead of HSV: 1 level on average on pale images, 8 on a vivid photograph, up
  to 100 in single pixels. On average this is further off than skipping the hue shift.
- Blur is a true Gaussian that reflects at the edges. Pillow approximates it by boxes and replicates
  the edge pixels.
"""

from __future__ import annotations

import gc
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import nvidia.dali
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastdino.augmentation.params import SOLARIZE_P, CropParams
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.environment import cpu_count

VERSION: str = nvidia.dali.__version__
# The paper's crops that can be solarized. Local crops, which share the last entry, never are.
SOLARIZED = [n for n, p in enumerate(SOLARIZE_P) if p > 0]
assert max(SOLARIZED) < 2
# Options that make fn.decoders.image decode on a GPU.
GPU_DECODER: dict[str, Any] = {
    "device": "mixed",
    "jpeg_fancy_upsampling": True,  # as libjpeg upsamples the chroma
    "affine": False,  # otherwise all processes of a machine may be pinned to the same few cores
}
# Inputs of one crop, in this order: _crop_inputs builds them and _crop reads them.
_CROP_INPUTS = (
    types.INT32,  # start: top, left
    types.INT32,  # shape: height, width
    types.INT32,  # flip
    types.FLOAT,  # brightness
    types.FLOAT,  # contrast
    types.FLOAT,  # saturation, 0 for a gray crop
    types.FLOAT,  # hue, degrees
    types.FLOAT,  # blur radius
)
# Factors of brightness, contrast, saturation and hue that change nothing.
_NEUTRAL = np.array([1, 1, 1, 0], dtype=np.float32)

Batch = tuple[list[NDArray[Any]] | NDArray[Any], ...]  # the inputs of one pipeline iteration


def dali_crops(
    images: Sequence[NDArray[np.uint8]],
    crops: Sequence[tuple[CropParams, int]],
    *,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Make the crops of B decoded images with the operators of the DALI loader.

    This is for comparisons: each call builds a pipeline.

    Args:
        images: B uint8 RGB arrays [H, W, 3] of any sizes.
        crops: pairs (params, size): parameters of [B, N] crops, on the CPU, and the side of a crop
            in pixels. draw_crops returns two sets of parameters, global and local.
        device: device of the pipeline.

    Returns: for each pair [B, N, 3, size, size], fp32, normalized, on `device`.
    """
    counts = [params.top.shape[1] for params, _ in crops]
    sizes = [size for (_, size), count in zip(crops, counts, strict=True) for _ in range(count)]
    device_id = device_index(torch.device(device))
    solarized = list(range(len(sizes)))
    inputs = [np.ascontiguousarray(x) if device_id is None else as_png(x) for x in images]
    batches = iter([pack_batch(inputs, [params for params, _ in crops], solarized)])
    pipeline = crop_pipeline(
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
    made = iter([crop.clone() for crop in run_pipeline(pipeline, device_id)])
    del pipeline
    gc.collect()  # as in DaliLoader
    return [
        torch.stack([*itertools.islice(made, count)], dim=1)
        if count
        else torch.empty(len(images), 0, 3, size, size, device=device)
        for (_, size), count in zip(crops, counts, strict=True)
    ]


def run_pipeline(pipeline: Any, device_id: int | None) -> list[Tensor]:
    """Run one iteration: one tensor [B, 3, size, size] per crop."""
    # DALI reuses the memory of the crops only after the work of the stream that reads them.
    stream = None if device_id is None else torch.cuda.current_stream(device_id)
    return [from_dlpack(output.as_tensor()) for output in pipeline.run(stream)]


def device_index(device: torch.device) -> int | None:
    """Return DALI's device id: None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def pack_batch(
    images: Sequence[NDArray[np.uint8]], drawn: Sequence[CropParams], solarized: Sequence[int]
) -> Batch:
    """Return the pipeline's inputs: the images, then the parameters of their crops."""
    crops = [(params, n) for params in drawn for n in range(params.top.shape[1])]
    inputs = [params.solarize[:, n].numpy() for params, n in (crops[i] for i in solarized)]
    inputs += [values for params, n in crops for values in _crop_inputs(params, n)]
    return (list(images), *map(np.ascontiguousarray, inputs))


def _crop_inputs(params: CropParams, n: int) -> list[NDArray[Any]]:
    """Return the inputs of crop n, in the order of _CROP_INPUTS: arrays [B] or [B, 2]."""
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


def as_png(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode an image [H, W, 3] as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


@pipeline_def(enable_conditionals=True)
def crop_pipeline(
    feed: Callable[[], Batch],
    sizes: Sequence[int],
    solarized: Sequence[int],
    on_gpu: bool,
    exif: bool,
) -> Any:
    """Define a pipeline that makes one batch of crops per iteration.

    Args:
        feed: returns the next pack_batch(...), or raises StopIteration.
        sizes: side of each crop in pixels.
        solarized: indices of the crops that can be solarized.
        on_gpu: the pipeline decodes files on a GPU; on the CPU it gets pixels.
        exif: apply the EXIF orientation when decoding.
    """
    dtypes = [types.UINT8, *[types.BOOL] * len(solarized), *_CROP_INPUTS * len(sizes)]
    image, *inputs = fn.external_source(source=feed, num_outputs=len(dtypes), dtype=dtypes)
    solarize = {n: inputs[i] for i, n in enumerate(solarized)}
    inputs = inputs[len(solarized) :]
    if on_gpu:
        image = fn.decoders.image(
            image, output_type=types.RGB, adjust_orientation=exif, **GPU_DECODER
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
        image, resize_x=size, resize_y=size, interp_type=types.INTERP_CUBIC, antialias=True
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


def _solarize(image: Any, condition: Any) -> Any:
    if condition:
        image = fn.lookup_table(
            image,
            keys=list(range(256)),
            values=[level if level < 128 else 255 - level for level in range(256)],
            dtype=types.UINT8,
        )
    return image

"""The fused crops on a CPU: one pass over each image, exact, and several times Pillow's speed.

This is the CPU counterpart of fastdino_kernels.multi_crop: the same parameters and pixels, from
decoded images in NumPy arrays. The loops are in cpu_kernels.py and release the interpreter's lock,
so that the threads of a pool run them in parallel.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from fastdino_kernels import CropParams
from fastdino_kernels.crop_params import check_values
from fastdino_kernels.multi_crop import check_settings, normalized_levels
from numpy.typing import NDArray
from torch import Tensor

from fastdino.augmentation import cpu_kernels
from fastdino.augmentation.pillow import MEAN, STD

_thread = threading.local()


def fused_crops(
    images: Sequence[NDArray[np.uint8]],
    crops: Sequence[tuple[CropParams, int]],
    *,
    pool: Executor | None = None,
) -> list[Tensor]:
    """Make the normalized crops of B decoded images at each of several sizes.

    They equal those of Pillow 12 and torchvision to the last bit.

    Args:
        images: B uint8 RGB arrays [H, W, 3] of any sizes.
        crops: pairs (params, size): parameters of [B, N] crops, on the CPU, and the side of a crop
            in pixels. draw_crops returns two sets of parameters, global and local.
        pool: a ThreadPoolExecutor that makes the crops of several images in parallel; None: this
            thread makes them one by one.

    Returns: for each pair fp32 [B, N, 3, size, size], normalized with ImageNet's statistics.

    Raises:
        ValueError: a shape, box or other number is invalid.
        TypeError: an image is not a uint8 array.
    """
    _check(images, crops)
    for _, size in crops:
        check_settings(size, MEAN, STD, torch.float32)
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    packed = [params.pack() for params, _ in crops]
    for rows in packed:
        check_values(rows, sizes)
    levels = normalized_levels(MEAN, STD, torch.float32, torch.device("cpu")).numpy()
    outs = [
        torch.empty(*rows.shape[:2], 3, size, size)
        for rows, (_, size) in zip(packed, crops, strict=True)
    ]

    def make(b: int) -> None:
        transposed = _transpose_image(images[b])
        for out, rows in zip(outs, packed, strict=True):
            bytes_, sums = cpu_kernels.scratch_sizes(len(images[b]), out.shape[-1])
            cpu_kernels.crops_of_image(
                transposed,
                rows[b].numpy(),
                rows[b].view(torch.float32).numpy(),
                levels,
                _scratch("bytes", np.uint8, bytes_),
                _scratch("sums", np.int32, sums),
                out[b].numpy(),
            )

    for _ in (pool.map if pool else map)(make, range(len(images))):
        pass
    return outs


def _transpose_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Transpose an image [H, W, 3] to the layout of crops_of_image, in this thread's scratch."""
    height, width, _ = image.shape
    lines, length = cpu_kernels.up8(3 * width), cpu_kernels.up8(height)
    transposed = _scratch("transposed", np.uint8, lines * length).reshape(lines, length)
    strip = _scratch("strip", np.uint8, cpu_kernels.STRIP * lines)
    cpu_kernels.transpose_image(np.ascontiguousarray(image), strip, transposed.reshape(-1))
    return transposed


def _scratch(name: str, dtype: type, elements: int) -> NDArray[Any]:
    """Return this thread's scratch of that name: new memory per image would cost page faults."""
    held = getattr(_thread, name, None)
    if held is None or len(held) < elements:
        held = np.empty(elements, dtype)
        setattr(_thread, name, held)
    return held[:elements]


def _check(images: Sequence[NDArray[np.uint8]], crops: Sequence[tuple[CropParams, int]]) -> None:
    for b, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            got = getattr(image, "dtype", type(image).__name__)
            raise TypeError(f"images[{b}] must be a NumPy array of uint8, got {got}")
        if image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 1:
            raise ValueError(
                f"images[{b}] must be [H, W, 3] with H, W >= 1, got shape {image.shape}"
            )
    for params, _ in crops:
        if params.top.dim() != 2 or len(params.top) != len(images):
            raise ValueError(
                f"params must be of [B, N] crops with B = {len(images)} like the images, "
                f"got top of shape {tuple(params.top.shape)}"
            )

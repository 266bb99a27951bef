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

_scratch = threading.local()


def fused_crops(
    images: Sequence[NDArray[np.uint8]],
    crops: Sequence[tuple[CropParams, int]],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    out: Sequence[Tensor] | None = None,
    pool: Executor | None = None,
) -> list[Tensor]:
    """Make the normalized crops of B decoded images at each of several sizes.

    In fp32 they equal those of Pillow 12 and torchvision to the last bit; fp16 and bf16 round these
    once.

    Args:
        images: B uint8 RGB arrays [H, W, 3] of any sizes.
        crops: pairs (params, size): parameters of [B, N] crops, on the CPU, and the side of a crop
            in pixels. draw_crops returns two sets of parameters, global and local.
        mean, std: of the three channels, for values from 0 to 1.
        dtype: fp32, bf16 or fp16.
        out: tensors to write to and return, from an earlier call: new memory costs time.
        pool: a ThreadPoolExecutor that makes the crops of several images in parallel; None: this
            thread makes them one by one.

    Returns: for each pair [B, N, 3, size, size].

    Raises:
        ValueError: a shape, box or other number is invalid.
        TypeError: an image is not a uint8 array.
    """
    _check(images, crops)
    for _, size in crops:
        check_settings(size, mean, std, dtype)
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    packed = [params.pack() for params, _ in crops]
    for rows in packed:
        check_values(rows, sizes)
    levels = normalized_levels(tuple(mean), tuple(std), dtype, torch.device("cpu"))
    shapes = [
        (*rows.shape[:2], 3, size, size) for rows, (_, size) in zip(packed, crops, strict=True)
    ]
    outs = [torch.empty(shape, dtype=dtype) for shape in shapes] if out is None else list(out)
    _check_out(outs, shapes, dtype)

    def make(b: int) -> None:
        crops_into([out[b] for out in outs], images[b], [rows[b] for rows in packed], levels)

    for _ in (pool.map if pool else map)(make, range(len(images))):
        pass
    return outs


def crops_into(
    outs: Sequence[Tensor], image: NDArray[np.uint8], packed: Sequence[Tensor], levels: Tensor
) -> None:
    """Write the crops of one image to `outs`, without checking the arguments.

    Args:
        outs: tensors [N, 3, size, size], contiguous, on the CPU.
        image: uint8 [H, W, 3].
        packed: for each of outs int32 [N, 14], rows of CropParams.pack().
        levels: [3, 256] of outs' dtype, from multi_crop.normalized_levels.
    """
    transposed = transpose_image(image)
    for out, rows in zip(outs, packed, strict=True):
        bytes_, sums = cpu_kernels.scratch_sizes(len(image), out.shape[-1])
        cpu_kernels.crops_of_image(
            transposed,
            rows.numpy(),
            rows.view(torch.float32).numpy(),
            _as_numpy(levels),
            scratch("bytes", np.uint8, bytes_),
            scratch("sums", np.int32, sums),
            _as_numpy(out),
        )


def transpose_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Transpose an image [H, W, 3] to the layout of crops_of_image, in this thread's scratch."""
    height, width, _ = image.shape
    lines, length = cpu_kernels.up8(3 * width), cpu_kernels.up8(height)
    transposed = scratch("transposed", np.uint8, lines * length).reshape(lines, length)
    strip = scratch("strip", np.uint8, cpu_kernels.STRIP * lines)
    cpu_kernels.transpose_image(np.ascontiguousarray(image), strip, transposed.reshape(-1))
    return transposed


def _as_numpy(values: Tensor) -> NDArray[Any]:
    """View a tensor as an array; half precision as int16, because NumPy has no bf16."""
    return (values.view(torch.int16) if values.element_size() == 2 else values).numpy()


def scratch(name: str, dtype: type, elements: int) -> NDArray[Any]:
    """Return this thread's scratch of that name: new memory per image would cost page faults."""
    held = getattr(_scratch, name, None)
    if held is None or len(held) < elements:
        held = np.empty(elements, dtype)
        setattr(_scratch, name, held)
    return held[:elements]


def _check_out(
    outs: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    got = [(tuple(out.shape), out.dtype) for out in outs]
    expected = [(shape, dtype) for shape in shapes]
    if got != expected:
        raise ValueError(f"out must be tensors of (shape, dtype) {expected}, got {got}")
    if any(not out.is_contiguous() or out.device.type != "cpu" for out in outs):
        raise ValueError("out must be contiguous tensors on the CPU; make them with torch.empty")


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

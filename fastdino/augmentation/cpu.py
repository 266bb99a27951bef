"""The paper's crops on a CPU in one pass over each image: exact, and several times PIL's speed.

What fastdino_kernels.multi_crop is on a GPU: the same parameters, the same pixels, from decoded
images in NumPy arrays. The loops are in fused_pixels.py and let go of the interpreter's lock, so
that any pool of threads runs them side by side.
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
    """The crops of B decoded images at each of several sizes, normalised.

    In fp32 they equal Pillow 12 and torchvision to the last bit; fp16 and bf16 are that, rounded.

    Args:
        images: B uint8 RGB arrays [H, W, 3] of any sizes.
        crops: pairs (params, size): the parameters of [B, N] crops, on the CPU, and the pixels of
            a crop's side. draw_crops gives two of them, global and local.
        mean, std: of the three channels, for values from 0 to 1.
        dtype: fp32, bf16 or fp16.
        out: what to write to and return, of an earlier call: fresh memory costs time.
        pool: a ThreadPoolExecutor that makes the images' crops side by side; else one after the
            other in this thread.

    Returns: for each pair [B, N, 3, size, size].

    Raises:
        ValueError: shapes, boxes or other numbers that do not fit; the message says what was
            expected and got.
        TypeError: images that are not uint8 arrays.
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
    """Writes the crops of one image; for loops of one's own, as nothing is checked.

    Args:
        outs: tensors [N, 3, size, size], contiguous, on the CPU.
        image: uint8 [H, W, 3].
        packed: for each of outs int32 [N, 14], rows of CropParams.pack().
        levels: [3, 256], multi_crop.normalized_levels(mean, std, dtype, device), of outs' dtype.
    """
    turned = turn(image)
    for out, rows in zip(outs, packed, strict=True):
        bytes_, sums = cpu_kernels.scratch_sizes(len(image), out.shape[-1])
        cpu_kernels.crops_of_image(
            turned,
            rows.numpy(),
            rows.view(torch.float32).numpy(),
            _as_numpy(levels),
            borrow("bytes", np.uint8, bytes_),
            borrow("sums", np.int32, sums),
            _as_numpy(out),
        )


def turn(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What crops_of_image takes of an image [H, W, 3], in this thread's scratch."""
    height, width, _ = image.shape
    lines, length = cpu_kernels.up8(3 * width), cpu_kernels.up8(height)
    turned = borrow("turned", np.uint8, lines * length).reshape(lines, length)
    strip = borrow("strip", np.uint8, cpu_kernels.STRIP * lines)
    cpu_kernels.turn(np.ascontiguousarray(image), strip, turned.reshape(-1))
    return turned


def _as_numpy(values: Tensor) -> NDArray[Any]:
    """An array of the same memory; half precision, of which NumPy has half, as integers."""
    return (values.view(torch.int16) if values.element_size() == 2 else values).numpy()


def borrow(name: str, dtype: type, elements: int) -> NDArray[Any]:
    """This thread's scratch of that name: fresh memory for each image would cost page faults."""
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

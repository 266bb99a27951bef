"""Random parameters of the crops, shared by all loaders and backends.

A counter-based generator keyed by (seed, epoch, sample id, crop) draws them. They therefore do not
depend on the batch, the world size, the worker or the step at which a run resumed.

Legend: B samples, N crops of one resolution. Crops 0 and 1 are global; 2, 3, ... are local.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fastdino_kernels import Crop, CropParams
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

if TYPE_CHECKING:
    from fastdino.config import TrainConfig

__all__ = ["Crop", "CropParams", "draw_crops", "philox4x32", "select"]

FLIP_P, JITTER_P, GRAY_P = 0.5, 0.8, 0.2
# Indexed by crop number; all local crops use the last entry.
BLUR_P = (1.0, 0.1, 0.5)
SOLARIZE_P = (0.0, 0.2, 0.0)
BLUR_RADIUS = (0.1, 2.0)
RATIO = (3 / 4, 4 / 3)
# Largest change of brightness, contrast, saturation (factor 1 +- x) and hue (shift +- x turns).
JITTER = (0.4, 0.4, 0.2, 0.1)

_ATTEMPTS = 10
# Layout of one crop's uniform numbers: 4 per attempt to draw a box, then these.
_FLIP, _JITTER, _ORDER, _FACTOR = 40, 41, slice(42, 46), slice(46, 50)
_GRAY, _BLUR, _RADIUS, _SOLARIZE, _DRAWS = 50, 51, 52, 53, 56

_U64 = np.uint64
_LOW32 = _U64(0xFFFFFFFF)
_SHIFT32 = _U64(32)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Compute Philox4x32-10 (Salmon et al. 2011): four 32-bit random words per counter.

    Args:
        counter: [..., 4] uint64, values below 2^32.
        key: two 32-bit words.
    Returns: [..., 4] uint64, values below 2^32.
    """
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _U64(0xD2511F53), c2 * _U64(0xCD9E8D57)
        c0 = (product1 >> _SHIFT32) ^ c1 ^ _U64(k0)
        c2 = (product0 >> _SHIFT32) ^ c3 ^ _U64(k1)
        c1, c3 = product1 & _LOW32, product0 & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def draw_crops(
    config: TrainConfig, epoch: int, sample_ids: ArrayLike, image_sizes: ArrayLike
) -> tuple[CropParams, CropParams]:
    """Draw the crop parameters of B samples from the paper's distributions.

    Args:
        config: provides seed, global_crops_scale, local_crops_scale and local_crops_number.
        epoch: part of the generator's key, so that crops change between epochs.
        sample_ids: [B] integers, indices into the dataset (not the batch).
        image_sizes: [B, 2] (height, width) of the decoded images, pixels.

    Returns: parameters of the global crops [B, 2] and the local crops [B, local_crops_number].

    Raises:
        ValueError: the shapes of ids and sizes disagree, a size is below 1, an id or the epoch is
            outside [0, 2^32), or the seed is outside [0, 2^64).
    """
    ids = np.asarray(sample_ids)
    sizes = np.asarray(image_sizes, dtype=np.int64)
    if ids.ndim != 1 or sizes.shape != (len(ids), 2):
        raise ValueError(
            f"expected sample_ids [B] and image_sizes [B, 2], got {ids.shape} and {sizes.shape}"
        )
    for name, number, bits in (("epoch", epoch, 32), ("the seed", config.seed, 64)):
        if not 0 <= number < 1 << bits:
            raise ValueError(f"{name} must be from 0 to 2^{bits} - 1, got {number}")
    if len(ids) and not (ids.min() >= 0 and ids.max() < 1 << 32):
        raise ValueError(f"sample_ids must be from 0 to 2^32 - 1, got {ids.min()} to {ids.max()}")
    if (sizes < 1).any():
        raise ValueError("image_sizes must be at least 1 x 1")
    uniform = _uniform(config.seed, epoch, ids.astype(np.uint64), 2 + config.local_crops_number)
    local_kinds = [2] * config.local_crops_number
    return (
        _crops(uniform[:, :2], sizes, config.global_crops_scale, [0, 1]),
        _crops(uniform[:, 2:], sizes, config.local_crops_scale, local_kinds),
    )


def select(
    params: CropParams, samples: slice = slice(None), crops: slice = slice(None)
) -> CropParams:
    """Return the parameters of some samples and some of their crops."""
    names = [field.name for field in dataclasses.fields(CropParams)]
    return CropParams(**{name: getattr(params, name)[samples, crops] for name in names})


def _uniform(seed: int, epoch: int, ids: NDArray[np.uint64], crops: int) -> NDArray[np.float64]:
    """Return [B, crops, 56] uniform numbers in [0, 1)."""
    counter = np.empty((len(ids), crops, _DRAWS // 4, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(_DRAWS // 4, dtype=np.uint64)
    counter[..., 1] = np.arange(crops, dtype=np.uint64)[:, None]
    counter[..., 2] = ids[:, None, None]
    counter[..., 3] = epoch
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.reshape(len(ids), crops, _DRAWS) * np.float64(2.0**-32)


def _crops(
    u: NDArray[np.float64],
    sizes: NDArray[np.int64],
    scale: tuple[float, float],
    kinds: Sequence[int],
) -> CropParams:
    top, left, height, width = _boxes(u[..., : 4 * _ATTEMPTS], sizes, scale)
    low = np.array([1 - JITTER[0], 1 - JITTER[1], 1 - JITTER[2], -JITTER[3]])
    blur_p = np.array([BLUR_P[kind] for kind in kinds])
    solarize_p = np.array([SOLARIZE_P[kind] for kind in kinds])
    radius = BLUR_RADIUS[0] + u[..., _RADIUS] * (BLUR_RADIUS[1] - BLUR_RADIUS[0])
    return CropParams(
        top=_tensor(top, np.int32),
        left=_tensor(left, np.int32),
        height=_tensor(height, np.int32),
        width=_tensor(width, np.int32),
        flip=_tensor(u[..., _FLIP] < FLIP_P, np.bool_),
        jitter=_tensor(u[..., _JITTER] < JITTER_P, np.bool_),
        jitter_order=_tensor(np.argsort(u[..., _ORDER], axis=-1, kind="stable"), np.int32),
        jitter_factor=_tensor(low + u[..., _FACTOR] * 2 * np.array(JITTER), np.float32),
        gray=_tensor(u[..., _GRAY] < GRAY_P, np.bool_),
        blur_radius=_tensor(np.where(u[..., _BLUR] < blur_p, radius, 0.0), np.float32),
        solarize=_tensor(u[..., _SOLARIZE] < solarize_p, np.bool_),
    )


def _tensor(values: NDArray[Any], dtype: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))


def _boxes(
    u: NDArray[np.float64], sizes: NDArray[np.int64], scale: tuple[float, float]
) -> tuple[NDArray[np.int64], ...]:
    """Draw top, left, height, width [B, N] as torchvision's RandomResizedCrop.get_params does."""
    u = u.reshape(*u.shape[:2], _ATTEMPTS, 4)
    full_height, full_width = sizes[:, 0, None, None], sizes[:, 1, None, None]
    area = full_height * full_width * (scale[0] + u[..., 0] * (scale[1] - scale[0]))
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = np.exp(log_low + u[..., 1] * (log_high - log_low))
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= full_width) & (height > 0) & (height <= full_height)
    top = np.floor(u[..., 2] * (full_height - height + 1)).astype(np.int64)
    left = np.floor(u[..., 3] * (full_width - width + 1)).astype(np.int64)
    first = fits.argmax(axis=-1)[..., None]
    boxes = [np.take_along_axis(a, first, axis=-1)[..., 0] for a in (top, left, height, width)]
    return tuple(
        np.where(fits.any(axis=-1), box, fallback)
        for box, fallback in zip(boxes, _central_boxes(sizes), strict=True)
    )


def _central_boxes(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Return the fallback boxes [B, 1]: central, as large as the aspect ratio allows."""
    full_height, full_width = sizes[:, 0, None], sizes[:, 1, None]
    ratio = full_width / full_height
    height = np.where(ratio < RATIO[0], np.rint(full_width / RATIO[0]), full_height)
    width = np.where(ratio > RATIO[1], np.rint(full_height * RATIO[1]), full_width)
    height, width = height.astype(np.int64), width.astype(np.int64)
    return (full_height - height) // 2, (full_width - width) // 2, height, width

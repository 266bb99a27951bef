"""Multi-crop augmentation: decoded images to normalised crops, bit for bit equal to Pillow's.

Each crop is, in this order, Pillow's crop, bicubic resize, flip, colour jitter in the drawn order,
gray, Gaussian blur and solarize, then torchvision's to_tensor and normalize (Caron et al. 2021 and
the paper's code). Equal to Pillow 10 to 12; Pillow 13 reordered the passes of its resize.

Legend: B images, N crops per image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import multi_crop_torch
from .crop_params import CropParams, check_params, check_values
from .dispatch import choose_impl
from .operators import add_op_namespace_prefix

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def multi_crop(
    images: Sequence[Tensor],
    params: CropParams,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Make N augmented and normalised crops of each of B decoded images.

    In fp32 the result equals Pillow 12 and torchvision's functional operations on PIL images to the
    last bit; fp16 and bf16 round it once.

    Args:
        images: B uint8 RGB tensors [H, W, 3] of any sizes, on one device.
        params: of [B, N] crops, on that device or on the CPU. Values on the CPU are checked. Values
            on a device are not read back; the Triton kernel clamps a box to its image instead.
        size: pixels of a crop's side, from 1 to 4096.
        mean, std: of the three channels, for values from 0 to 1.
        dtype: fp32, bf16 or fp16.
        impl: "triton" (one launch, no host synchronisation), "torch" (one crop at a time; reads
            params on the host), or "auto".

    Returns: [B, N, 3, size, size] on the images' device; no gradient.

    Raises:
        ValueError: shapes, devices, boxes or other numbers that do not match. The message has the
            expected and the actual value.
        TypeError: images that are not uint8 tensors, or other wrong types.

    """
    images = list(images)
    _check_images(images)
    check_params(params, images)
    mean, std = [float(x) for x in mean], [float(x) for x in std]
    check_settings(size, mean, std, dtype)
    chosen = choose_impl(impl, images)
    return _multi_crop_op(images, params.pack(), size, mean, std, dtype, chosen)


@torch.library.custom_op(add_op_namespace_prefix("multi_crop"), mutates_args=())
def _multi_crop_op(
    images: Sequence[Tensor],
    packed: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """Run multi_crop; packed: [B, N, 14], the result of CropParams.pack."""
    if impl == "torch":
        packed = packed.cpu()
    if packed.device.type == "cpu":
        check_values(packed, [(image.shape[0], image.shape[1]) for image in images])
    out = _empty_crops(images, packed, size, dtype)
    if out.numel() == 0:
        return out
    levels = normalized_levels(tuple(mean), tuple(std), dtype, out.device)
    images = [image.contiguous() for image in images]
    if impl == "torch":
        multi_crop_torch.multi_crop_(out, images, packed, levels)
    else:
        from . import multi_crop_triton  # Triton may be absent

        # Unpinned memory is read before this returns, even if the copy is still under way.
        packed = packed.to(out.device, non_blocking=True)
        multi_crop_triton.multi_crop_(out, images, packed, levels)
    return out


def _empty_crops(images: Sequence[Tensor], packed: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    device = images[0].device if images else packed.device
    return torch.empty((*packed.shape[:2], 3, size, size), dtype=dtype, device=device)


@_multi_crop_op.register_fake
def _(images: Any, packed: Any, size: Any, mean: Any, std: Any, dtype: Any, impl: Any) -> Tensor:
    return _empty_crops(images, packed, size, dtype)


@functools.lru_cache(maxsize=16)
def normalized_levels(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return to_tensor and normalize of each of the 256 levels per channel: [3, 256].

    Computed on the CPU, because CUDA replaces the division by 255 by a product with its inverse.
    """
    levels = torch.arange(256, dtype=torch.float32).div(255).expand(3, 256)
    shift, scale = (torch.tensor(x, dtype=torch.float32)[:, None] for x in (mean, std))
    return levels.sub(shift).div(scale).to(dtype).to(device)


def _check_images(images: Sequence[Tensor]) -> None:
    for b, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{b}] must be a torch.Tensor, got {type(image).__name__}")
        if image.dtype != torch.uint8:
            raise TypeError(f"images[{b}] must be torch.uint8, got {image.dtype}")
        if image.dim() != 3 or image.shape[2] != 3 or image.shape[0] < 1 or image.shape[1] < 1:
            raise ValueError(
                f"images[{b}] must be [H, W, 3] with H, W >= 1, got shape {tuple(image.shape)}"
            )
        if image.device != images[0].device:
            raise ValueError(
                f"all images must be on one device, got images[0] on {images[0].device} "
                f"and images[{b}] on {image.device}"
            )


def check_settings(
    size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> None:
    """Raise TypeError or ValueError for arguments that multi_crop does not accept."""
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"size must be an int, got {type(size).__name__}")
    if not 1 <= size <= 4096:
        raise ValueError(f"size must be from 1 to 4096, got {size}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must have 3 numbers each, got {len(mean)} and {len(std)}")
    if not all(math.isfinite(x) for x in mean) or not all(0 < x < math.inf for x in std):
        raise ValueError(f"mean must be finite and std > 0, got {mean} and {std}")
    if dtype not in OUT_DTYPES:
        allowed = ", ".join(str(x) for x in OUT_DTYPES)
        raise ValueError(f"dtype must be one of {allowed}, got {dtype}")

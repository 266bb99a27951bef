"""Multi-crop augmentation: decoded images to normalised crops, bit for bit equal to Pillow's.

Each crop is, in this order, Pillow's crop, bicubic resize, flip, colour jitter in the drawn order,
gray, Gaussian blur and solarize, then torchvision's to_tensor and normalize (Caron et al. 2021 and
the paper's code). Equal to Pillow 10 to 12; Pillow 13 reordered the passes of its resize. Boxes
more than 100 times as tall as wide are an exception: Pillow resizes them to fewer rows along y
first, which changes a rounding. RandomResizedCrop draws no such boxes.

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
from .checks import check_integer
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
        images: B uint8 RGB tensors [H, W, 3] of any sizes, on one device. They are read in place if
            the pixels of each row are contiguous.
        params: of [B, N] crops, on that device or on the CPU. Values on the CPU are checked. Values
            on a device are not read back; the Triton kernel clamps a box to its image instead.
        size: pixels of a crop's side, from 1 to 4096.
        mean, std: of the three channels, for values from 0 to 1.
        dtype: fp32, bf16 or fp16.
        impl: "triton" (no host synchronisation), "torch" (one crop at a time; reads params on the
            host), or "auto".

    Returns: [B, N, 3, size, size] on the images' device, with crops [:, n] contiguous; no gradient.

    Raises:
        ValueError: shapes, devices, boxes or other numbers that do not match. The message has the
            expected and the actual value.
        TypeError: images that are not uint8 tensors, or other wrong types.

    """
    groups = [(params, size)]
    return multi_crop_groups(images, groups, mean=mean, std=std, dtype=dtype, impl=impl)[0]


def multi_crop_groups(
    images: Sequence[Tensor],
    groups: Sequence[tuple[CropParams, int]],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> list[Tensor]:
    """Make the crops of several sizes at once: the results of multi_crop for each group.

    With Triton the number of launches does not depend on the number of groups.

    Args:
        images, mean, std, dtype, impl: as in multi_crop.
        groups: pairs (params, size), all params on one device.

    Returns: [B, N, 3, size, size] for each group.

    Raises:
        ValueError, TypeError: as multi_crop. Messages number the crops through all groups.
    """
    images = list(images)
    groups = [(params, check_integer("size", size)) for params, size in groups]
    _check_images(images)
    mean, std = [float(x) for x in mean], [float(x) for x in std]
    for params, size in groups:
        check_params(params, images)
        check_settings(size, mean, std, dtype)
    if len({params.top.device for params, _ in groups}) != 1:
        devices = ", ".join(str(params.top.device) for params, _ in groups)
        raise ValueError(
            "groups must have at least one pair (params, size), with all params on one device, "
            f"got params on {devices or 'none'}"
        )
    packed = torch.cat([params.pack().transpose(0, 1) for params, _ in groups])
    counts, sizes = [params.top.shape[1] for params, _ in groups], [size for _, size in groups]
    chosen = choose_impl(impl, images[:1])
    outs = _multi_crop_op(images, packed, counts, sizes, mean, std, dtype, chosen)
    return [out.transpose(0, 1) for out in outs]


@torch.library.custom_op(add_op_namespace_prefix("multi_crop"), mutates_args=())
def _multi_crop_op(
    images: Sequence[Tensor],
    packed: Tensor,
    counts: Sequence[int],
    sizes: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    impl: str,
) -> list[Tensor]:
    """Run multi_crop_groups.

    Args:
        packed: [N, B, 14], the results of CropParams.pack with the N crops of all groups.
        counts, sizes: number of crops and side of each group.

    Returns: [N, B, 3, size, size] per group, so that the batch of one crop is contiguous.
    """
    if impl == "torch":
        packed = packed.cpu()
    if packed.device.type == "cpu":
        image_sizes = [(image.shape[0], image.shape[1]) for image in images]
        check_values(packed.transpose(0, 1), image_sizes)
    outs = _empty_crops(images, packed, counts, sizes, dtype)
    if packed.numel() == 0:
        return outs
    levels = normalized_levels(tuple(mean), tuple(std), dtype, outs[0].device)
    if impl == "torch":
        for out, rows in zip(outs, packed.split(list(counts))):
            multi_crop_torch.multi_crop_(out, images, rows, levels)
    else:
        from . import multi_crop_triton  # Triton may be absent

        images = [image if _has_contiguous_rows(image) else image.contiguous() for image in images]
        multi_crop_triton.multi_crop_(outs, images, packed.flatten(0, 1), levels)
    return outs


def _has_contiguous_rows(image: Tensor) -> bool:
    return image.stride()[1:] == (3, 1)


def _empty_crops(
    images: Sequence[Tensor],
    packed: Tensor,
    counts: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    device = images[0].device if images else packed.device
    return [
        torch.empty((count, packed.shape[1], 3, size, size), dtype=dtype, device=device)
        for count, size in zip(counts, sizes)
    ]


@_multi_crop_op.register_fake
def _(
    images: Any,
    packed: Any,
    counts: Any,
    sizes: Any,
    mean: Any,
    std: Any,
    dtype: Any,
    impl: Any,
) -> list[Tensor]:
    return _empty_crops(images, packed, counts, sizes, dtype)


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
    """Raise ValueError for arguments that multi_crop does not accept."""
    if not 1 <= size <= 4096:
        raise ValueError(f"size must be from 1 to 4096, got {size}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must have 3 numbers each, got {len(mean)} and {len(std)}")
    if not all(math.isfinite(x) for x in mean) or not all(0 < x < math.inf for x in std):
        raise ValueError(f"mean must be finite and std > 0, got {mean} and {std}")
    if dtype not in OUT_DTYPES:
        allowed = ", ".join(str(x) for x in OUT_DTYPES)
        raise ValueError(f"dtype must be one of {allowed}, got {dtype}")

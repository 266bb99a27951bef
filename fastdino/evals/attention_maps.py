"""Attention of the CLS token in a ViT's last block, as numbers (Caron et al. 2021, figure 1).

Shapes: B images, H heads, h x w patches of P x P pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from fastdino.config import check_at_least
from fastdino.errors import ConfigError, DataError
from fastdino.models.vit import VisionTransformer

# Completes the error message of options.load_vit for networks other than our ViTs.
NO_CLS_ATTENTION = "has no attention of a CLS token to show"


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return the attention from CLS to the patches in the last block.

    Args:
        model: in eval mode.
        images: [B, 3, h * P, w * P], normalized.

    Returns: [B, H, h, w], the dtype of the images. Each map sums to 1 minus the attention from CLS
        to itself.
    """
    height, width = (side // model.patch_size for side in images.shape[-2:])
    return model.get_cls_attention(images)[:, :, 1:].unflatten(2, (height, width))


def keep_mass(maps: Tensor, share: float) -> Tensor:
    """Mask the strongest patches that hold a share of a map's mass, as in the paper.

    The weakest patches are dropped while together they hold at most 1 - share.

    Args:
        maps: [..., h, w], non-negative.
        share: above 0, at most 1.

    Returns: bool [..., h, w]; all False for a map of zeros.
    """
    # float64, because this sums thousands of small numbers.
    values, order = maps.flatten(-2).double().sort(dim=-1, stable=True)
    cumulative = values.cumsum(-1) / values.sum(-1, keepdim=True)
    kept = cumulative > 1 - share
    return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, maps.shape[-2:])


def to_pixels(maps: Tensor, patch_size: int) -> Tensor:
    """Repeat each patch's value over its pixels: [..., h, w] -> [..., h * P, w * P]."""
    return maps.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)


def head_statistics(maps: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
    """Summarize the map of each head, [H, h, w].

    Returns: per head
        patch_mass: share of CLS's attention that goes to patches.
        entropy: of the map as a distribution over patches, in nats (uniform: log(h * w)).
        peak: row and column of the strongest patch.
        peak_share: share of the map's mass in that patch.
        kept_patches: with a threshold, share of patches in the mask of keep_mass.
    """
    flat = maps.flatten(1).double()
    mass = flat.sum(1)
    distribution = flat / mass[:, None]
    columns: dict[str, Any] = {
        "head": range(len(maps)),
        "patch_mass": mass.tolist(),
        "entropy": torch.special.entr(distribution).sum(1).tolist(),
        "peak": [list(divmod(peak, maps.shape[2])) for peak in flat.argmax(1).tolist()],
        "peak_share": distribution.amax(1).tolist(),
    }
    if threshold is not None:
        columns["kept_patches"] = keep_mass(maps, threshold).double().mean((1, 2)).tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def fit_to_patches(
    image: Image.Image,
    size: Sequence[int] | None,
    patch_size: int,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> Image.Image:
    """Resize an image, then crop it at the right and bottom to whole patches.

    Args:
        image: of any mode.
        size: height and width in pixels, the shorter side alone, or None to keep the size.

    Raises: DataError: the result is smaller than one patch.
    """
    if size is not None:
        image = v2.functional.resize(image, list(size), interpolation)
    width, height = (side - side % patch_size for side in image.size)
    if not width or not height:
        raise DataError(
            f"an image of {image.height} x {image.width} px is smaller than a patch of "
            f"{patch_size} px: resize to at least one patch, or use a smaller patch size"
        )
    return image.crop((0, 0, width, height))


def check_flags(args: argparse.Namespace, size_flag: str) -> None:
    """Raise ConfigError if a flag that `fastdino attention` and `video` share is out of range."""
    check_at_least(args, 1, "batch_size_per_gpu", "patch_size")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise ConfigError(f"--threshold must be above 0 and at most 1, got {args.threshold}")
    size = getattr(args, size_flag)
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ConfigError(
            f"--{size_flag} must be a height and a width, or the shorter side alone, in pixels "
            f"from 1; got {' '.join(map(str, size))}"
        )

"""What the CLS token of a ViT's last block attends to, in numbers (Caron et al. 2021, figure 1).

Legend: B images, H heads, h x w patches, P pixels a patch's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from fastdino.errors import ConfigError, DataError
from fastdino.models.vit import VisionTransformer

# What networks other than ours lack here (options.load_vit).
LACKS = "has no attention of a CLS token to show"


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of CLS to the patches in the last block.

    Args:
        model: in eval mode.
        images: [B, 3, h * P, w * P], normalised.

    Returns: [B, H, h, w], the dtype of the images; a map's sum is the share that CLS does not keep
        for itself.
    """
    height, width = (side // model.patch_size for side in images.shape[-2:])
    return model.get_cls_attention(images)[:, :, 1:].unflatten(2, (height, width))


def keep_mass(maps: Tensor, share: float) -> Tensor:
    """The patches that hold a share of a map's mass, the strongest first: the paper's masks.

    The weakest patches are left out as long as these hold no more than 1 - share together.

    Args:
        maps: [..., h, w], none negative.
        share: above 0, at most 1.

    Returns: bool [..., h, w]; all False for a map of zeros.
    """
    # float64: thousands of small numbers are added up.
    values, order = maps.flatten(-2).double().sort(dim=-1, stable=True)
    held = values.cumsum(-1) / values.sum(-1, keepdim=True)
    kept = held > 1 - share
    return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, maps.shape[-2:])


def to_pixels(maps: Tensor, patch_size: int) -> Tensor:
    """[..., h, w] -> [..., h * P, w * P]: each pixel has the value of its patch."""
    return maps.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)


def jaccard(masks: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Intersection over union of masks with the truth, where pixels are counted.

    Args:
        masks: bool [..., height, width].
        truth, counted: bool [height, width].

    Returns: float64 [...], from 0 to 1; NaN where the union is empty.
    """
    both = (masks & truth & counted).sum((-2, -1)).double()
    return both / ((masks | truth) & counted).sum((-2, -1))


def head_statistics(maps: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
    """Figures of each head's map, [H, h, w].

    patch_mass: the share of CLS's attention that goes to patches. entropy: of the map's
    distribution over patches, in nats (uniform: log(h w)). peak: row and column of the strongest
    patch; peak_share: its share of the map's mass. kept_patches: the share of patches in the mask
    of `threshold`.
    """
    flat = maps.flatten(1).double()
    mass = flat.sum(1)
    shares = flat / mass[:, None]
    entropy = torch.special.entr(shares).sum(1).tolist()
    peaks = flat.argmax(1).tolist()
    statistics = []
    for head, peak in enumerate(peaks):
        found = {
            "head": head,
            "patch_mass": float(mass[head]),
            "entropy": entropy[head],
            "peak": list(divmod(peak, maps.shape[2])),
            "peak_share": float(shares[head, peak]),
        }
        if threshold is not None:
            kept = keep_mass(maps[head], threshold)
            found["kept_patches"] = float(kept.double().mean())
        statistics.append(found)
    return statistics


def fit(
    picture: Image.Image,
    size: Sequence[int] | None,
    patch_size: int,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> Image.Image:
    """The picture as the network sees it: resized, then cut to whole patches.

    Args:
        picture: of any mode.
        size: height and width in pixels; one number: of the shorter side; None: as it is.
        patch_size: what is short of a patch is cut off at the right and at the bottom.
        interpolation: of the resize.

    Raises: DataError: less than a patch is left.
    """
    if size is not None:
        picture = v2.functional.resize(picture, list(size), interpolation)
    width, height = (side - side % patch_size for side in picture.size)
    if not width or not height:
        raise DataError(
            f"an image of {picture.height} x {picture.width} px is smaller than a patch of "
            f"{patch_size} px: expected at least one patch; resize to more, or take another model"
        )
    return picture.crop((0, 0, width, height))


def check_threshold(threshold: float | None) -> None:
    """Raises ConfigError where --threshold is no share."""
    if threshold is not None and not 0 < threshold <= 1:
        raise ConfigError(f"--threshold must be above 0 and at most 1, got {threshold}")


def check_size(name: str, size: Sequence[int] | None) -> None:
    """Raises ConfigError where a flag is no size: one or two numbers from 1."""
    if size is not None and (len(size) > 2 or min(size) < 1):
        given = " ".join(map(str, size))
        raise ConfigError(
            f"--{name} must be a height and a width, or the shorter side alone, in pixels from 1; "
            f"got {given}"
        )


def pretrained_side(model: VisionTransformer) -> int:
    """Pixels of the side of the images that the position embedding is made for."""
    return math.isqrt(model.pos_embed.shape[1] - 1) * model.patch_size

"""What the CLS token of a ViT's last block attends to (Caron et al. 2021, figure 1).

Legend: B images, H heads, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdino.models.vit import VisionTransformer


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of CLS to the patches in the last block.

    Args:
        model: in eval mode.
        images: [B, 3, h * patch_size, w * patch_size], normalised.

    Returns: [B, H, h, w], the dtype of the images; a map's sum is the share that CLS does not keep
        for itself.
    """
    height, width = (side // model.patch_size for side in images.shape[-2:])
    weights = model.get_last_selfattention(images)
    return weights[:, :, 0, 1:].unflatten(2, (height, width))


def draw_attention(
    pictures: Sequence[Image.Image], maps: Tensor, path: Path, *, title: str = ""
) -> None:
    """Draws a row a picture: the picture, the mean map, each head's map; writes a PNG.

    Args:
        pictures: B square pictures.
        maps: [B, H, h, w] of attention_maps.
        path: the PNG to write.
        title: a line above everything.
    """
    heads = maps.shape[1]
    columns = 2 + heads
    figure = Figure(figsize=(1.25 * columns, 1.25 * len(pictures) + 0.5), layout="constrained")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    figure.suptitle(title, fontsize=9)
    for row, (picture, heads_maps) in enumerate(zip(pictures, maps, strict=True)):
        size = (picture.height, picture.width)
        panels = torch.cat((heads_maps.mean(0, keepdim=True), heads_maps))
        panels = F.interpolate(panels[None].float(), size=size, mode="nearest")[0]
        axes[row, 0].imshow(picture)
        for panel, axis in zip(panels, axes[row, 1:], strict=True):
            axis.imshow(panel.cpu().numpy(), cmap="inferno")
        if row == 0:
            names = ["image", "mean", *(f"head {i + 1}" for i in range(heads))]
            for name, axis in zip(names, axes[0], strict=True):
                axis.set_title(name, fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)

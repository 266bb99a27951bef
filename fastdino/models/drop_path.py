"""Stochastic depth (Huang et al. 2016): which images go without which branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_kept(
    rates: Sequence[float],
    images_by_size: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What each image takes of each branch: 0, or 1 / (1 - rate).

    The paper's code draws as it goes, one number an image: image sizes, in them blocks, in them
    attention before MLP. This draws the same ones beforehand, so that it does not matter whether
    the sizes go through the blocks one by one or together.

    Args:
        rates: for each block that drops, the probability above 0 that an image goes without a
            branch.
        images_by_size: numbers of images, in the order of their sizes.
        dtype: of the random numbers: the branches' own.
        device: where to draw.

    Returns: [blocks, 2, images], the branches attention and MLP; fp32, or fp64 if dtype is.
    """
    keep = [1 - rate for rate in rates for _ in range(2)]
    drawn = []
    for images in images_by_size:
        numbers = [torch.rand(images, dtype=dtype, device=device) for _ in keep]
        torch._foreach_add_(numbers, keep)
        drawn.append(torch.stack(numbers))
    kept = torch.cat(drawn, dim=1).floor_().to(torch.promote_types(dtype, torch.float32))
    torch._foreach_div_(list(kept), keep)
    return kept.unflatten(0, (len(rates), 2))

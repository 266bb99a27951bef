"""Stochastic depth (Huang et al. 2016): random branches of a block are skipped per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_branch_scales(
    rates: Sequence[float],
    images_by_size: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw the factor of each branch for each image: 0 (dropped) or 1 / (1 - rate).

    The paper's code draws one number per image during the forward pass, in the order image size,
    block, attention before MLP. This function draws the same numbers beforehand, so that crops of
    all sizes can pass through the blocks together.

    Args:
        rates: for each block that drops branches, the drop probability, above 0.
        images_by_size: number of images of each size, in order.
        dtype: of the random numbers: the dtype of the branches.
        device: where to draw.

    Returns: [blocks, 2, images] for the branches attention and MLP; fp32, or fp64 if dtype is.
    """
    keep = [1 - rate for rate in rates for _ in range(2)]
    drawn = []
    for images in images_by_size:
        numbers = [torch.rand(images, dtype=dtype, device=device) for _ in keep]
        torch._foreach_add_(numbers, keep)
        drawn.append(torch.stack(numbers))
    scales = torch.cat(drawn, dim=1).floor_().to(torch.promote_types(dtype, torch.float32))
    torch._foreach_div_(list(scales), keep)
    return scales.unflatten(0, (len(rates), 2))

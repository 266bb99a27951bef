"""Stochastic depth (Huang et al. 2016): random branches of a block are skipped per image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    drawn = [
        torch.stack([torch.rand(images, dtype=dtype, device=device) for _ in range(2 * len(rates))])
        for images in images_by_size
    ]
    return _scales(torch.cat(drawn, dim=1), rates)


class StepDraws:
    """Stochastic depth that depends on an image's place in the step, not on who computes it.

    A call has the arguments and the result of draw_branch_scales. The numbers are those of one
    process with the whole global batch, so that runs with any number of processes and forward
    passes drop the same branches. For each size of crops, a generator seeded by the run, the step
    and the size draws them; `start_pass` selects those of a forward pass.
    """

    def __init__(self, seed: int):
        self._seed = seed

    def start_pass(self, iteration: int, places: slice, global_batch: int) -> None:
        """Draw from now on for the images of a forward pass.

        Args:
            iteration: the step.
            places: of the images among the `global_batch` images of the step.
        """
        self._iteration, self._places, self._global_batch = iteration, places, global_batch
        self._sizes = 0  # drawn in this pass

    def __call__(
        self,
        rates: Sequence[float],
        images_by_size: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        generator, drawn = torch.Generator(device), []
        own = len(range(self._global_batch)[self._places])
        for images in images_by_size:
            key = np.random.SeedSequence((self._seed, self._iteration, self._sizes))
            generator.manual_seed(int(key.generate_state(1, np.uint64)[0]))
            shape = 2 * len(rates), images // own, self._global_batch  # branches, crops, images
            numbers = torch.rand(shape, generator=generator, dtype=dtype, device=device)
            drawn.append(numbers[:, :, self._places].flatten(1))
            self._sizes += 1
        return _scales(torch.cat(drawn, dim=1), rates)


def _scales(numbers: Tensor, rates: Sequence[float]) -> Tensor:
    """Turn uniform numbers [2 * blocks, images] into factors [blocks, 2, images]."""
    keep = [1 - rate for rate in rates for _ in range(2)]
    torch._foreach_add_(list(numbers), keep)
    scales = numbers.floor_().to(torch.promote_types(numbers.dtype, torch.float32))
    torch._foreach_div_(list(scales), keep)
    return scales.unflatten(0, (len(rates), 2))

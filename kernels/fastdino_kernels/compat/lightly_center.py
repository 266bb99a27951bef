"""The moving average of lightly's patch losses: `lightly.models.modules.center.Center`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from ..checks import check_float_tensor, check_number, check_range
from ..dispatch import compute_dtype
from .lightly_arguments import check_center_mode
from .rank_mean import move_center_, start_rank_mean


class Center(nn.Module):
    """Moving average of a batch's mean: c = m*c + (1 - m)*mean (Caron et al. 2021, Eq. 4).

    With several ranks the mean is that of the ranks' means, all with the same weight. A rank
    without rows does not count; without any rows the center is unchanged.

    Args:
        size: the center's shape. The mean is over the dimensions of size 1.
        mode: must be "mean".
        momentum: in [0, 1]; the weight of the old center in an update.

    Buffer `center`, of shape `size`; `value` returns it. Updates change it in place.

    Raises: ValueError: an unknown mode, or a momentum or a size out of range.

    """

    center: Tensor

    def __init__(self, size: Sequence[int], mode: str = "mean", momentum: float = 0.9) -> None:
        super().__init__()
        check_center_mode(mode)
        if min(size, default=0) != 1:
            raise ValueError(f"size must be >= 1, and 1 in some dimension, got {tuple(size)}")
        self.momentum = check_number("momentum", momentum)
        check_range("momentum", self.momentum, most=1)
        self.size = tuple(size)
        self.dim = tuple(index for index, length in enumerate(self.size) if length == 1)
        self.register_buffer("center", torch.zeros(self.size))

    @property
    def value(self) -> Tensor:
        """The current center."""
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update the center with a batch.

        Args:
            x: as many dimensions as `size`, and the same sizes except where `size` has 1; fp16,
                bf16, fp32 or fp64. An empty batch changes nothing.

        Raises:
            ValueError: another shape.
            TypeError: not a floating-point tensor.

        """
        check_float_tensor("x", x)
        averaged = tuple(1 if d in self.dim else length for d, length in enumerate(x.shape))
        if averaged != self.size:
            raise ValueError(
                f"x must have the center's shape {self.size}, any length where that is 1, "
                f"got {tuple(x.shape)}"
            )
        rows = prod(x.shape[d] for d in self.dim)
        self.update_from_sum(x.sum(self.dim, dtype=compute_dtype(x)), rows)

    @torch.no_grad()
    def update_from_sum(self, total: Tensor, rows: int) -> None:
        """Update the center with the sum of a batch's rows.

        Args:
            total: as many elements as the center; not modified.
            rows: number of rows in the sum; with 0 rows on all ranks nothing changes.

        """
        mean, ranks = start_rank_mean(total, rows).wait()
        move_center_(self.center, mean, ranks, self.momentum)

    def extra_repr(self) -> str:
        """Return the text that print(module) shows between the parentheses."""
        return f"size={self.size}, momentum={self.momentum}"

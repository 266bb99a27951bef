"""The mean of a batch over the ranks, toward which a center moves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..collectives import world_size


class RankMean(NamedTuple):
    """A mean over the ranks whose all-reduce may still run; start_rank_mean makes it."""

    mean: Tensor  # of this rank; with several ranks, their sum and the number of ranks with rows
    ranks: int | None  # number of ranks with rows, None for several ranks
    work: Any  # the all-reduce, None for one rank and for a copy
    shape: torch.Size

    def wait(self) -> tuple[Tensor, Tensor | int]:
        """Wait for the all-reduce, and return (mean, ranks).

        Returns: the mean, 0 if no rank has rows, and the number of ranks with rows, a 0-d tensor if
            there are several ranks.

        """
        if self.ranks is not None:
            return self.mean, self.ranks
        if self.work is not None:
            self.work.wait()
        total, ranks = self.mean[:-1], self.mean[-1]
        return (total / ranks.clamp_min(1)).view(self.shape), ranks

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or save the result of the all-reduce: it cannot be copied itself."""
        if self.work is not None:
            self.work.wait()
        return type(self), (self.mean, self.ranks, None, self.shape)


def start_rank_mean(total: Tensor, rows: int) -> RankMean:
    """Start to average the means of all ranks, each with the same weight.

    Ranks without rows do not count. There is one all-reduce, of K + 1 numbers, and no wait for the
    device.

    Args:
        total: [..] the sum of this rank's rows, with K elements; not modified.
        rows: number of rows in that sum, >= 0.

    """
    mean = total / max(rows, 1)
    if world_size(None) == 1:
        return RankMean(mean, min(rows, 1), None, mean.shape)
    has_rows = mean.new_full((1,), float(rows > 0))
    sums = torch.cat([mean.reshape(-1), has_rows])
    return RankMean(sums, None, torch.distributed.all_reduce(sums, async_op=True), mean.shape)


@torch.no_grad()
def move_center_(center: Tensor, mean: Tensor, ranks: Tensor | int, momentum: float) -> None:
    """Update the center to momentum*center + (1 - momentum)*mean, unless no rank has rows.

    Args:
        center: the moving average; modified in place.
        mean: of the shape of the center or of K elements; any dtype.
        ranks: number of ranks with rows; see RankMean.wait.
        momentum: in [0, 1].

    """
    mean = mean.view_as(center).to(center.dtype)
    if isinstance(ranks, Tensor):
        moved = center * momentum + mean * (1 - momentum)
        center.copy_(torch.where(ranks > 0, moved, center))
    elif ranks > 0:
        center.mul_(momentum).add_(mean, alpha=1 - momentum)

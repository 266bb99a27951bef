"""The mean of a batch over the ranks, toward which a center moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..collectives import world_size

FinishMean = Callable[[], tuple[Tensor, "Tensor | int"]]


def start_rank_mean(total: Tensor, rows: int) -> FinishMean:
    """Start to average the means of all ranks, each with the same weight.

    Ranks without rows do not count. There is one all-reduce, of K + 1 numbers, and no wait for the
    device.

    Args:
        total: [..] the sum of this rank's rows, with K elements; not modified.
        rows: number of rows in that sum, >= 0.

    Returns: a function that waits for the all-reduce and returns (mean, ranks): the mean of the
        shape of `total`, and the number of ranks with rows, a 0-d tensor if there are several
        ranks. The mean is 0 if no rank has rows.

    """
    mean = total / max(rows, 1)
    if world_size(None) == 1:
        return lambda: (mean, min(rows, 1))
    has_rows = mean.new_full((1,), float(rows > 0))
    sums = torch.cat([mean.reshape(-1), has_rows])
    work = torch.distributed.all_reduce(sums, async_op=True)

    def finish() -> tuple[Tensor, Tensor | int]:
        work.wait()
        return (sums[:-1] / sums[-1].clamp_min(1)).view_as(mean), sums[-1]

    return finish


@torch.no_grad()
def move_center_(center: Tensor, mean: Tensor, ranks: Tensor | int, momentum: float) -> None:
    """Update the center to momentum*center + (1 - momentum)*mean, unless no rank has rows.

    Args:
        center: the moving average; modified in place.
        mean: of the shape of the center or of K elements; any dtype.
        ranks: number of ranks with rows; see start_rank_mean.
        momentum: in [0, 1].

    """
    mean = mean.view_as(center).to(center.dtype)
    if isinstance(ranks, Tensor):
        moved = center * momentum + mean * (1 - momentum)
        center.copy_(torch.where(ranks > 0, moved, center))
    elif ranks > 0:
        center.mul_(momentum).add_(mean, alpha=1 - momentum)

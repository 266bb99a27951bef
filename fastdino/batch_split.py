"""Division of a step's images among processes and forward passes: --global_batch_size."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastdino.errors import ConfigError


class BatchSplit(NamedTuple):
    """How a process computes its images of a step.

    Attributes:
        images: per forward pass.
        passes: forward passes per step.
    """

    images: int
    passes: int

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step and process."""
        return self.images * self.passes


def split_global_batch(global_batch: int, largest: int, world_size: int) -> BatchSplit:
    """Divide the images of a step equally among all processes, and into few forward passes.

    Args: largest: images per forward pass and process.

    Raises: ConfigError: world_size does not divide global_batch.
    """
    images, rest = divmod(global_batch, world_size)
    if rest:
        multiples = [str(k * world_size) for k in (images, images + 1) if k]
        sizes = [str(k) for k in _divisors(global_batch) if k < 2 * world_size][-3:]
        raise ConfigError(
            f"--global_batch_size {global_batch} cannot be divided equally among {world_size} "
            f"processes: use {' or '.join(multiples)}, or a number of processes that divides it, "
            f"such as {', '.join(sizes)}"
        )
    passes = next(k for k in _divisors(images) if images <= k * largest)
    return BatchSplit(images // passes, passes)


def _divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, in ascending order."""
    low = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return sorted({*low, *(number // k for k in low)})

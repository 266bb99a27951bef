"""Schedules of learning rate, weight decay and EMA momentum: one value per iteration.

Source: Caron et al. 2021, section 3 and appendix, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_schedule(
    base: float, final: float, *, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0
) -> Callable[[int], float]:
    """Return a linear warmup from 0 to `base`, then half a cosine towards `final`.

    The last warmup step is at `base`. The cosine ends one step short of `final`.

    Args:
        base, final: values at the two ends of the cosine.
        epochs, warmup_epochs: lengths in epochs; warmup_epochs <= epochs.
        steps_per_epoch: iterations per epoch.

    Returns: iteration (0-based, below epochs * steps_per_epoch) -> value.
    """
    warmup = warmup_epochs * steps_per_epoch
    cosine = epochs * steps_per_epoch - warmup

    def value(iteration: int) -> float:
        if iteration < warmup:
            return base * iteration / max(warmup - 1, 1)
        return final + 0.5 * (base - final) * (
            1 + math.cos(math.pi * (iteration - warmup) / cosine)
        )

    return value

"""The schedules of lr, weight decay and momentum: one value an iteration, known before the run.

Source: Caron et al. 2021, section 3 and appendix, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_schedule(
    base: float, final: float, *, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0
) -> Callable[[int], float]:
    """Linear warm-up from 0 to `base`, both reached, then half a cosine to `final`, not reached.

    Args:
        base, final: the values at the two ends of the cosine.
        epochs, warmup_epochs: lengths in epochs; warmup_epochs <= epochs.
        steps_per_epoch: iterations an epoch.

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

from __future__ import annotations

import numpy as np
import pytest

from fastdino.training.schedules import cosine_schedule


def paper_schedule(base, final, epochs, steps, warmup_epochs=0):
    """Return the paper's schedule as an array."""
    warmup = np.linspace(0, base, warmup_epochs * steps)
    rest = np.arange(epochs * steps - len(warmup))
    return np.r_[warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))]


@pytest.mark.parametrize(
    ("base", "final", "epochs", "steps", "warmup"),
    [(0.05, 1e-5, 3, 4, 1), (0.996, 1.0, 5, 7, 0), (0.04, 0.4, 2, 1, 1), (1.0, 0.1, 4, 3, 4)],
)
def test_schedule_matches_the_paper(base, final, epochs, steps, warmup):
    value = cosine_schedule(base, final, epochs=epochs, steps_per_epoch=steps, warmup_epochs=warmup)
    expected = paper_schedule(base, final, epochs, steps, warmup)
    np.testing.assert_allclose([value(i) for i in range(epochs * steps)], expected, rtol=1e-14)


def test_warmup_reaches_the_peak_and_cosine_stops_before_the_end():
    value = cosine_schedule(2.0, 0.5, epochs=10, steps_per_epoch=10, warmup_epochs=1)
    assert value(0) == 0.0
    assert value(9) == value(10) == 2.0
    assert 0.5 < value(99) < 0.51

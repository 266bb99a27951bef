"""FiniteGuard finds the first non-finite step, however late it is checked."""

import math

import pytest
import torch

from fastdino.errors import NonFiniteError
from fastdino.training.nonfinite import FiniteGuard


def make_guard(immediate=False):
    return FiniteGuard(torch.device("cpu"), steps_per_epoch=2, immediate=immediate)


def run(guard, losses, norms=None):
    for i, loss in enumerate(losses):
        guard.watch_loss(torch.tensor(loss))
        assert guard.bad > 0 or math.isfinite(loss), "set before the update"
        guard.watch_norms(torch.tensor([1.0, (norms or {}).get(i, 0.0)]))
        guard.end_step()


@pytest.mark.parametrize(
    ("losses", "norms", "step", "problem"),
    [
        ([1.0, 2.0, math.nan, 3.0], {}, 2, r"the loss is nan at iteration 2 \(epoch 2\)"),
        ([math.inf], {}, 0, r"the loss is inf at iteration 0 \(epoch 1\)"),
        ([1.0, 2.0, 3.0, math.nan], {1: math.nan}, 1, "a gradient is not finite at iteration 1"),
        ([1.0, -math.inf], {1: math.inf}, 1, "the loss is -inf at iteration 1"),
    ],
)
def test_late_check_reports_first_failure(losses, norms, step, problem):
    guard = make_guard()
    run(guard, losses, norms)
    assert guard.bad > 0
    with pytest.raises(NonFiniteError, match=problem) as error:
        guard.check()
    assert error.value.iteration == guard.iteration == step


def test_check_clears_the_failure_and_counts_on():
    guard = make_guard()
    run(guard, [1.0, 2.0, 3.0])
    guard.check()
    assert guard.iteration == 3
    run(guard, [1.0, math.nan])
    with pytest.raises(NonFiniteError, match="iteration 4"):
        guard.check()
    assert guard.bad == 0
    run(guard, [1.0, math.nan])
    guard.restart(9)
    run(guard, [1.0])
    guard.check()
    assert guard.iteration == 10


def test_immediate_guard_raises_in_the_step():
    guard = make_guard(immediate=True)
    run(guard, [1.0, 2.0])
    with pytest.raises(NonFiniteError, match="a gradient is not finite at iteration 2"):
        guard.watch_norms(torch.tensor([math.inf]))
    with pytest.raises(NonFiniteError, match="the loss is nan at iteration 2"):
        guard.watch_loss(torch.tensor(math.nan))

"""fastdino.training.nonfinite: what was not finite, found later, to the step."""

import math

import pytest
import torch

from fastdino.training.nonfinite import FiniteGuard


def run(guard, losses, norms=None):
    for i, loss in enumerate(losses):
        guard.watch_loss(torch.tensor(loss))
        guard.watch_norms(torch.tensor([1.0, (norms or {}).get(i, 0.0)]))
        guard.end_step()


@pytest.mark.parametrize(
    ("losses", "norms", "step", "problem"),
    [
        ([1.0, 2.0, math.nan, 3.0], {}, 2, "the loss is nan"),
        ([math.inf], {}, 0, "the loss is inf"),
        ([1.0, 2.0, 3.0, math.nan], {1: math.nan}, 1, "a gradient is not finite"),
        ([1.0, -math.inf], {1: math.inf}, 1, "the loss is -inf"),
    ],
)
def test_the_first_failure_is_named_however_late_it_is_read(losses, norms, step, problem):
    guard = FiniteGuard(torch.device("cpu"))
    run(guard, losses, norms)
    assert guard.bad > 0
    failure = guard.read()
    assert (failure.step, failure.problem) == (step, problem)


def test_steps_are_counted_from_the_last_read():
    guard = FiniteGuard(torch.device("cpu"))
    run(guard, [1.0, 2.0, 3.0])
    assert guard.read() is None
    run(guard, [1.0, math.nan])
    assert guard.read().step == 1
    assert guard.bad == 0, "after a failure that was read, all is good again"
    run(guard, [1.0])
    assert guard.read() is None


def test_it_turns_bad_before_the_update_and_stays_so():
    guard = FiniteGuard(torch.device("cpu"))
    guard.watch_loss(torch.tensor(math.nan))
    assert guard.bad > 0
    guard.watch_loss(torch.tensor(1.0))
    assert guard.bad > 0

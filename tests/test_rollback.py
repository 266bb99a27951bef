"""Non-finite steps of a run: they stop it, or are left out after a rollback."""

from __future__ import annotations

import math

import pytest

from fastdino.errors import NonFiniteError
from fastdino.training.loop import train
from fastdino.training.resume import MAX_ROLLBACKS
from tests.runs import (
    STEPS,
    Once,
    assert_same_state,
    fail,
    interrupt,
    losses_of,
    train_by_hand,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize(
    ("kind", "at", "message"),
    [
        ("crops", STEPS + 1, "the loss is nan at iteration 5"),
        ("weights", 2 * STEPS - 1, r"student.module.backbone.* is not finite"),
    ],
)
def test_nonfinite_step_stops_with_advice(config, tmp_path, kind, at, message, monkeypatch):
    fail(monkeypatch, [at], kind)
    with pytest.raises(NonFiniteError, match=message) as error:
        train(config())
    for part in ("checkpoint.pth", "--lr", "--on_nonfinite"):
        assert part in str(error.value)
    assert weights_of(tmp_path / "run")["iteration"] == STEPS


@pytest.mark.parametrize(
    ("kind", "at", "saved"),
    [("crops", 0, 0), ("crops", STEPS + 1, STEPS), ("weights", 2 * STEPS - 1, STEPS)],
)
def test_rollback_leaves_the_failed_batch_out(
    config, tmp_path, capsys, kind, at, saved, monkeypatch
):
    fail(monkeypatch, [at], kind)
    assert train(config(on_nonfinite="rollback")) == "finished"
    state = weights_of(tmp_path / "run")
    assert (state["left_out"], state["iteration"]) == ([at], 3 * STEPS)
    assert len(losses_of(tmp_path / "run")) == 3
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))
    warning = f"rolled back to iteration {saved}; the batch of iteration {at} will be left out"
    assert warning in capsys.readouterr().err


def test_rollback_stops_after_max_rollbacks(config, monkeypatch):
    fail(monkeypatch, range(1, 3 * STEPS), "crops")
    with pytest.raises(NonFiniteError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        train(config(on_nonfinite="rollback", batch_size_per_gpu=2))


def test_run_with_two_rollbacks_and_a_stop_is_a_run_without_these_batches(
    config, tmp_path, monkeypatch
):
    """Fast mode finds the first failure three steps later; the stop is before its second visit."""
    settings = {"mode": "fast", "batch_size_per_gpu": 2, "grad_accum": 2, "use_bn_in_head": True}
    run, first, second = config(on_nonfinite="rollback", **settings), STEPS + 1, 2 * STEPS + 1
    expected, losses = train_by_hand(run, {first, second})
    fail(monkeypatch, Once({first, second}), "crops")
    interrupt(monkeypatch, first - 1, visit=2)
    assert train(run) == "interrupted"
    assert weights_of(tmp_path / "run")["left_out"] == [first]
    assert train(run) == "finished"
    state = weights_of(tmp_path / "run")
    assert state["left_out"] == [first, second]
    assert_same_state(state, expected)
    assert losses_of(tmp_path / "run") == losses

"""Non-finite steps of a run: they stop it, or it continues as if it never used these batches."""

from __future__ import annotations

import math
import re

import pytest

from fastdino.errors import NonFiniteError
from fastdino.training.loop import train
from fastdino.training.resume import MAX_ROLLBACKS, RunCheckpoint
from tests.runs import (
    STEPS,
    Once,
    assert_same_state,
    differences,
    fail,
    interrupt,
    log_of,
    losses_of,
    record_steps,
    train_by_hand,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("small_networks")
ROLLBACK = {"on_nonfinite": "rollback", "saveckp_freq": 0, "epochs": 2}
FAST = {"mode": "fast", "compile": "off"}
modes = pytest.mark.parametrize(
    "mode", [pytest.param({}, id="parity"), pytest.param(FAST, id="fast")]
)


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


@pytest.fixture
def train_without(config, tmp_path, monkeypatch):
    """A function that runs without some iterations from the start, and without a rollback."""
    start = RunCheckpoint.resume_or_start

    def run(iterations, **settings):
        def resume_or_start(self):
            start(self)
            self.left_out = list(iterations)

        fixed = ROLLBACK | {"on_nonfinite": "stop", "output_dir": str(tmp_path / "expected")}
        with monkeypatch.context() as patch:
            patch.setattr(RunCheckpoint, "resume_or_start", resume_or_start)
            assert train(config(**fixed | settings)) == "finished"

    return run


def assert_same_run(folder):
    """Compare the runs with rollbacks and without, to the bit."""
    ours, theirs = (weights_of(folder / name) for name in ("run", "expected"))
    for state in (ours, theirs):
        del state["args"]["output_dir"], state["args"]["on_nonfinite"]
    assert differences(ours, theirs) == []
    assert log_of(folder / "run") == log_of(folder / "expected")


@modes
def test_two_incidents_leave_two_batches_out(
    config, train_without, tmp_path, monkeypatch, capsys, mode
):
    """Both roll back to the checkpoint of iteration 4, with the result of never using them."""
    train_without([5, 6], **mode)
    fail(monkeypatch, [5, 6], "crops")
    trained = record_steps(monkeypatch)
    assert train(config(**ROLLBACK, **mode)) == "finished"
    assert_same_run(tmp_path)
    assert weights_of(tmp_path / "run")["left_out"] == [5, 6]
    assert trained.count(4) == 3
    assert trained[-2:] == [4, 7]
    warnings = re.findall("rolled back to iteration (.*); the batch of it.* (.) will be left out",
                          capsys.readouterr().err)  # fmt: skip
    assert warnings == [("4", "5"), ("4", "6")]


def test_a_rollback_is_remembered_across_a_resume(config, train_without, tmp_path, monkeypatch):
    """The run stops between the rollback and the batch that it leaves out."""
    train_without([3])
    fail(monkeypatch, [3], "crops")
    interrupt(monkeypatch, 1, visit=2)  # after the rollback to iteration 0
    assert train(config(**ROLLBACK)) == "interrupted"
    state = weights_of(tmp_path / "run")
    assert (state["iteration"], state["left_out"]) == (2, [3])
    trained = record_steps(monkeypatch)
    assert train(config(**ROLLBACK)) == "finished"
    assert 3 not in trained
    assert_same_run(tmp_path)


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


@pytest.mark.parametrize(
    "mode",
    [pytest.param({}, id="parity"), pytest.param(FAST, id="fast", marks=pytest.mark.slow)],
)
def test_the_number_of_rollbacks_is_limited_per_checkpoint(config, tmp_path, monkeypatch, mode):
    """More incidents than the limit, but in different epochs, do not end the run."""
    incidents = [0, 1, 4, 5, 8, 9]
    assert len(incidents) > MAX_ROLLBACKS
    settings = ROLLBACK | mode | {"epochs": 3}
    fail(monkeypatch, incidents, "crops")
    assert train(config(**settings)) == "finished"
    assert weights_of(tmp_path / "run")["left_out"] == incidents
    assert [line["epoch"] for line in log_of(tmp_path / "run")] == [0, 1, 2]
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))
    fail(monkeypatch, range(20), "crops")
    run = config(**settings, output_dir=str(tmp_path / "all"), batch_size_per_gpu=2)
    with pytest.raises(NonFiniteError, match=f"at iteration 5 .*after {MAX_ROLLBACKS} rollbacks"):
        train(run)  # 9 steps per epoch
    assert weights_of(tmp_path / "all")["iteration"] == 0


@pytest.mark.parametrize(
    "mode",
    [pytest.param({}, id="parity"), pytest.param(FAST, id="fast", marks=pytest.mark.slow)],
)
def test_weights_that_a_save_finds_broken_leave_the_last_batch_out(
    config, train_without, tmp_path, monkeypatch, capsys, mode
):
    train_without([3], **mode)
    fail(monkeypatch, [3], "weights")
    assert train(config(**ROLLBACK, **mode)) == "finished"
    assert_same_run(tmp_path)
    warning = "rolled back to iteration 0; the batch of iteration 3 will be left out"
    assert warning in capsys.readouterr().err

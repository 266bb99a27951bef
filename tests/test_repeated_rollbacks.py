"""Rollbacks of whole runs have the result of never using the failed batches."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest

from fastdino import Trainer, checkpoint
from fastdino.errors import NonFiniteError
from fastdino.training.loop import train
from fastdino.training.resume import MAX_ROLLBACKS, RunCheckpoint
from tests.test_exact_resume import differences

pytestmark = pytest.mark.usefixtures("small_networks")
STEPS = 4  # per epoch of the fixture `pictures`


@pytest.fixture(params=["parity", "fast"])
def config(request, tiny, pictures, tmp_path):
    """A function that builds the config of a run on `pictures` in a subfolder of tmp_path."""

    def make(folder="run", **settings):
        fixed = {"data_path": str(pictures), "output_dir": str(tmp_path / folder),
                 "drop_path_rate": 0.2, "print_freq": 2, "mode": request.param, "compile": "off",
                 "on_nonfinite": "rollback", "saveckp_freq": 0, "epochs": 2}  # fmt: skip
        return tiny(**fixed | settings)

    return make


@pytest.fixture
def train_step(monkeypatch):
    """Replace Trainer.train_step; returns the original."""
    step = Trainer.train_step

    def replace(function):
        monkeypatch.setattr(Trainer, "train_step", function)
        return step

    return replace


@pytest.fixture
def fail(train_step):
    """Make the crops of some iterations NaN; returns the iterations of all steps."""

    def at(iterations):
        trained: list[int] = []

        def step(self, crops):
            trained.append(self.iteration)
            if self.iteration in iterations:
                crops = [crop * math.nan for crop in crops]
            return original(self, crops)

        original = train_step(step)
        return trained

    return at


def state_of(config):
    return checkpoint.load(Path(config.output_dir) / "checkpoint.pth")


def log_of(config):
    lines = (Path(config.output_dir) / "log.txt").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def without(iterations, config, monkeypatch):
    """Run without some iterations from the start, and without a rollback."""
    start = RunCheckpoint.resume_or_start

    def resume_or_start(self):
        start(self)
        self.left_out = list(iterations)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "resume_or_start", resume_or_start)
        assert train(config) == "finished"


def assert_same_run(config, other):
    ours, theirs = state_of(config), state_of(other)
    for state in (ours, theirs):
        del state["args"]["output_dir"], state["args"]["on_nonfinite"]
    assert differences(ours, theirs) == []
    assert log_of(config) == log_of(other)


def test_two_incidents_leave_two_batches_out(config, monkeypatch, fail, capsys):
    """Both roll back to the checkpoint of iteration 4, with the result of never using them."""
    expected = config("expected", on_nonfinite="stop")
    without([5, 6], expected, monkeypatch)
    trained, run = fail([5, 6]), config()
    assert train(run) == "finished"
    assert_same_run(run, expected)
    assert state_of(run)["left_out"] == [5, 6]
    assert trained.count(4) == 3
    assert trained[-2:] == [4, 7]
    warnings = re.findall("rolled back to iteration (.*); the batch of it.* (.) will be left out",
                          capsys.readouterr().err)  # fmt: skip
    assert warnings == [("4", "5"), ("4", "6")]


def test_a_rollback_is_remembered_across_a_resume(config, monkeypatch, train_step):
    """The run stops between the rollback and the batch that it leaves out."""
    expected = config("expected", on_nonfinite="stop")
    without([3], expected, monkeypatch)
    run, trained = config(), []

    def step(self, crops):
        trained.append(self.iteration)
        if trained.count(1) == 2 and self.iteration == 1:  # after the rollback to iteration 0
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, [crop * math.nan for crop in crops] if self.iteration == 3 else crops)

    original = train_step(step)
    assert train(run) == "interrupted"
    state = state_of(run)
    assert (state["iteration"], state["left_out"]) == (2, [3])
    trained.clear()
    assert train(run) == "finished"
    assert 3 not in trained
    assert_same_run(run, expected)


def test_the_number_of_rollbacks_is_limited_per_checkpoint(config, fail):
    """More incidents than the limit, but in different epochs, do not end the run."""
    incidents = [0, 1, 4, 5, 8, 9]
    assert len(incidents) > MAX_ROLLBACKS
    run = config(epochs=3)
    fail(incidents)
    assert train(run) == "finished"
    assert state_of(run)["left_out"] == incidents
    assert [line["epoch"] for line in log_of(run)] == [0, 1, 2]
    assert all(math.isfinite(line["train_loss"]) for line in log_of(run))
    fail(range(20))
    run = config("all", last_batch="pad", batch_size_per_gpu=2)  # 9 steps per epoch
    with pytest.raises(NonFiniteError, match=f"at iteration 5 .*after {MAX_ROLLBACKS} rollbacks"):
        train(run)
    assert state_of(run)["iteration"] == 0


def test_weights_that_a_save_finds_broken_leave_the_last_batch_out(config, monkeypatch, train_step):
    expected = config("expected", on_nonfinite="stop")
    without([3], expected, monkeypatch)

    def step(self, crops):
        loss = original(self, crops)
        if self.iteration == 4:
            next(self.student.parameters()).data[0, 0, 0] = math.inf
        return loss

    original = train_step(step)
    run = config()
    assert train(run) == "finished"
    assert_same_run(run, expected)

"""Runs whose number of processes changes: --global_batch_size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastdino import TrainConfig, signals
from fastdino.errors import CheckpointError
from fastdino.training.loop import train
from tests.elastic_runs import last_attempts, record_steps, steps_of
from tests.processes import run_two
from tests.runs import STEPS, interrupt
from tests.small_networks import shrink_networks


def train_recorded(settings, records, stop_at):
    """Train in one rank, recording its steps, until a signal during the step `stop_at`."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_networks(patch)
        record_steps(patch, records)
        patch.setattr(signals, "AGREE_SECONDS", 0.0)  # the ranks exchange signals after each step
        if os.environ.get("RANK", "0") == "0":
            interrupt(patch, stop_at)
        status = train(TrainConfig.from_dict(settings))
    assert status == ("finished" if stop_at < 0 else "interrupted")


def logged(run: Path):
    """Return the values of log.txt that do not depend on the time."""
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_training(records, run, expected_records, expected_run):
    """Check images and losses of every step, and the log, against the uninterrupted run's."""
    ours, theirs = last_attempts(steps_of(records)), last_attempts(steps_of(expected_records))
    assert list(ours) == list(theirs)
    for iteration, (images, loss) in theirs.items():
        assert ours[iteration][0] == images
        assert ours[iteration][1] == pytest.approx(loss, rel=2e-4), iteration
    for line, expected in zip(logged(run), logged(expected_run), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


def test_a_run_continues_on_other_numbers_of_processes(config, tmp_path, capsys):
    """Two, one and two again, stopped within epochs, against one process to the end."""
    settings = config(batch_size_per_gpu=2, global_batch_size=4, epochs=3).to_dict()
    assert settings["drop_path_rate"] > 0
    whole, records = tmp_path / "whole", tmp_path / "records"
    train_recorded(settings | {"output_dir": str(whole)}, tmp_path / "whole_records", -1)
    assert "| 1 process(es) x 2 pass(es) of 2 images: global batch 4 |" in capsys.readouterr().out

    run_two(train_recorded, settings, records, STEPS + 1)
    with pytest.raises(
        CheckpointError, match=r"global batch of 4 .* this one has 2 on 1: use --gl"
    ):
        train(TrainConfig.from_dict(settings | {"global_batch_size": 0}))
    train_recorded(settings, records, 2 * STEPS)
    assert "resuming on 1 process(es) a run of 2: images, their" in capsys.readouterr().out
    run_two(train_recorded, settings, records, -1)

    assert_same_training(records, tmp_path / "run", tmp_path / "whole_records", whole)
    steps = last_attempts(steps_of(records))
    ranks = {line["iteration"]: line["ranks"] for line in steps_of(records)}
    assert [ranks[i] for i in steps] == [2] * (STEPS + 2) + [1] * (STEPS - 1) + [2] * (STEPS - 1)
    for epoch in range(3):
        images = [i for step in range(STEPS) for i in steps[epoch * STEPS + step][0]]
        assert len(set(images)) == len(images) == 16, "none is lost or repeated"

"""log.txt and the kept checkpoints of a run against its steps and schedules."""

from __future__ import annotations

import json
import os
from statistics import fmean

import pytest

from fastdino import Trainer
from fastdino.training.loop import train
from fastdino.training.resume import RunCheckpoint
from tests.runs import STEPS
from tests.test_schedules import paper_schedule

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize("mode", ["parity", "fast"])
def test_log_has_the_means_of_each_epoch(config, tmp_path, monkeypatch, mode):
    losses, step = [], Trainer.train_step

    def recorded(self, crops):
        losses.append(step(self, crops))
        return losses[-1]

    monkeypatch.setattr(Trainer, "train_step", recorded)
    run = config(mode=mode, compile="off", epochs=3, warmup_epochs=1, saveckp_freq=0)
    assert train(run) == "finished"
    lines = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    lr = paper_schedule(run.lr * 4 / 256, run.min_lr, 3, STEPS, 1)
    decay = paper_schedule(run.weight_decay, run.weight_decay_end, 3, STEPS)
    for epoch, line in enumerate(lines):
        assert list(line) == [
            "train_loss", "train_lr", "train_wd", "train_entropy", "train_kl", "epoch",
            "images_per_second", "skipped_images",
        ]  # fmt: skip
        own = slice(epoch * STEPS, (epoch + 1) * STEPS)
        expected = {
            "train_loss": fmean(loss.item() for loss in losses[own]),
            "train_lr": lr[own].mean(),
            "train_wd": decay[own].mean(),
            "epoch": epoch,
            "skipped_images": 0,
        }
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert line["images_per_second"] > 0
    assert len(lines) == 3


def test_checkpoints_are_saved_and_kept_at_the_requested_times(config, tmp_path, monkeypatch):
    saved, write = [], RunCheckpoint._write

    def recorded(self, state, save):
        saved.append((state["iteration"], save.also.name if save.also else None))
        write(self, state, save)

    monkeypatch.setattr(RunCheckpoint, "_write", recorded)
    settings = {"epochs": 3, "saveckp_freq": 2, "saveckp_every_steps": 3}
    assert train(config(**settings)) == "finished"
    assert saved == [
        (3, None), (4, "checkpoint0000.pth"), (6, None), (8, None), (9, None),
        (12, "checkpoint0002.pth"),
    ]  # fmt: skip
    kept = {name for name in os.listdir(tmp_path / "run") if name.endswith(".pth")}
    assert kept == {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0002.pth"}

"""Whole runs in several processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fastdino import TrainConfig, cli, distributed, signals
from fastdino.training.loop import train
from tests.commands import write_colours
from tests.processes import run_ranks, run_two
from tests.runs import (
    STEPS,
    Once,
    assert_same_run,
    assert_same_state,
    fail,
    interrupt,
    log_of,
    losses_of,
    train_by_hand,
    train_small,
    weights_of,
)
from tests.small_networks import shrink_networks

pytestmark = pytest.mark.usefixtures("small_networks")


HALVES = [
    {"batch_size_per_gpu": 2},
    {"batch_size_per_gpu": 1, "grad_accum": 2},
    {"batch_size_per_gpu": 2, "optimizer": "lars", "fsdp": True},
]


def train_each(runs):
    for settings in runs:
        train_small(settings)


def test_two_processes_with_half_the_batch_match_one_process(config, tmp_path):
    for optimizer in ("adamw", "lars"):
        one = tmp_path / optimizer
        train(config(drop_path_rate=0.0, optimizer=optimizer, output_dir=str(one)))
    runs = [config(drop_path_rate=0.0, output_dir=str(tmp_path / str(i)), **settings)
            for i, settings in enumerate(HALVES)]  # fmt: skip
    run_two(train_each, [run.to_dict() for run in runs])
    for run in runs:
        one, two = tmp_path / run.optimizer, Path(run.output_dir)
        assert losses_of(two) == pytest.approx(losses_of(one), rel=2e-4)
        ours, theirs = weights_of(two), weights_of(one)
        torch.testing.assert_close(
            ours["dino_loss"]["center"], theirs["dino_loss"]["center"], rtol=1e-3, atol=1e-4
        )
        assert len(ours["generators"]) == 2


def train_and_stop(settings):
    signals.AGREE_SECONDS = 0.0
    interrupt(pytest.MonkeyPatch(), 2 * STEPS)
    train_small(settings)


def test_sharded_and_single_process_runs_resume_each_other(config, tmp_path):
    one, two, then = (tmp_path / name for name in ("one", "two", "then"))
    settings = {"drop_path_rate": 0.0, "epochs": 3, "saveckp_freq": 1}
    train(config(**settings, output_dir=str(one)))
    for start in (two, then):
        start.mkdir()
    shutil.copy(one / "checkpoint0000.pth", two / "checkpoint.pth")
    sharded = config(**settings, output_dir=str(two), batch_size_per_gpu=1, grad_accum=2, fsdp=True)
    run_two(train_and_stop, sharded.to_dict())
    assert weights_of(two)["iteration"] == 2 * STEPS  # of the last epoch; the shards are newer
    shutil.copytree(two / "checkpoint", then / "checkpoint")
    train(config(**settings, output_dir=str(then)))
    assert losses_of(two) == pytest.approx(losses_of(one)[1:2], rel=2e-4)
    assert losses_of(then) == pytest.approx(losses_of(one)[2:], rel=2e-4)
    assert not (then / "checkpoint").exists()
    for key, rows in weights_of(one)["student"].items():
        torch.testing.assert_close(weights_of(then)["student"][key], rows, rtol=2e-3, atol=2e-4)


FAILED = STEPS + 1
IN_FAST_MODE = [
    {"drop_path_rate": 0.0, "batch_size_per_gpu": 1, "grad_accum": 2},
    {"batch_size_per_gpu": 1, "grad_accum": 2, "fsdp": True},
]


def fail_and_stop_on_one_rank(runs):
    """Train by hand without a batch; then in runs in which one rank fails there, and stops."""
    rank = int(os.environ["RANK"])
    shrink_networks(pytest.MonkeyPatch())
    signals.AGREE_SECONDS = 0.0  # the ranks exchange signals after each step
    for settings in runs:
        config = TrainConfig.from_dict(settings)
        with distributed.process_group(torch.device("cpu"), "env://"):
            expected = train_by_hand(config, {FAILED})
        with pytest.MonkeyPatch.context() as faults:
            if rank == 1:
                fail(faults, Once({FAILED}), "crops")
                interrupt(faults, FAILED - 1, visit=2)
            assert train(config) == "interrupted"
            assert train(config) == "finished"
        if rank == 0:
            torch.save(expected, f"{config.output_dir}/expected.pt")


def test_two_ranks_in_fast_mode_resume_and_roll_back_together(config, tmp_path):
    """DDP and FSDP, with accumulation and stochastic depth: the bits of a plain loop."""
    names = [tmp_path / str(i) for i in range(len(IN_FAST_MODE))]
    fixed = {"mode": "fast", "on_nonfinite": "rollback", "epochs": 2, "print_freq": STEPS}
    runs = [config(output_dir=str(name), **fixed, **settings)
            for name, settings in zip(names, IN_FAST_MODE, strict=True)]  # fmt: skip
    run_two(fail_and_stop_on_one_rank, [run.to_dict() for run in runs])
    for name in names:
        expected, losses = torch.load(name / "expected.pt")
        state = weights_of(name)
        assert state["left_out"] == [FAILED]
        assert_same_state(state, expected)
        assert losses_of(name) == losses
        first, second = (generator["cpu"] for generator in state["generators"])
        assert not torch.equal(first, second)
    _, losses = train_by_hand(config(drop_path_rate=0.0, mode="fast", epochs=2), {FAILED})
    assert losses_of(names[0]) == pytest.approx(losses, rel=2e-4)


def train_twice(whole, stopped):
    """Train without an interruption, and with one after the first step."""
    train_small(whole)
    signals.AGREE_SECONDS = 0.0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 1)
        train_small(stopped)
    train_small(stopped)


@pytest.mark.parametrize("settings", [{}, {"mode": "fast", "grad_accum": 2}], ids=str)
def test_three_ranks_resume_with_the_same_bits(config, tmp_path, settings):
    """The order in which three gradients are added depends on the buckets, from the start on."""
    whole, stopped = (
        config(batch_size_per_gpu=1, output_dir=str(tmp_path / name), **settings)
        for name in ("whole", "stopped")
    )
    run_ranks(3, train_twice, whole.to_dict(), stopped.to_dict())
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def train_then_run(settings, line):
    train_small(settings)
    assert cli.main(line) == 0


def test_three_ranks_log_and_classify_like_one(config, tmp_path):
    """Each has one of three images per step, then uneven shares of 11 and 5 images."""
    images = write_colours(tmp_path / "images")
    for split in ("train", "val"):
        (images / split / "red" / "1.png").unlink()

    def line(run):
        return [
            "knn", "--pretrained_weights", str(run / "checkpoint.pth"), "--arch", "vit_nano",
            "--patch_size", "8", "--device", "cpu", "--data_path", str(images), "--resize", "18",
            "--crop", "16", "--batch_size_per_gpu", "2", "--num_workers", "0", "--nb_knn", "3",
            "--dump_features", str(run), "--output", str(run / "knn.json"),
        ]  # fmt: skip

    one, three = tmp_path / "one", tmp_path / "three"
    settings = {"drop_path_rate": 0.0, "mode": "fast", "epochs": 2, "freeze_last_layer": 0}
    train(config(**settings, output_dir=str(one), batch_size_per_gpu=3))
    run = config(**settings, output_dir=str(three), batch_size_per_gpu=1)
    run_ranks(3, train_then_run, run.to_dict(), line(three))
    assert cli.main(line(one)) == 0
    for ours, theirs in zip(log_of(three), log_of(one), strict=True):
        names = [name for name in theirs if name.startswith("train_")]
        assert [ours[name] for name in names] == pytest.approx(
            [theirs[name] for name in names], rel=1e-3
        )
    center, expected = (weights_of(folder)["dino_loss"]["center"] for folder in (three, one))
    torch.testing.assert_close(center, expected, rtol=1e-3, atol=1e-5)
    assert len(weights_of(three)["generators"]) == 3
    scores = [json.loads((folder / "knn.json").read_text()) for folder in (three, one)]
    assert scores[0]["images"] == {"train": 11, "val": 5}
    for name in ("trainfeat", "trainlabels", "testfeat", "testlabels"):
        ours, theirs = (torch.load(folder / f"{name}.pth") for folder in (three, one))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)

"""Whole runs in several processes."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastdino.training.loop import train
from tests.processes import run_two
from tests.runs import losses_of, train_small, weights_of

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize(
    ("grad_accum", "optimizer", "fsdp"),
    [(1, "adamw", False), (2, "adamw", False), (1, "lars", True)],
)
def test_two_processes_with_half_the_batch_match_one_process(
    config, tmp_path, grad_accum, optimizer, fsdp
):
    settings = {"drop_path_rate": 0.0, "optimizer": optimizer}
    train(config(**settings, output_dir=str(tmp_path / "one")))
    parts = {"batch_size_per_gpu": 2 // grad_accum, "grad_accum": grad_accum, "fsdp": fsdp}
    two = config(**settings, **parts)
    run_two(train_small, two.to_dict())
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "one"), rel=2e-4)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "one")
    torch.testing.assert_close(
        ours["dino_loss"]["center"], theirs["dino_loss"]["center"], rtol=1e-3, atol=1e-4
    )
    assert len(ours["generators"]) == 2


def test_sharded_and_single_process_runs_resume_each_other(config, tmp_path):
    one, two, then = (tmp_path / name for name in ("one", "two", "then"))
    settings = {"drop_path_rate": 0.0, "epochs": 3, "saveckp_freq": 1}
    train(config(**settings, output_dir=str(one)))
    for start in (two, then):
        start.mkdir()
    shutil.copy(one / "checkpoint0000.pth", two / "checkpoint.pth")
    sharded = config(**settings, output_dir=str(two), batch_size_per_gpu=1, grad_accum=2, fsdp=True)
    run_two(train_small, sharded.to_dict())
    shutil.copy(two / "checkpoint0001.pth", then / "checkpoint.pth")
    train(config(**settings, output_dir=str(then)))
    assert losses_of(two) == pytest.approx(losses_of(one)[1:], rel=2e-4)
    assert losses_of(then) == pytest.approx(losses_of(one)[2:], rel=2e-4)
    for key, rows in weights_of(one)["student"].items():
        torch.testing.assert_close(weights_of(two)["student"][key], rows, rtol=2e-3, atol=2e-4)

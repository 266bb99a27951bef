"""The benchmark of saves measures every part in both modes, and counts no waiting for a core."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from benchmarks import save_times
from fastdino.errors import CheckpointError
from fastdino.training.checkpoint_writer import CheckpointWriter

pytestmark = pytest.mark.usefixtures("small_networks")


def test_all_parts_are_measured_in_both_modes(tmp_path):
    words = ["--arch", "vit_nano", "--out_dim", "8", "--batch_size_per_gpu", "1", "--rounds", "1"]
    assert (
        save_times.main([*words, "--folder", str(tmp_path), "--write", str(tmp_path / "out")]) == 0
    )
    record = json.loads((tmp_path / "out/save_times.json").read_text())
    assert set(record["rounds"]) == {"parity", "fast"}
    for (seconds,) in record["rounds"].values():
        assert set(seconds) == set(save_times.PARTS)
        assert all(value > 0 for value in seconds.values())
    text = (tmp_path / "out/save_times.md").read_text()
    for part in save_times.PARTS:
        assert f"| {part} |" in text


def test_time_of_waiting_for_a_core_is_not_counted(tmp_path, monkeypatch):
    scheduler = tmp_path / "schedstat"
    monkeypatch.setattr(save_times, "SCHEDULER", scheduler)
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0)
    assert save_times.clock() == 10
    scheduler.write_text("123 4000000000 5\n")
    assert save_times.clock() == 6


def test_a_failed_write_ends_the_benchmark(tmp_path, monkeypatch):
    def full(*_args):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(save_times.checkpoint, "write", full)
    trainer = SimpleNamespace(state_dict=dict)
    with pytest.raises(CheckpointError, match="was not written"):
        save_times.measure_background(
            trainer, lambda: None, tmp_path / "x.pth", CheckpointWriter(lambda _: None)
        )

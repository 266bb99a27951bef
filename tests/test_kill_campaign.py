"""The kill campaign: it kills, resumes and compares runs, and notices a save that is not atomic."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from unittest import mock

import pytest
import torch

from benchmarks import kill_campaign, killed_runs
from benchmarks.kill_campaign import BEFORE, BETWEEN, DURING, OTHER, place_of
from fastdino import checkpoint
from tests.processes import PRELOADED


@contextmanager
def write_in_place(path: Path) -> Iterator[IO[bytes]]:
    """Write like atomic_write, but over the old file; the temporary file only marks the time."""
    part = path.with_name(path.name + killed_runs.PART)
    part.touch()
    with open(path, "wb") as file:
        yield file
    part.unlink()


def run_campaign(folder: Path, broken: bool, words: list[str]) -> None:
    written = write_in_place if broken else checkpoint.atomic_write
    aims = {"moment": 0.0, "save": 1.0, "write": 0.0} if broken else {}
    with (
        mock.patch.object(checkpoint, "atomic_write", written),
        mock.patch.dict(killed_runs.AIMS, aims),
    ):
        os._exit(kill_campaign.main([*words, "--write", str(folder)]))


@pytest.mark.parametrize("broken", [False, True])
def test_killed_runs_match_unless_saves_are_not_atomic(tmp_path, broken):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    words = ["--kills", "8" if broken else "2", "--kinds", "fused crops", "--seed", "1"]
    process = server.Process(target=run_campaign, args=(tmp_path, broken, words))
    process.start()
    process.join()
    assert process.exitcode == int(broken)
    tally = json.loads((tmp_path / "kill_campaign.json").read_text())["kinds"]["fused crops"]
    assert tally["kills"] >= (1 if broken else 2)
    assert sum(tally["places"].values()) == tally["kills"]
    assert tally["finished"] == tally["runs"] > 0
    if broken:
        message = r"run \d+: status \[2\]: fastdino train: error: run/checkpoint.* cannot be read"
        assert re.match(message, tally["failures"][0])
        assert any("checkpoint.pth" in line for line in tally["differences"])
    else:
        assert not tally["differences"] + tally["failures"] + tally["leftovers"]
        assert tally["lost_steps"] == 0
        # It saves after every step, and the next step runs while a save is written.
        assert tally["repeated_steps"] <= 2
        report = " ".join((tmp_path / "kill_campaign.md").read_text().split())
        assert "0 differences from the uninterrupted runs, 0 saved steps lost" in report


@pytest.fixture
def runs(tmp_path):
    """The folders of two equal runs."""
    state = {"student": {"w": torch.tensor([0.0, 1.0])}, "iteration": 4, "left_out": [3]}
    for name in ("run", "expected"):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(state, folder / "checkpoint.pth")
        (folder / "log.txt").write_text('{"train_loss": 1.5, "epoch": 0, "images_per_second": 7}\n')
        (folder / "config.json").write_text("{}")
    return tmp_path / "run", tmp_path / "expected", state


def test_every_difference_is_found(runs):
    run, expected, state = runs
    (run / "log.txt").write_text('{"train_loss": 1.5, "epoch": 0, "images_per_second": 9}\n')
    assert killed_runs.differences(run, expected) == []
    for change, message in (
        ({"student": {"w": torch.tensor([-0.0, 1.0])}}, "checkpoint.student.w differs"),
        ({"student": {"w": state["student"]["w"].double()}}, "checkpoint.student.w differs"),
        ({"student": {}}, "checkpoint.student has other keys"),
        ({"left_out": []}, "checkpoint.left_out has another length"),
        ({"iteration": 5}, "checkpoint.iteration differs"),
    ):
        torch.save(state | change, run / "checkpoint.pth")
        assert killed_runs.differences(run, expected) == [message]
    torch.save(state, run / "checkpoint.pth")
    for name, content, message in (
        ("log.txt", '{"train_loss": 1.6, "epoch": 0}\n', "log.txt differs"),
        ("config.json", "{} ", "config.json differs"),
        ("checkpoint.pth", "", "it is truncated"),
    ):
        before = (run / name).read_bytes()
        (run / name).write_text(content)
        (problem,) = killed_runs.differences(run, expected)
        assert message in problem
        (run / name).write_bytes(before)
    (run / "config.json").unlink()
    assert killed_runs.differences(run, expected) == [
        "config.json is missing",
        "config.json differs",
    ]


def test_place_of_a_kill_is_known_from_the_files(runs):
    run, _, _ = runs  # iteration 4: two epochs are done
    (run / "checkpoint0001.pth").touch()
    assert place_of(run, set()) == BETWEEN
    assert place_of(run, {"log.txt.part"}) == OTHER
    assert place_of(run, {"log.txt.part", "checkpoint.pth.part"}) == DURING
    (run / "checkpoint0002.pth").touch()  # written before checkpoint.pth
    assert place_of(run, set()) == DURING
    for path in run.glob("checkpoint*"):
        path.unlink()
    assert place_of(run, set()) == BEFORE


def test_results_continue_those_of_an_earlier_part(tmp_path):
    path = tmp_path / "state.json"
    tally = kill_campaign.Tally(kills=3, runs=1)
    path.write_text(json.dumps({"seed": 2, "kinds": kill_campaign.as_dicts({"rollback": tally})}))
    loaded = kill_campaign.load_state(path, ["rollback", "mode fast"], 2)
    assert loaded == {"rollback": tally, "mode fast": kill_campaign.Tally()}
    assert kill_campaign.total(loaded) == 3
    with pytest.raises(SystemExit, match="has --seed 2, got 1"):
        kill_campaign.load_state(path, ["rollback"], 1)

"""A resume lists the parts that the checkpoint lacks, and what follows from it."""

from __future__ import annotations

import re

import pytest
import torch

from fastdino import checkpoint
from fastdino.training.loop import train
from fastdino.training.resume import OPTIONAL_PARTS

pytestmark = pytest.mark.usefixtures("small_networks")


def test_missing_parts_are_explained(tiny, pictures, tmp_path, capsys):
    settings = {"data_path": str(pictures), "output_dir": str(tmp_path), "amp_dtype": "fp16"}
    train(tiny(**settings, epochs=1))
    path = tmp_path / "checkpoint.pth"
    state = checkpoint.load(path)
    for part, effect in OPTIONAL_PARTS.items():
        torch.save({key: value for key, value in state.items() if key != part}, path)
        train(tiny(**settings, epochs=1))
        assert f"{path} lacks some parts: {part} ({effect})\n" in capsys.readouterr().err
    torch.save(state, path)
    train(tiny(**settings, epochs=1))
    assert "lacks" not in capsys.readouterr().err


def test_a_checkpoint_of_the_papers_code_is_explained_in_one_line(tiny, pictures, tmp_path, capsys):
    settings = {"data_path": str(pictures), "output_dir": str(tmp_path)}
    train(tiny(**settings, epochs=1))
    path = tmp_path / "checkpoint.pth"
    state = checkpoint.load(path)
    papers = ("student", "teacher", "optimizer", "epoch", "args", "dino_loss")
    torch.save({key: state[key] for key in papers}, path)
    capsys.readouterr()
    assert train(tiny(**settings, epochs=2, lr=0.05)) == "finished"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "lacks" in line]
    assert len(warnings) == 1
    named = set(re.findall(r"(\w+) \(", warnings[0]))
    assert named == set(OPTIONAL_PARTS) - {"args", "fp16_scaler"}

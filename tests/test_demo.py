from __future__ import annotations

import json

import pytest
from PIL import Image

from fastdino import cli, demo
from tests.commands import flags_of


@pytest.fixture
def fake_commands(monkeypatch):
    """Return a function that makes every command exit with a status and records the calls."""

    def put(status):
        lines = []
        monkeypatch.setattr(cli, "main", lambda line: lines.append(line) or status)
        return lines

    return put


def test_a_folder_with_a_space_stays_one_argument(fake_commands, tmp_path):
    lines = fake_commands(0)
    demo.run("shapes", "--size 96 --output_dir", tmp_path / "my run")
    assert lines == [["shapes", "--size", "96", "--output_dir", str(tmp_path / "my run")]]


def test_the_demo_stops_at_the_first_failing_command(fake_commands, tmp_path):
    lines = fake_commands(2)
    with pytest.raises(SystemExit) as exit_status:
        demo.main(flags_of(demo, "--output_dir", str(tmp_path)))
    assert exit_status.value.code == 2
    assert [line[0] for line in lines] == ["shapes"]


def test_the_demo_evaluates_what_it_trained_and_draws_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "SHAPES", "--train_per_class 2 --val_per_class 1 --size 32 --clips 0")
    monkeypatch.setattr(
        demo, "TRAIN",
        f"{demo.MODEL} --global_crops_size 16 --local_crops_size 8 --local_crops_number 1 "
        "--out_dim 8 --batch_size_per_gpu 8 --epochs 1 --warmup_epochs 0 --num_workers 0",
    )  # fmt: skip
    monkeypatch.setattr(demo, "KNN", "--resize 16 --crop 16 --nb_knn 20")
    monkeypatch.setattr(demo, "SIDE", 32)
    root = tmp_path / "run"
    assert demo.main(flags_of(demo, "--output_dir", str(root), "--seed", "3")) == 0
    assert json.loads((root / "shapes/shapes.json").read_text())["seed"] == 3
    assert json.loads((root / "config.json").read_text())["config"]["seed"] == 3
    results = json.loads((root / "jaccard.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    accuracies = lines[lines.index(f"20-NN accuracy on {root / 'shapes/val'} (chance 8.3 %):") :]
    assert [line.split()[0] for line in accuracies[1:4]] == ["raw", "untrained", "trained"]
    for line, name in zip(accuracies[5:7], ("untrained", "trained"), strict=True):
        assert line.split() == [name, "network", f"{results[name]['best_head']:.1f}", "%"]
    for name in ("attention.png", "loss.png"):
        with Image.open(root / name) as picture:
            assert picture.width > 300

"""Whole runs: their output, their data, and errors before the first step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdino import Trainer, checkpoint
from fastdino.config import TrainConfig
from fastdino.data import scan_images
from fastdino.errors import CheckpointError, ConfigError, DataError, UserError
from fastdino.training import loop
from fastdino.training.loop import train
from tests.runs import STEPS, assert_same_run, interrupt, weights_of

pytestmark = pytest.mark.usefixtures("small_networks")


def test_run_writes_the_papers_files_once_and_prints_a_headline(config, tmp_path, capsys):
    assert train(config(saveckp_freq=2)) == "finished"
    run = tmp_path / "run"
    assert {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0002.pth", "log.txt", "config.json",
            "tensorboard", ".lock", "images.npz"} == set(os.listdir(run))  # fmt: skip
    state = weights_of(run)
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"} <= set(state)
    assert state["epoch"] == 3
    assert state["args"]["arch"] == "vit_nano"
    assert "module.backbone.blocks.0.attn.qkv.weight" in state["student"]
    assert "head.last_layer.weight_v" in state["teacher"]
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert {"train_loss", "train_lr", "train_wd"} <= set(lines[0])
    assert lines[0]["train_kl"] > 0
    saved = json.loads((run / "config.json").read_text())
    assert TrainConfig.from_dict(saved["config"]) == config(saveckp_freq=2)
    assert saved["resolved"]["attention"]["value"] == "sdpa"
    assert saved["resolved"]["packing"]["value"] == "on"
    assert any(name.startswith("events") for name in os.listdir(run / "tensorboard"))
    out = capsys.readouterr().out.splitlines()
    for part in (
        "vit_nano on cpu", "attention: sdpa (", "packing: on (", "kernels: torch",
        "crops: torchvision", "precision: fp32 (", "18 images (0 skipped)", "4 steps per epoch",
    ):  # fmt: skip
        assert part in out[0]
    assert len(out) == 1 + 3  # without a terminal: the headline and a line per epoch
    before = (run / "checkpoint.pth").read_bytes()
    assert train(config(saveckp_freq=2)) == "finished"
    assert (run / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"fsdp": True}, ConfigError, "--fsdp true needs several processes"),
        ({"data_path": "/nowhere"}, DataError, "there is no file or folder /nowhere"),
        ({"batch_size_per_gpu": 32}, DataError, "--batch_size_per_gpu"),
        ({"arch": "vit_smal"}, ConfigError, "did you mean vit_small"),
        (
            {"output_dir": "/dev/null/run"},
            CheckpointError,
            r"--output_dir /dev/null/run cannot be written \(.*Not a dir.*\): use another folder",
        ),
        ({"attention": "xformers"}, ConfigError, "--attention xformers does not work"),
    ],
)
def test_user_errors_are_raised_before_the_run(config, settings, kind, message):
    with pytest.raises(kind, match=message):
        train(config(**settings))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SLURM_STEP_NUM_TASKS", "8", "SLURM_PROCID must be a number"),
        ("WORLD_SIZE", "2", "no RANK"),
        ("FASTDINO_KERNELS", "abacus", "FASTDINO_KERNELS must be one of .*'abacus'"),
    ],
)
def test_invalid_environment_is_rejected(config, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        train(config())


def test_a_node_without_the_data_is_one_line(config, pictures, monkeypatch, tmp_path):
    """Rank 0 scans the images; here its node loses them, as if another one lacked them."""
    images = tmp_path / "pictures"
    shutil.copytree(pictures, images)

    def scan_elsewhere(*args, **options):
        dataset = scan_images(*args, **options)
        images.rename(tmp_path / "elsewhere")
        return dataset

    monkeypatch.setattr(loop, "scan_images", scan_elsewhere)
    with pytest.raises(DataError, match=r"has no .*, which rank 0 found: every node") as error:
        train(config(data_path=str(images)))
    assert str(images) in str(error.value)


def test_public_train_function_survives_the_import_of_training():
    code = (
        "import fastdino; fastdino.train; import fastdino.training.loop; "
        "assert callable(fastdino.train)"
    )
    paths = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in (".", "kernels"))
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths}
    )


def test_crops_beyond_any_memory_are_one_line(config):
    with pytest.raises(UserError, match="lower .*--global_crops_size"):
        train(config(global_crops_size=2_000_000_000))


def test_out_of_memory_error_suggests_flags(config, monkeypatch):
    def full(self, crops):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "train_step", full)
    flags = r"lower --batch_size_per_gpu \(now 4\).*--grad_accum"
    with pytest.raises(UserError, match=flags) as error:
        train(config())
    assert "--attention" not in str(error.value)
    with pytest.raises(UserError, match=rf"{flags}.* use --attention sdpa, which keeps no"):
        train(config(attention="matmul"))


def test_broken_images_are_skipped_counted_and_listed(config, tmp_path, pictures, capsys):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))):
        (folder / f"{i}.jpg").write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_text("not a picture")
    settings = {"data_path": str(folder.parent), "epochs": 1}
    train(config(**settings, max_bad_share=0.1))
    captured = capsys.readouterr()
    assert "18 images (1 skipped)" in captured.out
    assert "broken.jpg" in captured.err
    line = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert line["skipped_images"] == 1
    with pytest.raises(DataError, match="max_bad_share"):
        train(config(**settings, max_bad_share=0.01, output_dir=str(tmp_path / "other")))


def test_run_on_shards_matches_run_on_folder(config, tmp_path, pictures, make_tar, monkeypatch):
    files = sorted(pictures.rglob("*.jpg"))
    for n, part in enumerate((files[:7], files[7:])):
        make_tar(tmp_path / "shards" / f"s-{n}.tar", {p.name: p.read_bytes() for p in part})
    shards = config(data_path=str(tmp_path / "shards" / "s-{0..1}.tar"), epochs=2)
    interrupt(monkeypatch, STEPS + 1)
    assert train(shards) == "interrupted"
    assert train(shards) == "finished"
    assert train(config(output_dir=str(tmp_path / "folder"), epochs=2)) == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "folder")


def test_padded_epoch_has_every_image(config, tmp_path, capsys):
    assert train(config(epochs=1, last_batch="pad")) == "finished"
    assert "5 steps per epoch" in capsys.readouterr().out


def test_init_from_loads_a_backbone_and_is_ignored_on_resume(config, tmp_path, capsys, monkeypatch):
    train(config(epochs=1, seed=5, output_dir=str(tmp_path / "before")))
    path = tmp_path / "before" / "checkpoint.pth"
    start = checkpoint.load(path)["teacher"]
    interrupt(monkeypatch, 1)
    settings = {"init_from": str(path), "lr": 0.0, "weight_decay": 0.0, "weight_decay_end": 0.0}
    fresh = Trainer(config(**settings), STEPS).student.state_dict()
    assert train(config(**settings)) == "interrupted"
    for key in ("student", "teacher"):  # unchanged by two steps with lr 0
        weights = checkpoint.strip_prefix(weights_of(tmp_path / "run")[key], "module.")
        for name, tensor in weights.items():
            expected = start if name.startswith("backbone.") else fresh
            torch.testing.assert_close(tensor, expected[name])
    loaded = f"loaded the backbone of {path} (teacher) into student and teacher"
    assert loaded in capsys.readouterr().out
    path.unlink()  # no longer needed
    assert train(config(**settings)) == "finished"
    captured = capsys.readouterr()
    assert "--init_from is ignored: it only applies to a new run" in captured.out
    assert "other settings" not in captured.err


def test_init_from_with_other_shapes_is_rejected_before_the_first_step(config, tmp_path):
    train(config(epochs=1, output_dir=str(tmp_path / "before")))
    path = str(tmp_path / "before" / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.weight is \(32, 3, 8, 8\), exp"):
        train(config(init_from=path, patch_size=16))
    assert not (tmp_path / "run" / "checkpoint.pth").exists()

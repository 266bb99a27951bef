from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import checkpoint, cli, distributed, signals
from fastdino.data import scan_images
from fastdino.evals import linear
from fastdino.evals.feature_cache import FeatureCache
from fastdino.evals.linear_data import AugmentedImages, ProbeData
from fastdino.evals.linear_probe import FrozenFeatures, Probe
from fastdino.evals.transforms import random_crop
from fastdino.models.backbones import build_backbone
from tests.commands import break_pixels, error_of, flags_of, write_colours
from tests.processes import run_commands_in_two, run_two

FLAGS = (
    "--arch vit_nano --patch_size 8 --resize 36 --crop 32 --num_workers 0 --device cpu "
    "--n_last_blocks 2 --epochs 4 --lr 2 --batch_size_per_gpu 6"
)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("few"))


@pytest.fixture
def copy(few, tmp_path):
    return Path(shutil.copytree(few, tmp_path / "copy"))


@pytest.fixture
def run(few, tmp_path):
    """Return a function that runs `fastdino linear` on `few` into tmp_path/NAME."""

    def command(name, *words):
        line = ["linear", "--data_path", str(few), *FLAGS.split()]
        return cli.main([*line, "--output_dir", str(tmp_path / name), *map(str, words)])

    return command


def classifier_of(folder):
    return checkpoint.load(folder / "checkpoint.pth.tar")["state_dict"]


def assert_same_classifier(folder, other, **tolerance):
    ours, theirs = classifier_of(folder), classifier_of(other)
    assert list(ours) == list(theirs) == ["module.linear.weight", "module.linear.bias"]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


def results_of(folder):
    return json.loads((folder / "linear.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_crops_depend_only_on_seed_epoch_and_index(few):
    source = scan_images(few / "train")

    def crop(index, seed=0, epoch=0):
        return AugmentedImages(source, random_crop(16), seed=seed, epoch=epoch)[index][0]

    assert torch.equal(crop(3), crop(3))
    assert not torch.equal(crop(3), crop(3, epoch=1))
    assert not torch.equal(crop(3), crop(3, seed=1))
    before = torch.get_rng_state()
    crop(0)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is untouched"


def test_a_run_learns_and_writes_the_papers_files(run, few, tmp_path, capsys):
    assert run("a", "--val_freq", "2") == 0
    state = checkpoint.load(tmp_path / "a" / "checkpoint.pth.tar")
    assert {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} <= set(state)
    assert state["state_dict"]["module.linear.weight"].shape == (3, 2 * 96)
    lines = log_of(tmp_path / "a")
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert ["test_acc1" in line for line in lines] == [True, False, True, True]
    peak = 2 * 6 / 256
    assert [line["train_lr"] for line in lines] == pytest.approx(
        [peak * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    )
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    results = results_of(tmp_path / "a")
    settings = results["settings"]
    assert (settings["data_path"], settings["lr"], settings["crop"]) == (str(few), 2, 32)
    assert settings["weights"] == state["protocol"]["weights"]
    assert settings["processes"] == 1
    assert results["acc1"] == lines[-1]["test_acc1"] > 50
    assert results["best_acc1"] == state["best_acc"] >= results["acc1"]
    captured = capsys.readouterr()
    assert "epoch 4/4: accuracy on 6 images: top-1" in captured.out
    assert captured.err == "", "no progress bar without a terminal"


def test_best_accuracy_is_that_of_the_best_epoch(run, tmp_path, monkeypatch):
    accuracies, validate = iter([40.0, 60.0, 50.0, 20.0]), Probe.validate

    def replaced(self, *inputs):
        return validate(self, *inputs) | {"acc1": next(accuracies)}

    monkeypatch.setattr(Probe, "validate", replaced)
    assert run("a") == 0
    results = results_of(tmp_path / "a")
    assert (results["acc1"], results["best_acc1"]) == (20, 60)


def test_each_validation_image_is_seen_by_one_rank(few, monkeypatch):
    args = flags_of(linear, "--data_path", str(few), *FLAGS.split())
    data = ProbeData.load(args, torch.device("cpu"), ("val",))
    samples = [(torch.tensor(i), i) for i in range(11)]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seen.append([i for _, numbers in data.val_batches(samples) for i in numbers.tolist()])
    assert seen == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


def test_each_epoch_sees_every_image_once_in_a_new_order(run, monkeypatch):
    seen, get = {}, AugmentedImages.__getitem__

    def record(self, index):
        seen.setdefault(self.epoch, []).append(index)
        return get(self, index)

    monkeypatch.setattr(AugmentedImages, "__getitem__", record)
    assert run("a") == 0
    assert [sorted(order) for order in seen.values()] == [list(range(12))] * 4
    assert len({tuple(order) for order in seen.values()}) == 4


def test_resumed_run_matches_uninterrupted_run(run, tmp_path, monkeypatch, capsys):
    assert run("whole") == 0
    with monkeypatch.context() as patch:
        train_epoch = Probe.train_epoch

        def interrupted(self, *words):
            if self.epoch == 2:
                raise KeyboardInterrupt
            return train_epoch(self, *words)

        patch.setattr(Probe, "train_epoch", interrupted)
        assert run("cut") == 130
    with open(tmp_path / "cut" / "log.txt", "a") as log:
        log.write('{"epoch": 2, "train_loss": 1}\n{"epo')
    capsys.readouterr()
    assert run("cut") == 0
    assert "2 of 4 epochs are done" in capsys.readouterr().out
    assert_same_classifier(tmp_path / "cut", tmp_path / "whole", rtol=0, atol=0)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
    before = (tmp_path / "cut" / "checkpoint.pth.tar").read_bytes()
    assert run("cut") == 0
    assert (tmp_path / "cut" / "checkpoint.pth.tar").read_bytes() == before


@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_signal_saves_after_the_step_and_the_resumed_run_matches(
    run, tmp_path, monkeypatch, capsys, step
):
    batch = ["--batch_size_per_gpu", "3"]  # 4 steps per epoch
    assert run("whole", *batch) == 0
    steps = []
    backward = torch.Tensor.backward

    def signalled(loss):
        steps.append(loss)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        backward(loss)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", signalled)
        assert run("cut", *batch) == 75
    assert len(steps) == step
    captured = capsys.readouterr()
    epochs, left = divmod(step - 1, 4)
    assert f"stopped by SIGTERM after {epochs} epochs and {3 * (left + 1)} images" in captured.out
    assert len(log_of(tmp_path / "cut") if epochs else []) == epochs
    assert run("cut", *batch) == 0
    assert "images of the next" in capsys.readouterr().out
    assert_same_classifier(tmp_path / "cut", tmp_path / "whole", rtol=0, atol=0)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


@pytest.fixture
def made(monkeypatch):
    """Return the names of the feature files that are written, in order."""
    names, write = [], FeatureCache._write_share

    def record(self, part, *words):
        names.append(part.name)
        return write(self, part, *words)

    monkeypatch.setattr(FeatureCache, "_write_share", record)
    return names


def test_as_many_cached_passes_as_epochs_match_the_uncached_run(run, tmp_path, made, capsys):
    assert run("plain") == 0
    assert run("cached", "--cache", "--cache_epochs", "4") == 0
    assert len(made) == 5
    assert_same_classifier(tmp_path / "cached", tmp_path / "plain", rtol=1e-3, atol=1e-5)
    assert "unlike in the paper's protocol, 4 augmentation(s)" in capsys.readouterr().out
    assert list((tmp_path / "cached" / "features").glob("train-*/train-augmented0003.npy"))


def test_cache_is_reused_only_for_the_same_weights_images_and_settings(run, tmp_path, made, copy):
    cache = ["--cache", tmp_path / "cache", "--epochs", "1"]
    centre = ["train-center.npy.part", "val.npy.part"]
    assert run("a", *cache) == 0
    assert made == centre
    assert run("b", *cache, "--lr", "3") == 0
    assert made == centre, "reused"
    assert run("c", *cache, "--cache_epochs", "1") == 0
    assert made[2:] == ["train-augmented0000.npy.part"], "one pass in addition to the others"
    weights = build_backbone("vit_nano", patch_size=8, img_size=32)[0].state_dict()
    torch.save(weights, tmp_path / "other.pth")
    for other in (["--n_last_blocks", "1"], ["--pretrained_weights", tmp_path / "other.pth"]):
        made.clear()
        assert run(f"d{other[0]}", *cache, *other) == 0
        assert made == centre
    assert run("f", *cache, "--data_path", copy) == 0
    made.clear()
    Image.new("RGB", (48, 40)).save(copy / "train" / "red" / "0.png")  # of the same size in pixels
    assert run("g", *cache, "--data_path", copy) == 0
    assert made == centre[:1]


CACHED = ["--cache", "--epochs", "1", "--batch_size_per_gpu", "3"]  # batches: 4 of train, 2 of val


def signal_at(batch, made):
    """Return a FrozenFeatures.__call__ that records batch sizes and sends SIGTERM in one batch."""
    call = FrozenFeatures.__call__

    def signalled(self, images):
        if images.any():  # zeros only determine the width
            made.append(len(images))
            if len(made) == batch:  # to the workers too, like a launcher
                group = (os.getpid(), *(child.pid for child in active_children()))
                subprocess.run(["kill", "-TERM", *map(str, group)], check=True)
        return call(self, images)

    return signalled


@pytest.mark.parametrize(
    ("batch", "written", "place", "workers"),
    [(1, 3, "train", 0), (3, 9, "train", 2), (4, 15, "val", 0), (5, 15, "val", 0)],
)
def test_signal_while_a_cache_is_written_keeps_the_finished_rows(
    run, tmp_path, monkeypatch, capsys, batch, written, place, workers
):
    assert run("whole", *CACHED) == 0
    made = []
    monkeypatch.setattr(FrozenFeatures, "__call__", signal_at(batch, made))
    assert run("cut", *CACHED, "--num_workers", workers) == 75
    assert "stopped by SIGTERM while features were written, which" in capsys.readouterr().out
    assert sum(made) == written
    assert next((tmp_path / "cut").rglob("*.part")).parent.name.startswith(f"{place}-")
    assert run("cut", *CACHED) == 0
    assert sum(made) == 12 + 6, "each image is processed once"
    assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("*.done")]
    assert_same_classifier(tmp_path / "cut", tmp_path / "whole", rtol=0, atol=0)


@pytest.mark.parametrize(("rank", "batch", "done"), [(1, 1, 6), (1, 2, 12), (0, 3, None)])
def test_signal_to_one_of_two_ranks_stops_both_and_one_process_resumes(
    run, copy, tmp_path, monkeypatch, rank, batch, done
):
    """Rank 0 has 7 of the 13 images in 3 batches; rank 1 has 6 in 2, but also checks 3 times."""
    shutil.copy(copy / "train" / "red" / "0.png", copy / "train" / "red" / "9.png")
    line = ["linear", "--data_path", str(copy), *FLAGS.split(), *CACHED]
    run_two(_stop_one, [*line, "--output_dir", str(tmp_path / "cut")], rank, batch)
    kept = [int(path.read_text()) for path in tmp_path.rglob("*.done")]
    assert kept == ([] if done is None else [done])
    made = []
    monkeypatch.setattr(FrozenFeatures, "__call__", signal_at(None, made))
    assert run("cut", *CACHED, "--data_path", copy) == 0
    assert sum(made) == (0 if done is None else 13 - done + 6)
    made.clear()
    assert run("whole", *CACHED, "--data_path", copy) == 0
    assert sum(made) == 13 + 6
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
    ours, theirs = (next((tmp_path / name).rglob("train-center.npy")) for name in ("cut", "whole"))
    np.testing.assert_allclose(np.load(ours), np.load(theirs), rtol=1e-4, atol=1e-5)


def _stop_one(line, rank, batch):
    signals.AGREE_SECONDS = 0  # agree after each step
    if os.environ["RANK"] == str(rank):
        FrozenFeatures.__call__ = signal_at(batch, [])
    assert cli.main(line) == 75


def test_unreadable_images_are_not_counted(run, copy, capsys):
    break_pixels(copy / "train" / "red" / "0.png", copy / "val" / "red" / "0.png")
    (copy / "train" / "red" / "text.png").write_text("no picture")
    for name, words in (("plain", []), ("cached", ["--cache"])):
        assert run(name, "--data_path", copy, *words, "--epochs", "1") == 0
        captured = capsys.readouterr()
        assert captured.err == "train: 1 images left out\n"
        assert "192 features, 3 classes, 12 training images" in captured.out
        assert "accuracy on 5 images" in captured.out
    (copy / "train" / "red" / "text.png").unlink()
    break_pixels(*(copy / "val").rglob("*.png"))
    assert run("none", "--data_path", copy, "--epochs", "1") == 2
    assert "none of the images in val/" in error_of(capsys, printed=True)


def test_evaluate_accepts_our_classifier_and_the_papers_linear_weights(run, tmp_path, capsys):
    assert run("a") == 0
    capsys.readouterr()
    assert run("a", "--evaluate") == 0
    assert "accuracy on 6 images: top-1" in capsys.readouterr().out
    scores = json.loads((tmp_path / "a" / "evaluate.json").read_text())
    assert scores["acc1"] == results_of(tmp_path / "a")["acc1"]
    assert "lr" not in scores["settings"]
    classifier = scores["settings"]["classifier"]
    path = tmp_path / "linearweights.pth"
    torch.save({"state_dict": classifier_of(tmp_path / "a"), "best_acc": 77.0}, path)
    assert run("b", "--evaluate", "--linear_weights", path) == 0
    again = json.loads((tmp_path / "b" / "evaluate.json").read_text())
    assert (again["acc1"], again["settings"]["linear_weights"]) == (scores["acc1"], str(path))
    assert again["settings"]["classifier"] == classifier
    torch.save({k: 2 * v for k, v in classifier_of(tmp_path / "a").items()}, path)
    assert run("b", "--evaluate", "--linear_weights", path) == 0
    other = json.loads((tmp_path / "b" / "evaluate.json").read_text())
    assert other["settings"]["classifier"] != classifier


def test_two_processes_with_half_the_batch_match_one(run, few, tmp_path):
    assert run("one") == 0
    line = ["linear", "--data_path", str(few), *FLAGS.split(), "--batch_size_per_gpu", "3"]
    cached = ["--cache", "--cache_epochs", "4"]
    run_commands_in_two([*line, "--output_dir", str(tmp_path / "two"), *cached])
    assert_same_classifier(tmp_path / "two", tmp_path / "one", rtol=1e-3, atol=1e-5)
    assert results_of(tmp_path / "two")["acc1"] == results_of(tmp_path / "one")["acc1"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--lr nan", "--lr must be a finite number above 0, got nan"),
        ("--cache_epochs 2", "--cache_epochs requires --cache"),
        ("--cache --evaluate", "--cache is only for training"),
        ("--linear_weights x.pth", "--linear_weights requires --evaluate"),
        ("--n_last_blocks 7", "--n_last_blocks 7: the network has 6 blocks"),
        ("--avgpool_patchtokens true", "requires --n_last_blocks 1, got 2"),
        ("--num_labels 2", "--num_labels 2: there are 3 classes"),
        ("--data_path /nowhere", "there is no file or folder /nowhere/train"),
        ("--pretrained_weights /nowhere.pth", "there is no file /nowhere.pth"),
        ("--evaluate", "there is no file"),
        ("--output_dir /dev/null/x", "cannot write /dev/null/x"),
    ],
)
def test_invalid_flags_are_errors(run, capsys, flags, part):
    assert run("x", *flags.split()) == 2
    assert part in error_of(capsys, printed=True)


def test_a_probe_of_other_features_or_another_schedule_does_not_resume(run, tmp_path, capsys):
    assert run("a", "--epochs", "1") == 0
    before = (tmp_path / "a" / "checkpoint.pth.tar").read_bytes()
    capsys.readouterr()
    for flags, part in (
        ("--epochs 2", "epochs 2 (was 1); use another --output_dir"),
        (
            "--epochs 1 --n_last_blocks 1",
            "weight is (3, 192), expected (3, 96); use the --n_last_blocks",
        ),
        ("--epochs 1 --seed 3", "is of another probe: weights"),
        ("--epochs 1 --cache", "cache_epochs 0 (was None)"),
        ("--epochs 1 --image_range scale", "image_range scale (was clip)"),
        ("--epochs 1 --exif_orientation true", "exif True (was False)"),
    ):
        assert run("a", *flags.split()) == 2
        assert part in error_of(capsys, printed=True)
    assert (tmp_path / "a" / "checkpoint.pth.tar").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", 5),
        ("optimizer", {"param_groups": [{"nesterov": False, "params": [0, 1]}], "state": {}}),
        ("scheduler", {}),
        ("scheduler", {"T_max": "4"}),
        ("epoch", -1),
        ("epoch", None),
        ("seen", "all"),
        ("losses", 3),
        ("protocol", 3),
    ],
)
def test_content_of_other_types_ends_in_one_line(run, tmp_path, capsys, name, value):
    path = tmp_path / "a" / "checkpoint.pth.tar"
    path.parent.mkdir()
    probe = Probe(192, 3, lr=1.0, epochs=4, seed=0, device=torch.device("cpu"))
    probe.save(path, {})
    state = checkpoint.load(path)
    del state["protocol"]
    torch.save(state | {name: value}, path)
    assert run("a") == 2
    assert "checkpoint.pth.tar" in error_of(capsys, printed=True)


def test_output_folder_of_a_pretraining_run_is_refused(run, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint.pth").write_bytes(b"")
    assert run("a") == 2
    assert "holds a pretraining run with its own log.txt" in error_of(capsys, printed=True)

"""Runs with --knn_data and --attention_every: results, resuming, ranks, and invalid input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import Trainer, checkpoint, cli
from fastdino.config import TrainConfig
from fastdino.errors import ConfigError, DataError
from fastdino.evals import features
from fastdino.models.linear_layer import Linear
from fastdino.signals import EXIT_INTERRUPTED
from fastdino.training import monitor
from fastdino.training.loop import train
from fastdino.training.monitor import TeacherMonitor, crop_sizes, picture_sizes
from tests.commands import break_pixels, error_of, write_colours
from tests.processes import run_two
from tests.runs import train_small
from tests.small_networks import shrink_networks

pytestmark = pytest.mark.usefixtures("small_networks")
STEPS = 3  # per epoch: 12 images in batches of 4
MONITORED = {"knn_every": 2, "attention_every": 1, "logger": "csv"}


@pytest.fixture
def colours(tmp_path):
    """A dataset with 12 training and 6 validation images in 3 classes, one in a wrong class."""
    return write_mixed_colours(tmp_path / "colours")


def write_mixed_colours(folder):
    root = write_colours(folder)
    shutil.copy(root / "val/blue/1.png", root / "val/red/1.png")
    return root


def settings_of(root, output):
    """Return the settings of a monitored run on a dataset of `write_mixed_colours`."""
    return {
        "data_path": str(root / "train"),
        "knn_data": str(root),
        "output_dir": str(output),
        "drop_path_rate": 0.2,
        "print_freq": 2,
        **MONITORED,
    }


@pytest.fixture
def config(tiny, colours, tmp_path):
    """Build the config of a run on `colours` that writes to tmp_path/run."""
    settings = settings_of(colours, tmp_path / "run")
    return lambda **overrides: tiny(**(settings | overrides))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    root = write_mixed_colours(folder / "colours")
    with pytest.MonkeyPatch.context() as patch:
        shrink_networks(patch)
        train(tiny(**settings_of(root, folder / "run")))
    return folder / "run"


def command_of(config):
    line = ["train"]
    for name, value in config.to_dict().items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def lines_of(run):
    """Return the lines of log.txt without the speed."""
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    for line in lines:
        assert line.pop("images_per_second") > 0
    return lines


def curve_of(run, name):
    rows = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    return [(int(iteration), float(value)) for iteration, key, value in rows if key == name]


def assert_same_weights(run, other):
    ours, theirs = (checkpoint.load(folder / "checkpoint.pth") for folder in (run, other))
    for key in ("student", "teacher", "dino_loss"):
        for name, tensor in ours[key].items():
            assert torch.equal(tensor, theirs[key][name]), f"{key} {name}"
    for rank, generators in enumerate(ours["generators"]):
        assert torch.equal(generators["cpu"], theirs["generators"][rank]["cpu"])


def test_results_are_in_the_log_the_curves_and_the_progress(config, tmp_path, capsys):
    assert train(config()) == "finished"
    run = tmp_path / "run"
    lines = lines_of(run)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert ["knn_top1" in line for line in lines] == [False, True, True]  # and the last epoch
    for name in ("top1", "top5"):
        expected = [
            (2 * STEPS - 1, lines[1][f"knn_{name}"]),
            (3 * STEPS - 1, lines[2][f"knn_{name}"]),
        ]
        assert curve_of(run, f"knn/{name}") == expected
    assert f"knn_top1 {lines[2]['knn_top1']:.4g}" in capsys.readouterr().out.splitlines()[-1]
    assert sorted(os.listdir(run / "attention")) == ["0000.png", "0001.png", "0002.png"]
    assert not list(run.glob("tensorboard"))


def test_accuracy_is_that_of_the_knn_command(config, tmp_path):
    train(config())
    output = tmp_path / "knn.json"
    resize, crop = crop_sizes(config())
    line = ["knn", "--pretrained_weights", str(tmp_path / "run/checkpoint.pth"), "--nb_knn", "20",
            "--data_path", config().knn_data, "--resize", str(resize), "--crop", str(crop),
            "--device", "cpu", "--num_workers", "0", "--output", str(output)]  # fmt: skip
    assert cli.main(line) == 0
    scores, line = json.loads(output.read_text()), lines_of(tmp_path / "run")[-1]
    assert scores["20"] == {"top1": line["knn_top1"], "top5": line["knn_top5"]}
    assert 0 < line["knn_top1"] < line["knn_top5"]


def test_sizes_of_the_papers_crops_are_the_papers():
    assert crop_sizes(TrainConfig()) == (256, 224)
    assert crop_sizes(TrainConfig(global_crops_size=96)) == (110, 96)
    assert picture_sizes(TrainConfig()) == (549, 480)
    assert picture_sizes(TrainConfig(global_crops_size=48, patch_size=1)) == (118, 103)
    assert picture_sizes(TrainConfig(global_crops_size=48, patch_size=8)) == (256, 224)


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_monitoring_does_not_change_the_training(config, tmp_path, arch):
    settings = {
        "arch": arch,
        "epochs": 2 - (arch == "resnet18"),
        "num_workers": 1,
        "use_bn_in_head": arch == "resnet18",
    }
    every = {"knn_every": 1, "attention_every": int(arch == "vit_nano")}
    train(config(**settings | every))
    off = {
        "knn_data": "",
        "knn_every": 0,
        "attention_every": 0,
        "output_dir": str(tmp_path / "off"),
    }
    train(config(**settings | off))
    assert_same_weights(tmp_path / "run", tmp_path / "off")


def test_modes_of_the_teacher_are_restored(config, tmp_path, monkeypatch):
    modes = []
    forward = Linear.forward

    def recorded(self, x):
        modes.append((self.training, torch.is_grad_enabled()))
        return forward(self, x)

    evaluate = TeacherMonitor.evaluate

    def checked(self, *args):
        teacher = self._trainer.teacher
        teacher.backbone.blocks[1].eval()  # an unusual mixture
        before = [module.training for module in teacher.modules()]
        assert True in before
        with monkeypatch.context() as patch:
            patch.setattr(Linear, "forward", recorded)
            results = evaluate(self, *args)
        assert [module.training for module in teacher.modules()] == before
        return results

    monkeypatch.setattr(TeacherMonitor, "evaluate", checked)
    train(config(epochs=1, num_workers=0))
    assert set(modes) == {(False, False)}


class Killed(BaseException):
    """Ends a run without any of its exception handling."""


@pytest.mark.parametrize("moment", ["step", "extraction", "after_evaluation", "signal"])
def test_resumed_run_matches_an_uninterrupted_one(config, whole, tmp_path, monkeypatch, moment):
    line, run = command_of(config()), tmp_path / "run"
    extract, step, evaluate = (
        features.Extractor.extract,
        Trainer.train_step,
        TeacherMonitor.evaluate,
    )

    def extracting(self, images, *args, **kwargs):
        if moment == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            return extract(self, images, *args, **kwargs)
        raise Killed

    def stepping(self, crops):
        if self.iteration == 2 * STEPS + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, crops)

    def evaluated(self, *args):
        results = evaluate(self, *args)
        if not results:
            return results
        write = self._progress.write_epoch

        def written(results):
            write(results)  # the line is in log.txt, the checkpoint is older
            raise Killed

        self._progress.write_epoch = written
        return results

    with monkeypatch.context() as patch:
        if moment == "step":
            patch.setattr(Trainer, "train_step", stepping)
        elif moment == "after_evaluation":
            patch.setattr(TeacherMonitor, "evaluate", evaluated)
        else:
            patch.setattr(features.Extractor, "extract", extracting)
        if moment in ("step", "signal"):
            assert cli.main(line) == EXIT_INTERRUPTED
        else:
            with pytest.raises(Killed):
                cli.main(line)
    assert checkpoint.load(run / "checkpoint.pth")["iteration"] == 2 * STEPS + 2 * (
        moment == "step"
    )
    assert cli.main(line) == 0
    assert_same_weights(run, whole)
    assert lines_of(run) == lines_of(whole)
    for name in ("train/loss", "knn/top1"):
        curve = dict(curve_of(run, name))
        assert curve == dict(curve_of(whole, name))
        repeated = moment == "after_evaluation" and name == "knn/top1"
        assert len(curve_of(run, name)) == len(curve) + repeated
    for path in (run / "attention").iterdir():
        assert path.read_bytes() == (whole / "attention" / path.name).read_bytes()


def test_evaluation_interrupted_after_the_last_step_is_resumed(config, tmp_path, monkeypatch):
    extract = features.Extractor.extract

    def extracting(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return extract(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(features.Extractor, "extract", extracting)
        assert cli.main(command_of(config(epochs=1))) == EXIT_INTERRUPTED
    assert not (tmp_path / "run/log.txt").exists()
    monkeypatch.setattr(Trainer, "train_step", None)
    assert cli.main(command_of(config(epochs=1))) == 0
    (line,) = lines_of(tmp_path / "run")
    assert line["knn_top1"] >= 0
    assert line["train_loss"] > 0
    before = (tmp_path / "run/checkpoint.pth").read_bytes()
    assert cli.main(command_of(config(epochs=1))) == 0
    assert (tmp_path / "run/checkpoint.pth").read_bytes() == before


def test_resume_with_other_monitoring_needs_no_warning(config, capsys):
    train(config(epochs=1))
    train(config(epochs=1, knn_every=3, attention_every=0, logger="none"))
    assert "other settings" not in capsys.readouterr().err


def train_each(runs):
    for settings in runs:
        train_small(settings)


def test_two_processes_match_one(config, tmp_path, colours):
    """DDP and FSDP."""
    (colours / "val/red/0.png").unlink()  # 5 images in batches of 2: 2 batches and 1
    settings = {"drop_path_rate": 0.0, "epochs": 2, "knn_every": 1, "lr": 0.0, "weight_decay": 0.0,
                "weight_decay_end": 0.0, "min_lr": 0.0}  # fmt: skip
    train(config(**settings, output_dir=str(tmp_path / "one")))
    settings |= {"batch_size_per_gpu": 1, "grad_accum": 2}
    runs = [config(**settings, fsdp=fsdp, output_dir=str(tmp_path / str(fsdp)))
            for fsdp in (False, True)]  # fmt: skip
    run_two(train_each, [run.to_dict() for run in runs])
    one = tmp_path / "one"
    for two in (Path(run.output_dir) for run in runs):
        for ours, theirs in zip(lines_of(two), lines_of(one), strict=True):
            for name in ("knn_top1", "knn_top5"):
                assert ours[name] == theirs[name]
        pictures = [np.asarray(Image.open(folder / "attention/0001.png"), int)
                    for folder in (one, two)]  # fmt: skip
        assert np.abs(pictures[0] - pictures[1]).max() <= 4


def test_pictures_show_the_first_image_of_each_class(config, tmp_path, colours):
    train(config(epochs=1, global_crops_size=108))  # 231 px: 28 patches, 7 px are cut off
    pixels = np.asarray(Image.open(tmp_path / "run/attention/0000.png"))
    side = 28 * 8 + 2
    assert pixels.shape == (4 * side, (2 + 2) * side, 3)
    means = [pixels[i * side : (i + 1) * side, :side].mean((0, 1)) for i in range(4)]
    assert [int(mean.argmax()) for mean in means] == [2, 1, 0, 2]  # blue, green, red, blue
    maps = pixels[:side, side:]
    assert len(np.unique(maps.reshape(-1, 3), axis=0)) > 16


def test_pictures_of_the_training_set_need_no_labels(config, tmp_path, colours):
    for i, path in enumerate(sorted((colours / "train").rglob("*.png"))):
        shutil.move(path, colours / f"{i:02}.png")
    shutil.rmtree(colours / "train")
    shutil.rmtree(colours / "val")
    break_pixels(colours / "00.png")
    settings = {"data_path": str(colours), "knn_data": "", "knn_every": 0, "max_bad_share": 0.2}
    train(config(**settings, epochs=1))
    pixels = np.asarray(Image.open(tmp_path / "run/attention/0000.png"))
    assert pixels.shape == (4 * 226, 4 * 226, 3)


def test_images_that_become_unreadable_do_not_end_the_run(config, tmp_path, colours, capsys):
    break_pixels(*(colours / "val").rglob("*.png"))
    train(config(attention_every=0, knn_every=1))
    err = capsys.readouterr().err
    assert err.count("none of the 6 images of val can be used") == 3
    assert "k-NN after epoch 1: " in err
    assert ["knn_top1" in line for line in lines_of(tmp_path / "run")] == [False] * 3


def test_left_out_images_are_reported_once(config, tmp_path, colours, capsys):
    (colours / "val/red/text.png").write_text("no picture")
    train(config(knn_every=1))
    assert capsys.readouterr().err.count("val: 1 images left out") == 1


def test_pictures_that_cannot_be_written_do_not_end_the_run(config, tmp_path, monkeypatch, capsys):
    draw = monitor.TeacherMonitor._draw

    def drawing(self, backbone, epoch):
        shutil.rmtree(tmp_path / "run/attention")
        (tmp_path / "run/attention").write_text("a file")
        draw(self, backbone, epoch)
        (tmp_path / "run/attention").unlink()
        (tmp_path / "run/attention").mkdir()

    monkeypatch.setattr(monitor.TeacherMonitor, "_draw", drawing)
    train(config())
    assert capsys.readouterr().err.count("pictures of attention maps cannot be written") == 1


def test_bar_shows_the_results_above_it(config, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(config(epochs=1))
    captured = capsys.readouterr()
    assert re.search(r"^epoch 1/1: knn_top1 \d", captured.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--knn_every 1", "--knn_every 1 needs --knn_data"),
        ("--knn_data {data}", "has no effect without --knn_every N or --attention_every N"),
        ("--knn_every -1 --knn_data {data}", "--knn_every must be a finite number of at least 0"),
        ("--attention_every -1", "--attention_every must be a finite number of at least 0"),
        ("--attention_every 1 --arch resnet18", "--arch resnet18 has no attention of a CLS token"),
        ("--knn_every 1 --knn_data /nowhere", "--knn_data: there is no file or folder /nowhere/tr"),
        ("--knn_every 1 --knn_data {data}/train", "--knn_data {data}/train: there is no folder"),
        ("--knn_every 1 --knn_data {empty}", "--knn_data: no images in {empty}"),
        ("--knn_every 1 --knn_data {flat}", "(a flat folder) has no class folders"),
        ("--knn_every 1 --knn_data {other}", "only one has ['green', 'violet']"),
        ("--logger tensorboard,abacus", "--logger must be auto, none, or some of tensorboard,csv"),
        ("--logger csv,csv", "--logger must be auto, none, or some of"),
        ("--logger csv,none", "--logger must be auto, none, or some of"),
        ("--logger", "expected one argument"),
    ],
)
def test_invalid_input_is_one_line_before_the_first_step(
    config, colours, tmp_path, capsys, monkeypatch, flags, part
):
    places = {"data": colours, **{name: tmp_path / name for name in ("empty", "flat", "other")}}
    for split in ("train", "val"):
        (places["empty"] / split / "a").mkdir(parents=True)
        (places["flat"] / split).mkdir(parents=True)
        shutil.copy(colours / split / "red/0.png", places["flat"] / split)
    shutil.copytree(colours, places["other"])
    (places["other"] / "val/green").rename(places["other"] / "val/violet")
    monkeypatch.setattr(Trainer, "train_step", None)
    plain = config(knn_data="", knn_every=0, attention_every=0)
    line = command_of(plain)
    del line[line.index("--knn_data") : line.index("--knn_data") + 2]
    if flags == "--logger":
        with pytest.raises(SystemExit) as end:
            cli.main([*line, flags])
        assert end.value.code == 2
        assert part in capsys.readouterr().err
        return
    assert cli.main([*line, *flags.format(**places).split()]) == 2
    assert part.format(**places) in error_of(capsys)


def test_unwritable_folder_of_pictures_is_an_error(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/attention").write_text("a file")
    with pytest.raises(checkpoint.CheckpointError, match="cannot write .*attention"):
        train(config())


def test_settings_are_checked_from_python_too():
    with pytest.raises(ConfigError, match="needs --knn_data"):
        TrainConfig(knn_every=1)
    assert TrainConfig(logger="csv, wandb").loggers == ["csv", "wandb"]


def test_dataset_errors_name_the_flag(config):
    with pytest.raises(DataError, match="^--knn_data"):
        train(config(knn_data="/nowhere"))

"""Whole runs: their output, stopping, resuming, rollback, and errors."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdino import Trainer, checkpoint, cli
from fastdino.config import TrainConfig
from fastdino.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UserError
from fastdino.models import backbones
from fastdino.models.head import DINOHead
from fastdino.signals import EXIT_INTERRUPTED
from fastdino.training import resume
from fastdino.training.loop import train
from fastdino.training.resume import MAX_ROLLBACKS
from tests.processes import locked_elsewhere, run_two

STEPS = 4  # per epoch of the fixture `pictures`


@pytest.fixture
def config(tiny, pictures, tmp_path):
    """Build the config of a run on `pictures` that writes to tmp_path/run."""

    def make(**overrides):
        settings = {
            "data_path": str(pictures),
            "output_dir": str(tmp_path / "run"),
            "drop_path_rate": 0.2,
            "print_freq": 2,
        }
        return tiny(**(settings | overrides))

    return make


def weights_of(run):
    return checkpoint.load(run / "checkpoint.pth")


def losses_of(run):
    return [json.loads(line)["train_loss"] for line in (run / "log.txt").read_text().splitlines()]


def assert_same_run(run, other):
    ours, theirs = weights_of(run), weights_of(other)
    for key in ("student", "teacher", "dino_loss"):
        for name, tensor in ours[key].items():
            assert torch.equal(tensor, theirs[key][name]), f"{key} {name}"
    for index, moments in ours["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, theirs["optimizer"]["state"][index][name])
    assert losses_of(run) == losses_of(other)


@pytest.fixture
def interrupt(monkeypatch):
    """Send a signal during the step of an iteration."""
    step = Trainer.train_step

    def at(iteration, number=signal.SIGTERM, times=1):
        def interrupted(self, crops):
            if self.iteration == iteration:
                monkeypatch.setattr(Trainer, "train_step", step)
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return step(self, crops)

        monkeypatch.setattr(Trainer, "train_step", interrupted)

    return at


@pytest.fixture
def during(monkeypatch):
    """Call a function before the step of an iteration, in runs with small checkpoints."""
    step = Trainer.train_step
    head = partial(DINOHead, hidden_dim=32, bottleneck_dim=16)
    monkeypatch.setattr(backbones, "DINOHead", head)

    def at(iteration, action):
        def acting(self, crops):
            if self.iteration == iteration:
                action()
            return step(self, crops)

        monkeypatch.setattr(Trainer, "train_step", acting)

    return at


@pytest.fixture
def fail(monkeypatch):
    """Make steps non-finite: NaN crops, or weights that the step makes infinite."""
    step = Trainer.train_step

    def at(iterations, kind):
        def failing(self, crops):
            if self.iteration not in iterations:
                return step(self, crops)
            if kind == "crops":
                return step(self, [crop * math.nan for crop in crops])
            loss = step(self, crops)
            next(self.student.parameters()).data.fill_(math.inf)
            return loss

        monkeypatch.setattr(Trainer, "train_step", failing)

    return at


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
    ("at", "settings"),
    [
        (1, {}),
        (STEPS - 1, {}),
        (STEPS + 2, {}),
        (STEPS + 1, {"centering": "sinkhorn", "koleo_weight": 0.1, "mode": "fast"}),
    ],
)
def test_resumed_command_matches_uninterrupted_run(config, tmp_path, interrupt, at, settings):
    assert train(config(**settings, output_dir=str(tmp_path / "uninterrupted"))) == "finished"
    line = ["train"]
    for name, value in config(**settings).to_dict().items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if at == 1:  # a launcher forwards the signal that the run also received
        interrupt(at, signal.SIGINT, times=2)
    else:
        interrupt(at, signal.SIGHUP if at == STEPS - 1 else signal.SIGTERM)
    assert cli.main(line) == EXIT_INTERRUPTED == 75
    assert weights_of(tmp_path / "run")["iteration"] == at + 1
    assert cli.main(line) == 0
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


def _train(settings):
    train(TrainConfig.from_dict(settings))


def test_run_killed_at_random_moments_matches_uninterrupted_run(config, tmp_path):
    assert train(config(output_dir=str(tmp_path / "uninterrupted"), epochs=4)) == "finished"
    settings = config(epochs=4, saveckp_every_steps=1).to_dict()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fastdino.training.loop", "fastdino.data.loader_torchvision"])
    path, moment, kills = tmp_path / "run" / "checkpoint.pth", random.Random(0), 0

    def saved():
        return path.stat().st_ino if path.exists() else None

    while True:
        child = server.Process(target=_train, args=(settings,))
        child.start()
        # After two saves, so that it makes progress; then anywhere in a step or a save.
        for _ in range(2):
            before = saved()
            while child.is_alive() and saved() == before:
                time.sleep(0.001)
        child.join(moment.uniform(0, 0.3))
        if kills == 5:
            child.join()
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        kills += 1
        checkpoint.load(path)
    assert child.exitcode == 0
    assert kills >= 2
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("kind", "at", "message"),
    [
        ("crops", STEPS + 1, "the loss is nan at iteration 5"),
        ("weights", 2 * STEPS - 1, r"student.module.backbone.* is not finite"),
    ],
)
def test_nonfinite_step_stops_with_advice(config, tmp_path, fail, kind, at, message):
    fail([at], kind)
    with pytest.raises(NonFiniteError, match=message) as error:
        train(config())
    for part in ("checkpoint.pth", "--lr", "--on_nonfinite"):
        assert part in str(error.value)
    assert weights_of(tmp_path / "run")["iteration"] == STEPS


@pytest.mark.parametrize(
    ("kind", "at", "saved"),
    [("crops", 0, 0), ("crops", STEPS + 1, STEPS), ("weights", 2 * STEPS - 1, STEPS)],
)
def test_rollback_leaves_the_failed_batch_out(config, tmp_path, fail, capsys, kind, at, saved):
    fail([at], kind)
    assert train(config(on_nonfinite="rollback")) == "finished"
    state = weights_of(tmp_path / "run")
    assert (state["left_out"], state["iteration"]) == ([at], 3 * STEPS)
    assert len(losses_of(tmp_path / "run")) == 3
    assert all(map(math.isfinite, losses_of(tmp_path / "run")))
    warning = f"rolled back to iteration {saved}; the batch of iteration {at} will be left out"
    assert warning in capsys.readouterr().err


def test_rollback_stops_after_max_rollbacks(config, fail):
    fail(range(1, 3 * STEPS), "crops")
    with pytest.raises(NonFiniteError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        train(config(on_nonfinite="rollback", batch_size_per_gpu=2))


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
    run_two(_train, two.to_dict())
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
    run_two(_train, sharded.to_dict())
    shutil.copy(two / "checkpoint0001.pth", then / "checkpoint.pth")
    train(config(**settings, output_dir=str(then)))
    assert losses_of(two) == pytest.approx(losses_of(one)[1:], rel=2e-4)
    assert losses_of(then) == pytest.approx(losses_of(one)[2:], rel=2e-4)
    for key, rows in weights_of(one)["student"].items():
        torch.testing.assert_close(weights_of(two)["student"][key], rows, rtol=2e-3, atol=2e-4)


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


def test_unsuitable_checkpoint_is_reported_and_kept(config, tmp_path):
    train(config(epochs=1))
    path = tmp_path / "run" / "checkpoint.pth"
    whole = path.read_bytes()
    message = r"cannot resume .*weight_g is \(64, 1\), expected \(32, 1\)"
    for content, settings, expected in (
        (whole, {"out_dim": 32}, message),
        (whole[:1000], {}, "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=expected):
            train(config(epochs=2, **settings))
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("optimizer", (None, [1], {}, {"param_groups": [{}], "state": {}}, torch.zeros(3))),
        ("generators", (5, [5], [{}], [{"cpu": torch.zeros(3)}])),
        ("progress", (5, {"sums": {"loss": "x"}}, {"counts": 3}, {"unwritten": [5]})),
        ("left_out", (5,)),
        ("images", ({"number": 1},)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_content_of_other_types_ends_in_one_line(config, tmp_path, name, values):
    train(config(epochs=1))
    path = tmp_path / "run" / "checkpoint.pth"
    state = checkpoint.load(path)
    for value in values:
        torch.save(state | {name: value}, path)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pth"):
            train(config(epochs=2))


def test_resume_warns_of_other_settings(config, tmp_path, capsys):
    train(config(epochs=1))
    train(config(epochs=2, lr=0.01, image_range="scale"))
    changed = "--epochs 2 (was 1), --lr 0.01 (was 0.05), --image_range scale (was clip)"
    assert f"other settings: {changed}" in capsys.readouterr().err


def test_resume_with_another_loss_is_shown(config, tmp_path, capsys):
    train(config(epochs=1))
    assert "--centering" not in capsys.readouterr().out
    path = tmp_path / "run/checkpoint.pth"
    state = torch.load(path, weights_only=True)
    del state["args"]["centering"]  # a checkpoint of a version without the flag
    torch.save(state, path)
    center = state["dino_loss"]["center"]
    assert center.any()
    changed = config(epochs=2, centering="sinkhorn", koleo_weight=0.1)
    train(changed)
    captured = capsys.readouterr()
    flags = "--centering sinkhorn (was centering), --koleo_weight 0.1 (was 0.0)"
    assert f"other settings: {flags}, --epochs 2 (was 1)" in captured.err
    assert "--mode parity | --centering sinkhorn | --koleo_weight 0.1 |" in captured.out
    assert torch.equal(weights_of(tmp_path / "run")["dino_loss"]["center"], center)
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert (saved["centering"], saved["koleo_weight"]) == ("sinkhorn", 0.1)
    before, after = (
        json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()
    )
    assert {"train_dino", "train_koleo"} & set(before) == set()
    total = after["train_dino"] + 0.1 * after["train_koleo"]
    assert after["train_loss"] == pytest.approx(total, rel=1e-6)
    assert after["train_kl"] > 0


def delete(run):
    shutil.rmtree(run)


def replace(run):
    run.rename(run.with_name("moved"))
    run.mkdir()


def delete_events(run):
    shutil.rmtree(run / "tensorboard")


def replace_log(run):
    (run / "log.txt").unlink()
    (run / "log.txt").mkdir()


@pytest.mark.parametrize(
    ("fault", "warning", "lines"),
    [
        (delete, "was deleted or replaced during the run", 2),
        (replace, "was deleted or replaced during the run", 2),
        (delete_events, "TensorBoard events cannot be written", 3),
        (replace_log, "cannot write .*log.txt .*the run continues", None),
    ],
)
def test_run_continues_if_its_output_vanishes(
    config, tmp_path, during, capsys, fault, warning, lines
):
    run = tmp_path / "run"
    during(STEPS + 1, lambda: fault(run))
    assert train(config(saveckp_freq=1)) == "finished"
    assert len(re.findall(warning, capsys.readouterr().err)) == (2 if fault is replace_log else 1)
    assert weights_of(run)["iteration"] == 3 * STEPS
    expected = {"checkpoint.pth", "checkpoint0001.pth", "checkpoint0002.pth", "config.json",
                ".lock", "log.txt"}  # fmt: skip
    assert expected <= set(os.listdir(run))
    if lines is None:
        unwritten = weights_of(run)["progress"]["unwritten"]
        assert [json.loads(line)["epoch"] for line in unwritten] == [1, 2]
    else:
        assert len(losses_of(run)) == lines


@pytest.mark.parametrize(
    ("number", "failures"),
    [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EDQUOT, 1000), (errno.EROFS, 1)],
)
def test_failed_saves_are_repeated_or_end_in_one_line(
    config, tmp_path, during, monkeypatch, capsys, number, failures
):
    left = [failures]
    sync = os.fsync

    def failing(descriptor):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    slept = []
    monkeypatch.setattr(resume.time, "sleep", slept.append)
    during(STEPS + 1, lambda: monkeypatch.setattr(os, "fsync", failing))
    if failures == 1 and number != errno.EROFS:
        assert train(config(epochs=2)) == "finished"
        message = capsys.readouterr().err
        assert weights_of(tmp_path / "run")["iteration"] == 2 * STEPS
        assert slept == [1.0]
        assert "the next try is in 1 s" in message
    else:
        with pytest.raises(CheckpointError) as error:
            train(config(epochs=2))
        message = str(error.value)
        assert weights_of(tmp_path / "run")["iteration"] == STEPS
        assert slept == ([] if number == errno.EROFS else list(resume.SECONDS_UNTIL_RETRY))
    assert f"checkpoint.pth ({os.strerror(number)})" in message
    assert "the previous checkpoint.pth is intact" in message
    assert not list((tmp_path / "run").glob("*.part"))


def test_run_ends_in_one_line_if_its_folder_becomes_a_file_or_another_run_uses_it(
    config, tmp_path, during
):
    run = tmp_path / "run"

    def become_file():
        shutil.rmtree(run)
        run.write_text("a file")

    during(STEPS + 1, become_file)
    with pytest.raises(CheckpointError, match=r"run cannot be written \(.*Not a directory"):
        train(config())
    run.unlink()
    with contextlib.ExitStack() as stack:

        def start_another():
            shutil.rmtree(run)
            run.mkdir()
            stack.enter_context(locked_elsewhere(run / ".lock"))

        during(STEPS + 1, start_another)
        with pytest.raises(CheckpointError, match="another run is writing there"):
            train(config())
        assert os.listdir(run) == [".lock"]


def test_links_to_the_folder_and_the_checkpoint_stay(config, tmp_path, interrupt):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").symlink_to(disk)
    (disk / "checkpoint.pth").symlink_to("weights.pth")  # the target does not exist yet
    (disk / "checkpoint.pth.part").write_text("of a killed run")
    (disk / "weights.pth.part").write_text("of a killed run")
    interrupt(STEPS + 1)
    assert train(config(epochs=2)) == "interrupted"
    assert train(config(epochs=2)) == "finished"
    assert (tmp_path / "run").is_symlink()
    assert os.readlink(disk / "checkpoint.pth") == "weights.pth"
    assert checkpoint.load(disk / "weights.pth")["iteration"] == 2 * STEPS
    assert not [*disk.glob("weights.pth.part"), *disk.glob("log.txt.part")]


@pytest.mark.parametrize(
    ("stream", "gone"), [("stdout", True), ("stdout", False), ("stderr", True)]
)
def test_run_continues_if_its_output_stream_is_closed(
    config, tmp_path, during, monkeypatch, stream, gone
):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # of a terminal

    def close():
        monkeypatch.setattr(sys, stream, Gone() if gone else None)

    during(1, close)
    assert train(config(epochs=2, on_nonfinite="rollback")) == "finished"
    assert len(losses_of(tmp_path / "run")) == 2


def test_output_folder_in_use_is_rejected_and_an_old_log_is_renamed(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").write_text("another log")
    with (
        locked_elsewhere(run / ".lock"),
        pytest.raises(CheckpointError, match="another run is writing there"),
    ):
        train(config())
    assert train(config(epochs=1)) == "finished"
    assert (run / "log.old.txt").read_text() == "another log"
    assert len(losses_of(run)) == 1


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
    with pytest.raises(UserError, match=r"lower --batch_size_per_gpu \(now 4\).*--grad_accum"):
        train(config())


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


def test_resume_warns_of_other_images(config, tmp_path, pictures, capsys, interrupt):
    images = tmp_path / "images"
    shutil.copytree(pictures, images)
    interrupt(1)
    assert train(config(data_path=str(images))) == "interrupted"
    state = weights_of(tmp_path / "run")
    assert state["images"]["number"] == 18
    images.rename(tmp_path / "moved")
    assert train(config(data_path=str(tmp_path / "moved"), epochs=1)) == "finished"
    assert "other images" not in capsys.readouterr().err
    (tmp_path / "moved" / "class0" / "00.jpg").rename(tmp_path / "moved" / "class0" / "aa.jpg")
    assert train(config(data_path=str(tmp_path / "moved"), epochs=2)) == "finished"
    captured = capsys.readouterr()
    assert "resuming with other images: 18 with fingerprint" in captured.err
    assert f"(was 18 with {state['images']['fingerprint']}" in captured.err
    assert "1 of 18 images are new or changed" in captured.out


def test_run_on_shards_matches_run_on_folder(config, tmp_path, pictures, make_tar, interrupt):
    files = sorted(pictures.rglob("*.jpg"))
    for n, part in enumerate((files[:7], files[7:])):
        make_tar(tmp_path / "shards" / f"s-{n}.tar", {p.name: p.read_bytes() for p in part})
    shards = config(data_path=str(tmp_path / "shards" / "s-{0..1}.tar"), epochs=2)
    interrupt(STEPS + 1)
    assert train(shards) == "interrupted"
    assert train(shards) == "finished"
    assert train(config(output_dir=str(tmp_path / "folder"), epochs=2)) == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "folder")


def test_padded_epoch_has_every_image(config, tmp_path, capsys):
    assert train(config(epochs=1, last_batch="pad")) == "finished"
    assert "5 steps per epoch" in capsys.readouterr().out


def test_resolved_settings_that_change_the_result_are_compared(config, tmp_path, capsys):
    train(config(epochs=1))
    path = tmp_path / "run/checkpoint.pth"
    state = torch.load(path, weights_only=True)
    assert state["resolved"] == {"precision": "fp32", "crops": "torchvision", "decode": "pillow"}
    for resolved, warning in (
        ({"precision": "fp32", "crops": "fused", "decode": "cpu"}, ""),
        ({"precision": "fp32", "crops": "dali", "decode": "cpu"}, "crops torchvision (was dali)"),
        ({"precision": "bf16"}, "precision fp32 (was bf16)"),
    ):
        torch.save(state | {"resolved": resolved}, path)
        train(config(epochs=1))
        message = capsys.readouterr().err
        assert warning in message
        assert bool(warning) == ("computes other results" in message)


def test_init_from_loads_a_backbone_and_is_ignored_on_resume(config, tmp_path, capsys, interrupt):
    train(config(epochs=1, seed=5, output_dir=str(tmp_path / "before")))
    path = tmp_path / "before" / "checkpoint.pth"
    start = checkpoint.load(path)["teacher"]
    interrupt(1)
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
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.weight is \(96, 3, 8, 8\), exp"):
        train(config(init_from=path, patch_size=16))
    assert not (tmp_path / "run" / "checkpoint.pth").exists()

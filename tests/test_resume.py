"""Interrupted and killed runs end with the bits of uninterrupted ones; unsuitable checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from typing import Any

import pytest
import torch

from fastdino import checkpoint, cli, cpu_speed
from fastdino.errors import CheckpointError
from fastdino.runtime import MEASURED
from fastdino.signals import EXIT_INTERRUPTED
from fastdino.training import loop
from fastdino.training.loop import Run, train
from fastdino.training.resume import recorded_choices
from tests.runs import STEPS, assert_same_run, interrupt, train_small, weights_of

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        (1, {}),
        (STEPS - 1, {}),
        (STEPS + 2, {}),
        (STEPS + 1, {"centering": "sinkhorn", "koleo_weight": 0.1, "mode": "fast"}),
        (STEPS + 1, {"mode": "fast", "batch_size_per_gpu": 2, "grad_accum": 2}),
        (STEPS, {"mode": "fast", "amp_dtype": "bf16", "use_bn_in_head": True}),
    ],
)
def test_resumed_command_matches_uninterrupted_run(config, tmp_path, at, settings, monkeypatch):
    assert train(config(**settings, output_dir=str(tmp_path / "uninterrupted"))) == "finished"
    line = ["train"]
    for name, value in config(**settings).to_dict().items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if at == 1:  # a launcher forwards the signal that the run also received
        interrupt(monkeypatch, at, signal.SIGINT, times=2)
    else:
        interrupt(monkeypatch, at, signal.SIGHUP if at == STEPS - 1 else signal.SIGTERM)
    assert cli.main(line) == EXIT_INTERRUPTED == 75
    assert weights_of(tmp_path / "run")["iteration"] == at + 1
    assert cli.main(line) == 0
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


def test_run_killed_at_random_moments_matches_uninterrupted_run(config, tmp_path):
    assert train(config(output_dir=str(tmp_path / "uninterrupted"), epochs=4)) == "finished"
    settings = config(epochs=4, saveckp_every_steps=1).to_dict()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fastdino.training.loop", "fastdino.data.loader_torchvision"])
    path, moment, kills = tmp_path / "run" / "checkpoint.pth", random.Random(0), 0

    def saved():
        return path.stat().st_ino if path.exists() else None

    while True:
        child = server.Process(target=train_small, args=(settings,))
        child.start()
        # After two saves, so that it makes progress; then anywhere in a step and its save.
        for _ in range(2):
            before, started = saved(), time.perf_counter()
            while child.is_alive() and saved() == before:
                time.sleep(0.001)
        child.join(moment.uniform(0, time.perf_counter() - started))
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


def test_resume_warns_of_other_images(config, tmp_path, pictures, capsys, monkeypatch):
    images = tmp_path / "images"
    shutil.copytree(pictures, images)
    interrupt(monkeypatch, 1)
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


def test_resumed_run_keeps_what_its_start_measured(config, tmp_path, monkeypatch):
    """A second measurement may differ, and other products have other bits."""
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_PRODUCT", 0)
    path = tmp_path / "run/checkpoint.pth"

    def choices(bf16: float, matmul: float, onednn: float = 1, **settings: Any) -> list[str]:
        monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: bf16)
        monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: matmul)
        monkeypatch.setattr(cpu_speed, "onednn_speedup", lambda rows, dim: onednn)
        assert train(config(**{"mode": "fast"} | settings)) == "finished"
        resolved = torch.load(path, weights_only=True)["resolved"]
        written = json.loads((tmp_path / "run/config.json").read_text())["resolved"]
        assert all(written[name]["value"] == resolved[name] for name in MEASURED)
        return [resolved[name] for name in MEASURED]

    assert choices(3, 2, epochs=1) == ["bf16", "matmul", "off"]
    assert choices(1, 1, epochs=2) == ["bf16", "matmul", "off"]
    requested = {"use_fp16": False, "attention": "sdpa"}
    assert choices(1, 1, epochs=3, **requested) == ["fp32", "sdpa", "off"]
    assert choices(1, 1, 9, epochs=4) == ["fp32", "sdpa", "on"]
    assert choices(1, 1, epochs=5) == ["fp32", "sdpa", "on"]
    state = torch.load(path, weights_only=True)
    for name in ("attention", "device", "onednn"):  # an older version, which used sdpa
        del state["resolved"][name]
    torch.save(state, path)
    assert choices(3, 2, 9, epochs=6) == ["fp32", "sdpa", "off"]


AUTO = {"mode": "fast", "use_fp16": True, "amp_dtype": "auto", "attention": "auto"}
CHOSEN = {"device": "cpu", "precision": "fp32", "attention": "matmul", "onednn": "on"}


@pytest.mark.parametrize(
    ("args", "resolved", "settings", "kept"),
    [
        ({}, {}, {}, ["attention", "onednn", "precision"]),
        ({"batch_size_per_gpu": 9}, {}, {"lr": 0.1}, ["attention", "onednn", "precision"]),
        ({}, {"device": "cuda:1"}, {}, []),
        ({"mode": "parity"}, {}, {}, []),
        ({}, {}, {"mode": "parity"}, []),
        ({"use_fp16": False}, {}, {}, []),
        ({"amp_dtype": "bf16"}, {}, {}, []),
        ({}, {}, {"use_fp16": False}, []),
        ({"attention": "matmul"}, {}, {}, ["onednn", "precision"]),
        ({"attention": "sdpa"}, {}, {}, ["onednn", "precision"]),
        ({"recompute": "on"}, {}, {}, ["precision"]),
        ({"compile": "on"}, {}, {}, ["precision"]),
        ({}, {}, {"recompute": "on"}, ["precision"]),
    ],
    ids=str,
)
def test_only_what_the_same_settings_chose_on_a_cpu_is_kept(
    config, tmp_path, args, resolved, settings, kept
):
    """A requested value is none that was measured, nor is one of a GPU."""
    (tmp_path / "run").mkdir()
    state = {"args": AUTO | args, "resolved": CHOSEN | resolved}
    torch.save(state, tmp_path / "run/checkpoint.pth")
    choices = recorded_choices(config(**AUTO | settings))
    assert choices == {name: CHOSEN[name] for name in kept}


BF16 = {"precision": "bf16", "attention": "sdpa", "decode": "cpu"}


@pytest.mark.parametrize(
    ("args", "resolved", "kept"),
    [
        ({}, {"attention": "varlen", "decode": "gpu"}, False),
        ({}, {"attention": "varlen"}, False),
        ({}, {"attention": "xformers"}, False),
        ({}, {"decode": "gpu"}, False),
        ({}, {"precision": "fp16"}, False),
        ({"device": "cuda"}, {}, False),
        ({}, {"attention": None}, False),  # before a CPU chose bf16
        ({}, {"attention": None, "precision": "fp32"}, True),
        ({}, {}, True),
        ({}, {"attention": "matmul", "decode": "pillow"}, True),
        ({}, {"attention": "varlen", "decode": "gpu", "device": "cpu"}, True),
    ],
    ids=str,
)
def test_values_of_an_unknown_device_are_kept_if_they_may_be_of_a_cpu(
    config, tmp_path, args, resolved, kept
):
    (tmp_path / "run").mkdir()
    values = {name: value for name, value in (BF16 | resolved).items() if value is not None}
    torch.save(
        {"args": AUTO | {"device": "auto"} | args, "resolved": values},
        tmp_path / "run/checkpoint.pth",
    )
    choices = recorded_choices(config(**AUTO))
    expected = {"attention": "sdpa", "onednn": "off"} | values
    assert choices == ({name: expected[name] for name in MEASURED} if kept else {})


def test_attention_that_an_older_version_did_not_record_is_kept_with_a_requested_bf16(
    config, tmp_path
):
    (tmp_path / "run").mkdir()
    settings = AUTO | {"amp_dtype": "bf16"}
    state = {"args": settings | {"device": "auto"}, "resolved": {"precision": "bf16"}}
    torch.save(state, tmp_path / "run/checkpoint.pth")
    assert recorded_choices(config(**settings))["attention"] == "sdpa"


@pytest.mark.parametrize(
    "requested",
    [{"use_fp16": False}, {"attention": "sdpa"}, {"recompute": "on"}],
    ids=str,
)
def test_a_requested_value_ends_with_its_flag(config, monkeypatch, requested):
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: 3.0)
    monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: 2.0)
    chosen = []

    def run(settings, runtime, folder):
        chosen.append((runtime.precision.value, runtime.attention.value))
        return Run(settings, runtime, folder)

    monkeypatch.setattr(loop, "Run", run)
    train(config(mode="fast", epochs=1, **requested))
    train(config(mode="fast", epochs=1))
    assert chosen[0] != chosen[1] == ("bf16", "matmul")


def test_resolved_settings_that_change_the_result_are_compared(config, tmp_path, capsys):
    train(config(epochs=1))
    path = tmp_path / "run/checkpoint.pth"
    state = torch.load(path, weights_only=True)
    assert state["resolved"] == {
        "device": "cpu", "precision": "fp32", "crops": "torchvision", "decode": "pillow",
        "attention": "sdpa", "onednn": "off",
    }  # fmt: skip
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

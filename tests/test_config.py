"""Flags, defaults and validation of TrainConfig."""

from __future__ import annotations

import argparse
import dataclasses
from importlib import import_module

import pytest

from fastdino import cli
from fastdino.config import (
    LARGEST_SIZE,
    TrainConfig,
    add_arguments,
    add_train_arguments,
    config_from_args,
    user_path,
)
from fastdino.errors import ConfigError
from fastdino.evals import knn, video
from tests.commands import flags_of

PAPER_DEFAULTS = {
    "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True,
    "momentum_teacher": 0.996, "use_bn_in_head": False, "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0, "use_fp16": True, "weight_decay": 0.04,
    "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64, "epochs": 100,
    "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw",
    "drop_path_rate": 0.1, "global_crops_scale": (0.4, 1.0), "local_crops_number": 8,
    "local_crops_scale": (0.05, 0.4), "data_path": "/path/to/imagenet/train/", "output_dir": ".",
    "saveckp_freq": 20, "seed": 0, "num_workers": 10, "dist_url": "env://",
    # Not flags of the paper's code, but its loss.
    "centering": "centering", "koleo_weight": 0.0,
}  # fmt: skip


def parse(line: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    return config_from_args(parser.parse_args(line.split()))


def test_defaults_are_the_papers():
    config = parse("").to_dict()
    assert {name: config[name] for name in PAPER_DEFAULTS} == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in PAPER_DEFAULTS.items()
    }


def test_command_lines_of_the_paper_work():
    config = parse(
        "--arch deit_small --patch_size 8 --out_dim 4096 --norm_last_layer false --use_fp16 1 "
        "--use_bn_in_head on --global_crops_scale 0.4 1. --local_crops_scale 0.05 0.25 "
        "--local_crops_number 10 --optimizer lars --lr 0.3 --clip_grad 0 --saveckp_freq 5 "
        "--data_path /data --output_dir /out --dist_url tcp://localhost:1 --local_rank 3"
    )
    assert (config.arch, config.patch_size, config.norm_last_layer) == ("deit_small", 8, False)
    assert config.use_fp16 is True
    assert config.use_bn_in_head is True
    assert config.global_crops_scale == (0.4, 1.0)
    assert config.local_crops_scale == (0.05, 0.25)
    assert (config.optimizer, config.lr, config.clip_grad) == ("lars", 0.3, 0.0)


def test_other_commands_can_add_some_of_the_flags(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser, ["local_crops_scale", "seed"])
    args = parser.parse_args(["--local_crops_scale", ".1", ".2"])
    assert vars(args) == {"local_crops_scale": [0.1, 0.2], "seed": 0}
    with pytest.raises(SystemExit):
        parser.parse_args(["--lr", "1"])
    assert "unrecognized arguments: --lr" in capsys.readouterr().err


def test_booleans_have_the_papers_spellings(capsys):
    for words in (("on", "off"), ("TRUE", "False"), ("1", "0")):
        assert [parse(f"--use_fp16 {word}").use_fp16 for word in words] == [True, False]
    with pytest.raises(SystemExit):
        parse("--use_fp16 maybe")
    assert "--use_fp16: must be one of on, off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last_batch": "keep"}, "--last_batch must be one of paper, drop, pad, got 'keep'"),
        ({"optimizer": "adam"}, "--optimizer must be one of adamw, sgd, lars, got 'adam'"),
        ({"epochs": 0}, "--epochs must be a finite number of at least 1, got 0"),
        ({"epochs": 2.5}, "--epochs must be int, got 2.5"),
        ({"epochs": True}, "--epochs must be int, got True"),
        ({"use_fp16": 1}, "--use_fp16 must be bool, got 1"),
        ({"lr": float("nan")}, "--lr must be a finite number of at least 0, got nan"),
        ({"teacher_temp": 0.0}, "--teacher_temp must be a finite number above 0, got 0.0"),
        ({"momentum_teacher": 1.5}, "--momentum_teacher must be a number from 0 to 1, got 1.5"),
        ({"drop_path_rate": 1.0}, "--drop_path_rate must be a number from 0 to below 1"),
        ({"global_crops_scale": (0.4,)}, "--global_crops_scale must be two numbers"),
        ({"local_crops_scale": (0.4, 0.05)}, "--local_crops_scale must be 0 < smallest"),
        ({"seed": 2**63}, "--seed must be below 2**63"),
        ({"seed": -1}, "--seed must be a finite number of at least 0, got -1"),
        ({"warmup_epochs": 11, "epochs": 10}, "--warmup_epochs 11 exceeds --epochs 10"),
        (
            {"warmup_teacher_temp_epochs": 30, "epochs": 10, "warmup_epochs": 0},
            "--warmup_teacher_temp_epochs 30 exceeds --epochs 10",
        ),
        (
            {"freeze_last_layer": 2, "epochs": 1, "warmup_epochs": 0},
            "--freeze_last_layer 2 exceeds --epochs 1: use --freeze_last_layer 1 or less",
        ),
        ({"out_dim": 2**62}, f"--out_dim must be at most {2**31 - 1}, got {2**62}"),
        ({"grad_accum": 2**31}, "--grad_accum must be at most 2147483647, got 2147483648"),
        ({"output_dir": "a\0b"}, r"--output_dir must be text without zero bytes, got 'a\x00b'"),
        ({"data_path": "\0"}, "--data_path must be text without zero bytes"),
        ({"use_fp16": False, "amp_dtype": "bf16"}, "--use_fp16 false contradicts --amp_dtype bf16"),
        ({"arch": "vit_large", "patch_size": 112}, "--local_crops_size 96 is smaller than a patch"),
        ({"local_crops_size": 8}, "--local_crops_size 8 is smaller than a patch"),
        ({"centering": "sk"}, "--centering must be one of centering, sinkhorn, got 'sk'"),
        ({"koleo_weight": -0.1}, "--koleo_weight must be a finite number of at least 0, got -0.1"),
        ({"koleo_weight": float("inf")}, "--koleo_weight must be a finite number of at least 0"),
        (
            {"koleo_weight": 0.1, "batch_size_per_gpu": 1, "grad_accum": 64},
            "--batch_size_per_gpu 1 has one: use 2 or more, or --koleo_weight 0",
        ),
        (
            {"grad_accum": 2, "global_batch_size": 128},
            "--grad_accum 2 contradicts --global_batch_size 128, from which it follows: remove one",
        ),
        ({"global_batch_size": 2**31}, "--global_batch_size must be at most 2147483647"),
        ({"saveckp_every_minutes": -1.0}, "--saveckp_every_minutes must be a finite number of"),
    ],
)
def test_invalid_values_are_errors_with_flag_value_and_allowed_values(settings, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"drop_path_rate": 0.0, "momentum_teacher": 0.0, "max_bad_share": 0.0, "koleo_weight": 0.0},
        {"momentum_teacher": 1.0, "max_bad_share": 1.0, "drop_path_rate": 0.999},
        {"seed": 2**63 - 1, "out_dim": LARGEST_SIZE, "grad_accum": 1, "clip_grad": 0.0},
        {"epochs": 7, "warmup_epochs": 7, "warmup_teacher_temp_epochs": 7, "freeze_last_layer": 7},
        {"global_crops_scale": (0.5, 0.5), "local_crops_scale": (1.0, 1.0)},
        {"patch_size": 96, "local_crops_size": 96, "global_crops_size": 96},
        {"patch_size": 96, "local_crops_size": 1, "local_crops_number": 0},
        {"koleo_weight": 0.1, "batch_size_per_gpu": 2},
    ],
)  # fmt: skip
def test_values_at_their_bounds_are_valid(settings):
    config = TrainConfig(**settings)
    assert settings.items() <= {name: getattr(config, name) for name in settings}.items()


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_temp": 0.0}, {"warmup_teacher_temp": 0.0}, {"momentum_teacher": 1.001},
        {"drop_path_rate": 1.0}, {"max_bad_share": -0.001}, {"seed": 2**63},
        {"out_dim": LARGEST_SIZE + 1}, {"out_dim": 0}, {"epochs": 0}, {"print_freq": 0},
        {"epochs": 7, "warmup_epochs": 8}, {"global_crops_scale": (0.0, 0.5)},
        {"global_crops_scale": (0.5, 0.4)}, {"local_crops_scale": (0.5, 1.001)},
        {"patch_size": 97, "local_crops_size": 96}, {"lr": float("inf")}, {"lr": float("nan")},
        {"koleo_weight": 0.1, "batch_size_per_gpu": 1}, {"use_fp16": 1}, {"epochs": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_values_beyond_their_bounds_are_errors(settings):
    with pytest.raises(ConfigError):
        TrainConfig(**settings)


def test_help_groups_the_flags_and_shows_defaults():
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    text = parser.format_help()
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert [title.split()[0].rstrip(":") for title in titles] == [
        "options", "Model", "Loss", "Optimization", "Crops", "Data", "Speed", "Run", "Monitoring"
    ]  # fmt: skip
    assert text.count("(default:") == len(dataclasses.fields(TrainConfig))


def test_config_round_trips_through_a_dict():
    config = TrainConfig(global_crops_scale=(0.3, 0.9), epochs=20)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_unknown_settings_are_errors_with_a_suggestion():
    with pytest.raises(ConfigError, match="'learning_rate'"):
        TrainConfig.from_dict({"learning_rate": 1.0})
    with pytest.raises(ConfigError, match="did you mean epochs"):
        TrainConfig.from_dict({"epoch": 1})


def flags(parser):
    """Yield the flags of a parser that take text."""
    for action in parser._actions:
        takes_text = action.nargs != 0 and action.choices is None and action.type in (None, str)
        if action.option_strings and takes_text:
            yield action.dest


# Flags with text that is no path.
NO_PATHS = {
    "account", "arch", "baselines", "checkpoint_key", "comment", "constraint", "dist_url",
    "executors", "logger", "partition", "qos", "split", "to",
}  # fmt: skip


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_that_takes_a_path_expands_the_home_folder(name):
    parser = argparse.ArgumentParser()
    import_module(cli.COMMANDS[name].module).configure(parser)
    in_config = {"data_path", "output_dir", "init_from", "knn_data"}  # expanded by TrainConfig
    expanded = in_config if name in ("train", "submit") else set()
    assert set(flags(parser)) - expanded <= NO_PATHS


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for command, flag in ((knn, "--data_path"), (video, "--input_path")):
        args = flags_of(command, flag, "~/a b")
        assert getattr(args, flag[2:]) == f"{tmp_path}/a b"
    assert user_path("a~/~b") == "a~/~b"
    config = TrainConfig(
        data_path="~/x?split=train",
        output_dir="~",
        init_from="~/w.pth",
        knn_data="~/k",
        knn_every=1,
    )
    assert config.data_path == f"{tmp_path}/x?split=train"
    assert (config.output_dir, config.init_from) == (str(tmp_path), f"{tmp_path}/w.pth")
    assert config.knn_data == f"{tmp_path}/k"
    assert TrainConfig(data_path="hf:~/x").data_path == "hf:~/x"  # expanded when it is loaded

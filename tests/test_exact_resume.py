"""A trainer that is saved, loaded and continued has the bits of one that was not stopped."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fastdino import Trainer, checkpoint
from fastdino.errors import CheckpointError
from tests.runs import differences
from tests.test_nonfinite_step import scaled_gradient

pytestmark = pytest.mark.usefixtures("small_networks")
STEPS = 3  # per epoch
FAST = {"mode": "fast", "compile": "off"}


def train(trainer, crops_of, iterations, overflow=()):
    losses = []
    for i in iterations:
        with scaled_gradient(trainer, math.inf if i in overflow else 1.0):
            losses.append(trainer.train_step(crops_of(trainer.config, i)).item())
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd"},
        {"optimizer": "lars", "lr": 5.0},
        FAST,
        {"amp_dtype": "fp16"},
        {"amp_dtype": "fp16", "optimizer": "sgd"},
        FAST | {"amp_dtype": "fp16"},
        FAST | {"grad_accum": 2, "batch_size_per_gpu": 2},
        {"optimizer": "sgd", "grad_accum": 2, "batch_size_per_gpu": 2},
        {"use_bn_in_head": True, "norm_last_layer": False},
        FAST | {"centering": "sinkhorn", "koleo_weight": 0.1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
def test_resumed_trainer_has_the_bits_of_an_uninterrupted_one(tiny, crops_of, tmp_path, settings):
    """It resumes with a frozen last layer, and after it."""
    config = tiny(drop_path_rate=0.5, freeze_last_layer=1, **settings)
    overflow = (1,) if "fp16" in settings.values() else ()
    torch.manual_seed(0)
    whole = Trainer(config, STEPS)
    losses = train(whole, crops_of, range(6), overflow)
    expected = whole.state_dict()

    torch.manual_seed(0)
    first, start = Trainer(config, STEPS), 0
    for at in (2, 4):
        train(first, crops_of, range(start, at), overflow)
        start, streams = at, torch.get_rng_state()
        saved = copy.deepcopy(first.state_dict())
        checkpoint.save(saved, tmp_path / "checkpoint.pth")
        torch.manual_seed(7)
        resumed = Trainer(config, STEPS)
        state = checkpoint.load(tmp_path / "checkpoint.pth")
        resumed.load_state_dict(state)
        resumed.verify()
        assert resumed.iteration == at
        assert differences(resumed.state_dict(), saved) == []
        assert train(resumed, crops_of, range(at, 6)) == losses[at:]
        assert differences(resumed.state_dict(), expected) == []
        if overflow:
            assert state["fp16_scaler"]["scale"] < torch.amp.GradScaler("cpu").get_scale()
        torch.set_rng_state(streams)


@pytest.mark.parametrize("part", ["student", "teacher", "optimizer", "dino_loss", "epoch"])
def test_a_checkpoint_without_a_part_is_refused_by_name_and_loads_nothing(tiny, crops_of, part):
    config = tiny()
    source, other = (Trainer(config, STEPS) for _ in range(2))
    train(source, crops_of, range(2))
    state = source.state_dict()
    before = other.state_dict()
    del state[part]
    with pytest.raises(CheckpointError, match=rf"the checkpoint has no '{part}': it has .*, "):
        other.load_state_dict(state)
    assert differences(other.state_dict(), before) == []


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("student", "module.backbone.cls_token"),
        ("student", "module.head.last_layer.weight_v"),
        ("teacher", "backbone.blocks.1.mlp.fc2.bias"),
        ("dino_loss", "center"),
    ],
)
def test_a_checkpoint_without_a_tensor_is_refused_by_name(tiny, part, name):
    trainer = Trainer(tiny(), STEPS)
    state = trainer.state_dict()
    state[part] = {key: tensor for key, tensor in state[part].items() if key != name}
    missing = name.removeprefix("module.")
    with pytest.raises(CheckpointError, match=rf"{part}: .*: {missing} is missing"):
        trainer.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "step"), ({}, "exp_avg"), ({}, "exp_avg_sq"),
        ({"optimizer": "sgd"}, "momentum_buffer"), ({"optimizer": "lars"}, "mu"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_moments_of_a_parameter_is_refused_by_name(
    tiny, crops_of, settings, name
):
    trainer = Trainer(tiny(freeze_last_layer=0, **settings), STEPS)
    train(trainer, crops_of, range(1))
    state = trainer.state_dict()
    del state["optimizer"]["state"][2][name]
    with pytest.raises(CheckpointError, match=f"the optimizer's parameter 2 has no {name}"):
        trainer.load_state_dict(state)


def test_a_scaler_without_a_field_is_refused(tiny):
    trainer = Trainer(tiny(amp_dtype="fp16"), STEPS)
    for name in trainer.scaler.state_dict():
        state = trainer.state_dict()
        del state["fp16_scaler"][name]
        with pytest.raises(CheckpointError, match=f"fp16_scaler has no {name}"):
            trainer.load_state_dict(state)

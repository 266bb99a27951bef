"""Backbones from the checkpoints there are: ours, the paper's, bare weights."""

from __future__ import annotations

import argparse

import pytest
import torch

from fastdino import Trainer
from fastdino.errors import CheckpointError, ConfigError
from fastdino.weights import load_backbone

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trainer(tiny):
    """A tiny one whose student and teacher differ."""
    trainer = Trainer(tiny(), steps_per_epoch=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint and returns its path."""

    def write(state):
        torch.save(state, tmp_path / "checkpoint.pth")
        return str(tmp_path / "checkpoint.pth")

    return write


def load(path, *, key="teacher", arch=None, patch_size=None):
    return load_backbone(path, checkpoint_key=key, arch=arch, patch_size=patch_size)


def assert_same_features(backbone, network):
    assert not backbone.module.training
    with torch.no_grad():
        torch.testing.assert_close(backbone.module(IMAGES), network.backbone.eval()(IMAGES))


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_our_checkpoint_says_what_it_is_of(trainer, save, key):
    path = save({**trainer.state_dict(), "args": trainer.config.to_dict()})
    backbone = load(path, key=key)
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
    assert_same_features(backbone, getattr(trainer, key))


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_the_papers_checkpoint_has_a_prefix_and_a_namespace(trainer, save, key):
    args = argparse.Namespace(arch="vit_nano", patch_size=8, out_dim=64)
    state = {
        "student": prefixed(trainer.student.state_dict(), "module."),
        "teacher": trainer.teacher.state_dict(),
        "epoch": 3,
        "args": args,
    }
    backbone = load(save(state), key=key)
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
    assert_same_features(backbone, getattr(trainer, key))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_backbone_weights_alone_need_the_flags(trainer, save, prefix):
    path = save(prefixed(trainer.teacher.backbone.state_dict(), prefix))
    assert_same_features(load(path, arch="vit_nano", patch_size=8), trainer.teacher)


def test_one_networks_weights_alone_lose_their_head(trainer, save):
    path = save(trainer.teacher.state_dict())
    assert_same_features(load(path, arch="vit_nano", patch_size=8), trainer.teacher)


def test_a_position_embedding_of_any_grid_is_kept_as_it_is(trainer, save):
    backbone = load(save({**trainer.state_dict(), "args": trainer.config.to_dict()}))
    assert backbone.module.pos_embed.shape == (1, 1 + 16, 96)  # 32 px crops in patches of 8


def test_the_old_name_of_an_architecture_is_understood(save):
    fresh = load("", arch="vit_tiny", patch_size=16)
    args = argparse.Namespace(arch="deit_tiny", patch_size=16)
    state = {"teacher": prefixed(fresh.module.state_dict(), "backbone."), "args": args}
    backbone = load(save(state))
    assert torch.equal(backbone.module.pos_embed, fresh.module.pos_embed)


def test_no_checkpoint_is_an_untrained_network():
    backbone = load("", arch="vit_nano")
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 16)
    assert backbone.module(torch.zeros(1, 3, 224, 224)).shape == (1, 96)


@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        ({"arch": "vit_tiny"}, ["blocks.6.norm1.weight is missing", "--arch vit_tiny"]),
        ({"patch_size": 16}, ["patch_embed.proj.weight is (96, 3, 8, 8), expected (96, 3, 16"]),
    ],
)
def test_another_network_names_the_tensors(trainer, save, flags, problems):
    path = save({**trainer.state_dict(), "args": trainer.config.to_dict()})
    with pytest.raises(CheckpointError) as error:
        load(path, **flags)
    for problem in [path, "weights are of another network", *problems]:
        assert problem in str(error.value)


@pytest.mark.parametrize("key", ["teacher", "epoch"])
def test_a_network_that_the_file_has_not_is_named_with_those_it_has(trainer, save, key):
    path = save({"student": trainer.student.state_dict(), "epoch": 3})
    with pytest.raises(CheckpointError, match=f"no network '{key}', it has student: .*_key"):
        load(path, key=key)


def test_files_that_are_no_checkpoint_are_mistakes(save, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load(str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="of another network"):
        load(save({"model": {"w": torch.zeros(1)}}), arch="vit_nano")
    with pytest.raises(CheckpointError, match="holds a list"):
        load(save([1, 2]))
    with pytest.raises(ConfigError, match="did you mean vit_nano"):
        load("", arch="vit_nan")

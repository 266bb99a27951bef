"""Backbones from the checkpoints there are: ours, the paper's, bare weights."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdino import Trainer
from fastdino.errors import CheckpointError, ConfigError
from fastdino.models.weights import initial_weights, load_backbone

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
    for problem in [path, "weights do not match the network", *problems]:
        assert problem in str(error.value)


@pytest.mark.parametrize("key", ["teacher", "epoch"])
def test_a_network_that_the_file_has_not_is_named_with_those_it_has(trainer, save, key):
    path = save({"student": trainer.student.state_dict(), "epoch": 3})
    with pytest.raises(CheckpointError, match=f"no network '{key}', it has student: .*_key"):
        load(path, key=key)


def test_files_that_are_no_checkpoint_are_mistakes(save, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load(str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="do not match the network"):
        load(save({"model": {"w": torch.zeros(1)}}), arch="vit_nano")
    with pytest.raises(CheckpointError, match="holds a list"):
        load(save([1, 2]))
    with pytest.raises(ConfigError, match="did you mean vit_nano"):
        load("", arch="vit_nan")


def test_bare_weights_of_a_vit_tell_its_architecture(trainer, save):
    backbone = load(save(trainer.teacher.backbone.state_dict()))
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
    assert_same_features(backbone, trainer.teacher)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("classes", [0, 10])
def test_timms_vits_give_timms_features(tmp_path, form, classes):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=classes).eval()
    path = tmp_path / f"model.{form}"
    (save_file if form == "safetensors" else torch.save)(model.state_dict(), path)
    backbone = load(str(path))
    assert (backbone.arch, backbone.patch_size) == ("vit_tiny", 16)
    with torch.no_grad():
        expected = model.forward_features(IMAGES)[:, 0]
        torch.testing.assert_close(backbone.module(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_the_names_of_timms_dino_models_are_the_papers():
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    ours = load("", arch="vit_small", patch_size=16).module.state_dict()
    theirs = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert theirs == {name: tensor.shape for name, tensor in ours.items()}


HF_NAMES = (  # of transformers' ViTModel, by the paper's
    (r"^(cls_token)", r"embeddings.\1"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed.proj", "embeddings.patch_embeddings.projection"),
    (r"^blocks", "encoder.layer"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"attn.proj", "attention.output.dense"),
    (r"mlp.fc1", "intermediate.dense"),
    (r"mlp.fc2", "output.dense"),
    (r"^norm", "layernorm"),
)


def hf_state(backbone, prefix=""):
    """A backbone's weights as Hugging Face's ViTModel has them."""
    state = {}
    for name, tensor in backbone.state_dict().items():
        for pattern, new in HF_NAMES:
            name = re.sub(pattern, new, name)
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.attention.{part}")] = rows.clone()
        else:
            state[name] = tensor
    state = prefixed(state, prefix)
    above = "classifier" if prefix else "pooler.dense"
    return state | {f"{above}.weight": torch.zeros(3, 96), f"{above}.bias": torch.zeros(3)}


def hf_folder(folder, state, file="model.safetensors", **config):
    folder.mkdir(exist_ok=True)
    (save_file if file == "model.safetensors" else torch.save)(state, folder / file)
    shape = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3}
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **shape, **config}))
    return str(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_faces_vits_are_read_from_folder_and_file(trainer, tmp_path, file, prefix):
    folder = hf_folder(tmp_path / "hf", hf_state(trainer.teacher.backbone, prefix), file)
    for path in (folder, f"{folder}/{file}"):
        backbone = load(path)
        assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
        assert_same_features(backbone, trainer.teacher)


def test_hugging_faces_other_models_are_refused(trainer, tmp_path):
    state = hf_state(trainer.teacher.backbone)
    with pytest.raises(CheckpointError, match=r"'num_heads': 6\}, expected a vit that is one of"):
        load(hf_folder(tmp_path / "a", state, num_attention_heads=6))
    with pytest.raises(CheckpointError, match="is of a dinov2 with"):
        load(hf_folder(tmp_path / "a", state, model_type="dinov2"))
    (tmp_path / "a" / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="config.json is no config of a ViT"):
        load(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="a folder without model.safetensors or pytorch_mod"):
        load(str(tmp_path / "b"))
    scale = {"encoder.layer.0.layer_scale1.lambda1": torch.ones(96)}
    with pytest.raises(CheckpointError, match=r"0.layer_scale1.lambda1 is not expected"):
        load(hf_folder(tmp_path / "c", state | scale))
    del state["encoder.layer.2.attention.attention.key.bias"]
    with pytest.raises(CheckpointError, match=r"layer.2.attention.attention.key.bias is missing"):
        load(hf_folder(tmp_path / "d", state))


def test_a_truncated_safetensors_is_named(trainer, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(hf_state(trainer.teacher.backbone), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read \("):
        load(str(path))
    with pytest.raises(CheckpointError, match="there is no file"):
        load(str(tmp_path / "none.safetensors"))


def test_weights_to_start_from_have_the_runs_patch_grid(trainer, save):
    path = save({**trainer.state_dict(), "args": trainer.config.to_dict()})
    same, key = initial_weights(path, arch="vit_nano", patch_size=8, img_size=32)
    assert key == "teacher"
    for name, tensor in trainer.teacher.backbone.state_dict().items():
        assert torch.equal(same[name], tensor)
    larger, _ = initial_weights(path, arch="vit_nano", patch_size=8, img_size=48)
    assert torch.equal(larger["pos_embed"], trainer.teacher.backbone.positions((48, 48)))


def test_weights_to_start_from_are_the_students_where_there_is_no_teacher(trainer, save):
    path = save({"student": trainer.state_dict()["student"]})
    found, key = initial_weights(path, arch="vit_nano", patch_size=8, img_size=32)
    assert key == "student"
    for name, tensor in trainer.student.backbone.state_dict().items():
        assert torch.equal(found[name], tensor)
    path = save(trainer.student.backbone.state_dict())
    assert initial_weights(path, arch="vit_nano", patch_size=8, img_size=32)[1] is None

"""Loading of backbones from checkpoints, bare weights and other projects' files."""

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
    """A tiny trainer with a teacher that differs from its student."""
    trainer = Trainer(tiny(), steps_per_epoch=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


@pytest.fixture
def save(tmp_path):
    """Save a checkpoint; return its path."""

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
@pytest.mark.parametrize("source", ["fastdino", "paper"])
def test_checkpoints_of_fastdino_and_the_paper(trainer, save, source, key):
    state = {**trainer.state_dict(), "args": trainer.config.to_dict()}
    if source == "paper":
        args = argparse.Namespace(arch="vit_nano", patch_size=8, out_dim=64)
        state["args"] = args
    backbone = load(save(state), key=key)
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
    assert_same_features(backbone, getattr(trainer, key))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "with head"])
@pytest.mark.parametrize("flags", [{}, {"arch": "vit_nano", "patch_size": 8}], ids=["", "flags"])
def test_bare_weights_with_any_prefix(trainer, save, prefix, flags):
    network = trainer.teacher if prefix == "with head" else trainer.teacher.backbone
    state = network.state_dict()
    backbone = load(save(state if prefix == "with head" else prefixed(state, prefix)), **flags)
    assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
    assert_same_features(backbone, trainer.teacher)


def test_checkpoints_with_the_arch_name_deit_load(save):
    fresh = load("", arch="vit_tiny", patch_size=16)
    args = argparse.Namespace(arch="deit_tiny", patch_size=16)
    state = {"teacher": prefixed(fresh.module.state_dict(), "backbone."), "args": args}
    backbone = load(save(state))
    assert torch.equal(backbone.module.pos_embed, fresh.module.pos_embed)


def test_without_a_checkpoint_the_weights_are_random():
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
def test_mismatched_tensors_are_named(trainer, save, flags, problems):
    path = save({**trainer.state_dict(), "args": trainer.config.to_dict()})
    with pytest.raises(CheckpointError) as error:
        load(path, **flags)
    for problem in [path, "weights do not match the network", *problems]:
        assert problem in str(error.value)


@pytest.mark.parametrize("key", ["teacher", "epoch"])
def test_missing_checkpoint_key_is_an_error_with_the_available_keys(trainer, save, key):
    path = save({"student": trainer.student.state_dict(), "epoch": 3})
    with pytest.raises(CheckpointError, match=f"no network '{key}', it has student: .*_key"):
        load(path, key=key)


def test_other_files_are_errors(save, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load(str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match=r"no backbone: .* unknown network \(model.w\)"):
        load(save({"model": {"w": torch.zeros(1)}}), arch="vit_nano")
    with pytest.raises(CheckpointError, match="holds a list"):
        load(save([1, 2]))
    with pytest.raises(ConfigError, match="did you mean vit_nano"):
        load("", arch="vit_nan")


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("classes", [0, 10])
def test_timm_vits_have_timms_features(tmp_path, form, classes):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=classes).eval()
    path = tmp_path / f"model.{form}"
    (save_file if form == "safetensors" else torch.save)(model.state_dict(), path)
    backbone = load(str(path))
    assert (backbone.arch, backbone.patch_size) == ("vit_tiny", 16)
    with torch.no_grad():
        expected = model.forward_features(IMAGES)[:, 0]
        torch.testing.assert_close(backbone.module(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_timms_dino_models_have_the_papers_names():
    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    ours = load("", arch="vit_small", patch_size=16).module.state_dict()
    theirs = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert theirs == {name: tensor.shape for name, tensor in ours.items()}


HF_NAMES = (  # the paper's names as patterns, and those of transformers' ViTModel
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
    """Rename the weights of a backbone to those of Hugging Face's ViTModel."""
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
def test_hugging_face_vits_load_from_folder_and_file(trainer, tmp_path, file, prefix):
    folder = hf_folder(tmp_path / "hf", hf_state(trainer.teacher.backbone, prefix), file)
    for path in (folder, f"{folder}/{file}"):
        backbone = load(path)
        assert (backbone.arch, backbone.patch_size) == ("vit_nano", 8)
        assert_same_features(backbone, trainer.teacher)


def test_other_hugging_face_models_are_errors(trainer, tmp_path):
    state = hf_state(trainer.teacher.backbone)
    with pytest.raises(CheckpointError, match=r"'num_heads': 6\}, expected a vit or dinov2"):
        load(hf_folder(tmp_path / "a", state, num_attention_heads=6))
    with pytest.raises(CheckpointError, match="describes a beit with"):
        load(hf_folder(tmp_path / "a", state, model_type="beit"))
    (tmp_path / "a" / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="config.json is not the config of a ViT"):
        load(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="a folder without model.safetensors or pytorch_mod"):
        load(str(tmp_path / "b"))
    other = {"encoder.layer.0.other.weight": torch.ones(96)}
    with pytest.raises(CheckpointError, match=r"layer.0.other.weight is not expected"):
        load(hf_folder(tmp_path / "c", state | other))
    del state["encoder.layer.2.attention.attention.key.bias"]
    with pytest.raises(CheckpointError, match=r"layer.2.attention.attention.key.bias is missing"):
        load(hf_folder(tmp_path / "d", state))


def test_truncated_safetensors_are_an_error(trainer, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(hf_state(trainer.teacher.backbone), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read \("):
        load(str(path))
    with pytest.raises(CheckpointError, match="there is no file"):
        load(str(tmp_path / "none.safetensors"))


def test_initial_weights_have_the_patch_grid_of_the_run(trainer, save):
    path = save({**trainer.state_dict(), "args": trainer.config.to_dict()})
    same, key = initial_weights(path, arch="vit_nano", patch_size=8, img_size=32)
    assert key == "teacher"
    torch.testing.assert_close(same, trainer.teacher.backbone.state_dict(), rtol=0, atol=0)
    larger, _ = initial_weights(path, arch="vit_nano", patch_size=8, img_size=48)
    assert torch.equal(larger["pos_embed"], trainer.teacher.backbone.positions((48, 48)))


def test_initial_weights_are_the_students_without_a_teacher(trainer, save):
    path = save({"student": trainer.state_dict()["student"]})
    weights, key = initial_weights(path, arch="vit_nano", patch_size=8, img_size=32)
    assert key == "student"
    torch.testing.assert_close(weights, trainer.student.backbone.state_dict(), rtol=0, atol=0)
    path = save(trainer.student.backbone.state_dict())
    assert initial_weights(path, arch="vit_nano", patch_size=8, img_size=32)[1] is None


def _expanded(*shape):
    """Return a tensor of any size that stores one number."""
    return torch.zeros(1).expand(shape)


HF_PATCHES = "embeddings.patch_embeddings.projection.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": _expanded(1, 10**12, 96)}, "pos_embed is a tensor of repeated values"),
        ({"pos_embed": torch.zeros(1, 5, 96, device="meta")}, "pos_embed is a tensor without"),
        ({"pos_embed": torch.zeros(3, 4, 5)}, "cannot be used|pos_embed is"),
        ({"pos_embed": torch.zeros(())}, "cannot be used"),
        ({"register_tokens": torch.zeros(3)}, "cannot be used"),
        ({"blocks.0.ls1.gamma": torch.ones(7)}, "cannot be used"),
        ({"norm.bias": torch.full((96,), float("nan"))}, "norm.bias is not finite"),
        ({"norm.bias": torch.zeros(96) + 0j}, "norm.bias is a complex tensor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_crafted_weights_are_reported_by_name(trainer, save, changes, message):
    backbone = trainer.student.backbone.state_dict()
    path = save({**backbone, **changes})
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pth.*({message})"):
        load(path, arch=None)


@pytest.mark.parametrize("shapes", [[(10**6, 10**6)] * 3, [(2, 2), (3, 3), (4, 4)]])
def test_crafted_queries_keys_and_values_are_one_line(save, shapes):
    names = ("query", "key", "value")
    state = {
        f"encoder.layer.0.attention.attention.{name}.weight": _expanded(*shape)
        for name, shape in zip(names, shapes, strict=True)
    }
    state |= {"embeddings.cls_token": torch.zeros(1, 1, 96), HF_PATCHES: torch.zeros(96, 3, 8, 8)}
    with pytest.raises(CheckpointError, match="repeated values"):
        load(save(state), arch=None)


@pytest.mark.parametrize("patch_size", ["x", -16, 10**9, None, True, [16]])
def test_patch_sizes_that_cannot_be_one_are_ignored(trainer, save, patch_size):
    backbone = trainer.student.backbone.state_dict()
    args = argparse.Namespace(patch_size=patch_size, arch=["vit"])
    loaded = load(save({"teacher": backbone, "args": args}), arch=None)
    assert loaded.patch_size == trainer.config.patch_size

"""The torch.hub entry points of hubconf.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdino.errors import CheckpointError
from fastdino.models.weights import load_backbone

ROOT = Path(__file__).parents[1]


def load(entry, *args, **kwargs):
    return torch.hub.load(str(ROOT), entry, *args, source="local", **kwargs)


@pytest.fixture
def weights(tmp_path):
    """A checkpoint with the teacher of a ViT-Ti/8."""
    module = load_backbone("", checkpoint_key="", arch="vit_tiny", patch_size=8, img_size=32).module
    module.norm.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    torch.save({"teacher": module.state_dict()}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def test_imports_are_not_entry_points():
    # As torch.hub.list does, which does not support local folders.
    module = torch.hub._import_module("hubconf", str(ROOT / "hubconf.py"))
    names = [name for name in dir(module) if callable(getattr(module, name)) and name[0] != "_"]
    assert sorted(names) == ["dino", "dino_vit_base", "dino_vit_small", "dino_vit_tiny"]


@pytest.mark.parametrize(
    ("entry", "dim"), [("dino_vit_tiny", 192), ("dino_vit_small", 384), ("dino_vit_base", 768)]
)
def test_entry_point_without_weights(entry, dim):
    model = load(entry)
    assert not model.training
    assert model.embed_dim == dim
    assert model.patch_size == 16
    assert len(model.blocks) == 12


@pytest.mark.parametrize("entry", ["dino", "dino_vit_tiny"])
def test_weights_are_loaded_from_the_file(weights, entry):
    flags = {} if entry == "dino" else {"patch_size": 8}
    model = load(entry, str(weights), **flags)
    saved = torch.load(weights)["teacher"]
    assert torch.equal(model.norm.bias, saved["norm.bias"])


def test_unavailable_or_mismatched_weights_are_an_error(weights, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load("dino", str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="do not match the network"):
        load("dino_vit_small", str(weights), patch_size=8)
    with pytest.raises(CheckpointError, match="no network 'student', it has teacher"):
        load("dino", str(weights), checkpoint_key="student")

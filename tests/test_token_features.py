from __future__ import annotations

import pytest
import timm
import torch

from fastdino.errors import ConfigError
from fastdino.evals.token_features import TokenFeatures, has_patches, patch_size_of, patch_tokens
from fastdino.models.backbones import build_backbone
from fastdino.models.weights import Backbone

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def nano(nano_model):
    return Backbone(nano_model, "vit_nano", 8)


def test_tokens_of_a_vit_are_those_of_its_last_blocks(nano):
    features = TokenFeatures(nano, ["cls", "mean", "patch"], 2)(IMAGES)
    *_, before, last = nano.module.get_intermediate_layers(IMAGES, 6)
    both = torch.cat((before, last), dim=2)  # [B, 1 + h * w, 2 D]
    assert torch.equal(features["cls"], both[:, 0])
    assert torch.equal(features["patch"], both[:, 1:].reshape(2, 4, 6, 2 * 96))
    torch.testing.assert_close(features["mean"], both[:, 1:].mean(1))


def test_cls_is_the_networks_output(nano):
    features = TokenFeatures(nano, ["cls"], 1)(IMAGES)
    assert list(features) == ["cls"]
    with torch.no_grad():
        torch.testing.assert_close(features["cls"], nano.module(IMAGES))


def test_a_patch_is_at_its_place_in_the_grid(nano):
    """A change of one patch's pixels changes the embedding at its row and column."""
    module = nano.module
    changed = IMAGES.clone()
    changed[:, :, 8:16, 40:48] += 1
    difference = module.embed(changed) - module.embed(IMAGES)
    (place,) = difference[0].abs().amax(1).nonzero()[:, 0].tolist()
    grid = torch.zeros(1, 1 + 24, 96)
    grid[0, place] = 1
    assert grid[:, 1:].unflatten(1, (4, 6))[0, 1, 5].eq(1).all()
    assert patch_tokens(module, IMAGES).shape == (2, 4, 6, 96)


def test_registers_are_no_patches():
    module, _ = build_backbone("vit_nano", patch_size=8, img_size=32, registers=4)
    tokens = TokenFeatures(Backbone(module.eval(), "vit_nano", 8), ["cls", "patch"], 1)(IMAGES)
    assert tokens["patch"].shape == (2, 4, 6, 96)


def test_patches_of_a_timm_vit_are_its_own():
    module = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    backbone = Backbone(module, "test_vit", 16)
    tokens = TokenFeatures(backbone, ["cls", "mean", "patch"], 1)(IMAGES)
    with torch.no_grad():
        expected = module.forward_features(IMAGES)[:, module.num_prefix_tokens :]
        torch.testing.assert_close(tokens["cls"], module(IMAGES))
    torch.testing.assert_close(tokens["patch"].flatten(1, 2), expected)
    torch.testing.assert_close(tokens["mean"], expected.mean(1))
    assert patch_size_of(backbone) == 16


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"])
def test_networks_without_patches_have_only_their_output(name):
    module, _ = build_backbone(name)
    backbone = Backbone(module.eval(), name, 16)
    assert not has_patches(module)
    features = TokenFeatures(backbone, ["cls"], 1)(IMAGES)
    with torch.no_grad():
        assert torch.equal(features["cls"], module(IMAGES))
    for tokens in (["mean"], ["cls", "patch"]):
        with pytest.raises(ConfigError, match=f"--tokens .*--arch {name} has no patch tokens"):
            TokenFeatures(backbone, tokens, 1)
    with pytest.raises(ConfigError, match="--n_last_blocks 2: --arch .* gives features of 1 block"):
        TokenFeatures(backbone, ["cls"], 2)


def test_more_blocks_than_the_network_has_are_an_error(nano):
    with pytest.raises(ConfigError, match=r"--n_last_blocks 7: the network has 6 block"):
        TokenFeatures(nano, ["cls"], 7)

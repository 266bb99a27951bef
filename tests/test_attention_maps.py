"""Attention maps against the paper's equations, their masks, and their statistics."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdino.errors import ConfigError
from fastdino.evals import options
from fastdino.evals.attention_maps import (
    NO_CLS_ATTENTION,
    attention_maps,
    fit_to_patches,
    head_statistics,
    keep_mass,
    to_pixels,
)
from fastdino.evals.transforms import to_input
from fastdino.models.vit import VIT_ARCHS, Attention, VisionTransformer


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = VisionTransformer(patch_size=8, embed_dim=32, depth=2, num_heads=4, img_size=32)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def test_maps_are_the_cls_row_of_the_last_attention_matrix(vit):
    images = torch.randn(2, 3, 24, 40)
    maps = attention_maps(vit, images)
    cls_row = vit.get_last_selfattention(images)[:, :, 0]
    torch.testing.assert_close(maps, cls_row[..., 1:].unflatten(-1, (3, 5)))
    assert not maps.requires_grad


def reference_maps(model, image):
    """Caron et al. 2021, figure 1, in float64: softmax(q_CLS K^T / sqrt(d)) of the last block.

    Returns [H, h, w] for an image with as many patches as the position embedding.
    """
    p = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, depth = model.blocks[0].attn.num_heads, len(model.blocks)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    weight, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
    grid = F.conv2d(image.double()[None], weight, bias, stride=model.patch_size)[0]
    x = torch.cat((p["cls_token"][0], grid.flatten(1).T)) + p["pos_embed"][0]
    for i in range(depth):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        if i == depth - 1:
            return weights[:, 0, 1:].reshape(heads, *grid.shape[1:])
        mixed = (weights @ v).transpose(0, 1).reshape(len(x), -1)
        x = x + linear(mixed, f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_maps_match_the_paper_in_float64(vit, dtype, tolerance):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([reference_maps(vit, image) for image in images])
    maps = attention_maps(vit.to(dtype), images.to(dtype))
    assert expected.std() > 0.01
    torch.testing.assert_close(maps.double(), expected, rtol=0, atol=tolerance)


def test_maps_need_no_full_attention_matrix(vit, monkeypatch):
    def refuse(*args):
        raise AssertionError("full [N, N] matrix")

    monkeypatch.setattr(Attention, "weights", refuse)
    attention_maps(vit, torch.randn(1, 3, 32, 32))
    with pytest.raises(AssertionError, match="full"):
        vit.get_last_selfattention(torch.randn(1, 3, 32, 32))


def test_mask_drops_patches_that_hold_exactly_the_rest():
    mask = keep_mass(torch.tensor([[1.0, 2.0], [1.0, 4.0]]), 0.5)
    assert mask.tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("share", [0.01, 0.6, 1.0])
def test_masks_match_the_paper(share):
    """The paper's steps: sort, normalize, accumulate, compare with 1 - threshold, restore order."""
    maps = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) ** 3
    masks = keep_mass(maps, share)
    for map_, mask in zip(maps.flatten(0, 1), masks.flatten(0, 1), strict=True):
        values = map_.flatten().tolist()
        cumulative, expected = 0.0, [False] * 35
        for i in sorted(range(35), key=values.__getitem__):
            cumulative += values[i] / math.fsum(values)
            expected[i] = cumulative > 1 - share
        assert mask.flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mask_of_many_patches_is_not_rounded(dtype):
    """Maps have the dtype of the images, which is too narrow for the sum of so many patches."""
    mask = keep_mass(torch.full((301, 301), 0.1, dtype=dtype), 0.6)
    assert mask.sum() == 301 * 301 - math.floor(0.4 * 301 * 301)


def test_mask_of_a_zero_map_is_empty():
    assert not keep_mass(torch.zeros(2, 3, 3), 0.6).any()


def test_to_pixels_repeats_each_patchs_value():
    maps = torch.arange(6.0).reshape(1, 2, 3)
    assert torch.equal(to_pixels(maps, 4), maps.kron(torch.ones(1, 4, 4)))


def test_statistics_of_a_uniform_and_a_peaked_map():
    even = torch.full((2, 4), 0.1)
    point = torch.zeros(2, 4)
    point[1, 2] = 0.5
    names = ("head", "patch_mass", "entropy", "peak", "peak_share", "kept_patches")
    uniform, peaked = head_statistics(torch.stack((even, point)), 0.6)
    approx = (pytest.approx(value) for value in (0.8, math.log(8), [0, 0], 1 / 8, 5 / 8))
    assert uniform == dict(zip(names, (0, *approx), strict=True))
    assert peaked == dict(zip(names, (1, 0.5, 0, [1, 2], 1, 1 / 8), strict=True))
    assert "kept_patches" not in head_statistics(point[None])[0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, (40, 24)), ([33, 50], (48, 32)), ([20], (24, 16)), ([480, 480], (480, 480))],
)
def test_fit_to_patches_crops_at_the_right_and_bottom(size, expected):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
    picture = fit_to_patches(Image.fromarray(pixels), size, 8)
    assert picture.size == expected
    if size is None:
        assert np.array_equal(np.asarray(picture), pixels[:24, :40])


def test_to_input_normalizes_with_imagenets_mean_and_std():
    picture = Image.new("RGB", (8, 16), (255, 0, 51))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert to_input(picture).shape == (3, 16, 8)
    assert to_input(picture)[:, 3, 5].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224", "xcit_nano_12_p16"])
def test_load_vit_rejects_networks_without_cls_attention(arch):
    parser = argparse.ArgumentParser()
    options.add_network_flags(parser)
    args = parser.parse_args(["--arch", arch])
    with pytest.raises(ConfigError, match=f"--arch {arch} has no attention .* expected .*vit_tiny"):
        options.load_vit(args, torch.device("cpu"), reason=NO_CLS_ATTENTION)


@pytest.mark.parametrize(
    ("words", "built"),
    [([], ("vit_nano", 4)), (["--arch", "vit_tiny", "--patch_size", "16"], ("vit_tiny", 16))],
)
def test_untrained_network_is_the_commands_default_unless_flags_override_it(words, built):
    parser = argparse.ArgumentParser()
    options.add_network_flags(parser, default=("vit_nano", 4))
    parser.add_argument("--crop", type=int, default=16)
    args = parser.parse_args(words)
    model, arch = options.load_vit(args, torch.device("cpu"), reason="")
    assert (arch, model.patch_size) == built
    model = options.load_network(args, torch.device("cpu"))
    assert (model.embed_dim, model.patch_size) == (VIT_ARCHS[arch]["embed_dim"], built[1])

"""Attention maps against the paper's equations, their masks, and their statistics."""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdino.errors import ConfigError, DataError
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


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_maps_are_the_cls_row_of_the_last_attention_matrix(vit, size):
    images = torch.randn(2, 3, *size)
    maps = attention_maps(vit, images)
    rows, columns = size[0] // 8, size[1] // 8
    assert maps.shape == (2, 4, rows, columns)
    weights = vit.get_last_selfattention(images)
    for row in range(rows):
        for column in range(columns):
            token = 1 + row * columns + column
            torch.testing.assert_close(maps[:, :, row, column], weights[:, :, 0, token])
    torch.testing.assert_close(maps.sum((2, 3)), 1 - weights[:, :, 0, 0])
    assert not maps.requires_grad


def test_changed_patch_changes_the_map_at_its_row_and_column(vit):
    images = torch.zeros(1, 3, 24, 40)
    vit.pos_embed.data.zero_()
    before = attention_maps(vit, images)
    images[:, :, 8:16, 32:40] = torch.randn(3, 8, 8)
    change = (attention_maps(vit, images) - before).abs().sum(1)[0]
    assert divmod(int(change.argmax()), 5) == (1, 4)


def reference_maps(model, image):
    """Caron et al. 2021, figure 1, in float64: softmax(q_CLS K^T / sqrt(d)) of the last block.

    Returns [H, h, w] for an image with as many patches as the position embedding.
    """
    p = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, depth = model.blocks[0].attn.num_heads, len(model.blocks)

    def norm(x, name):
        centerd = x - x.mean(-1, keepdim=True)
        spread = (centerd.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centerd / spread * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    weight, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
    grid = F.conv2d(image.double()[None], weight, bias, stride=model.patch_size)[0]
    x = torch.cat((p["cls_token"][0], grid.flatten(1).T)) + p["pos_embed"][0]
    for i in range(depth):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        if i == depth - 1:
            return weights[:, 0, 1:].reshape(heads, *grid.shape[1:])
        mixed = (weights @ v).transpose(0, 1).reshape(len(x), -1)
        x = x + linear(mixed, f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
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


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.39, [0, 0, 0, 1]),
        (0.41, [0, 0, 1, 1]),
        (0.6, [0, 0, 1, 1]),
        (0.71, [0, 1, 1, 1]),
        (1.0, [1, 1, 1, 1]),
    ],
)
def test_mask_keeps_the_strongest_patches(share, kept):
    values = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for order in itertools.permutations(range(4)):
        # Scaled by 0.37: the share is relative to the map's mass.
        mask = keep_mass(0.37 * values[list(order)].reshape(2, 2), share)
        assert mask.flatten().int().tolist() == [kept[i] for i in order]


def test_mask_drops_patches_that_hold_exactly_the_rest():
    mask = keep_mass(torch.tensor([[1.0, 2.0], [1.0, 4.0]]), 0.5)
    assert mask.tolist() == [[False, False], [False, True]]


def test_masks_match_the_paper():
    """The paper's steps: sort, normalize, accumulate, compare with 1 - threshold, restore order."""
    maps = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) ** 3
    masks = keep_mass(maps, 0.6)
    for image, head in itertools.product(range(2), range(3)):
        values = maps[image, head].flatten().tolist()
        total, cumulative, expected = math.fsum(values), 0.0, [False] * 35
        for i in sorted(range(35), key=values.__getitem__):
            cumulative += values[i] / total
            expected[i] = cumulative > 1 - 0.6
        assert masks[image, head].flatten().tolist() == expected
        kept = maps[image, head][masks[image, head]]
        assert kept.sum() >= 0.6 * total > kept.sum() - kept.min()


def test_mask_of_a_zero_map_is_empty():
    assert not keep_mass(torch.zeros(2, 3, 3), 0.6).any()


def test_to_pixels_repeats_each_patchs_value():
    maps = torch.arange(6.0).reshape(1, 2, 3)
    pixels = to_pixels(maps, 4)
    assert pixels.shape == (1, 8, 12)
    for y, x in itertools.product(range(8), range(12)):
        assert pixels[0, y, x] == maps[0, y // 4, x // 4]


def test_statistics_of_a_uniform_and_a_peaked_map():
    even = torch.full((2, 4), 0.1)
    point = torch.zeros(2, 4)
    point[1, 2] = 0.5
    uniform, peaked = head_statistics(torch.stack((even, point)), 0.6)
    assert uniform["entropy"] == pytest.approx(math.log(8))
    assert uniform["patch_mass"] == pytest.approx(0.8)
    assert uniform["kept_patches"] == 5 / 8
    assert uniform["peak_share"] == pytest.approx(1 / 8)
    assert peaked == {
        "head": 1,
        "patch_mass": 0.5,
        "entropy": 0,
        "peak": [1, 2],
        "peak_share": 1,
        "kept_patches": 1 / 8,
    }
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


def test_fit_to_patches_rejects_an_image_smaller_than_a_patch():
    with pytest.raises(DataError, match=r"7 x 20 px is smaller than a patch of 8 px"):
        fit_to_patches(Image.new("RGB", (20, 7)), None, 8)


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

"""Attention maps: the numbers, and the picture of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evals.attention import attention_maps, draw_attention
from fastdino.models.attention import token_layout
from fastdino.models.vit import VisionTransformer


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = VisionTransformer(patch_size=8, embed_dim=32, depth=2, num_heads=4, img_size=32)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_maps_are_what_cls_gives_each_patch(vit, size):
    images = torch.randn(2, 3, *size)
    maps = attention_maps(vit, images)
    rows, columns = size[0] // 8, size[1] // 8
    assert maps.shape == (2, 4, rows, columns)
    weights = vit.get_last_selfattention(images)
    for row in range(rows):
        for column in range(columns):
            token = 1 + row * columns + column
            assert torch.equal(maps[:, :, row, column], weights[:, :, 0, token])
    torch.testing.assert_close(maps.sum((2, 3)), 1 - weights[:, :, 0, 0])
    assert not maps.requires_grad


def test_the_last_blocks_weights_are_those_that_its_output_is_made_with(vit):
    images, block = torch.randn(2, 3, 32, 32), vit.blocks[-1]
    layout = token_layout(((2, 17),), images.device, "sdpa")
    tokens = vit.blocks[0](vit.embed(images).flatten(0, 1), layout).unflatten(0, (2, 17))
    weights = vit.get_last_selfattention(images)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))
    value = block.attn.qkv(block.norm1(tokens))[..., 64:].unflatten(2, (4, 8))
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
    expected = tokens + block.attn.proj(mixed)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(vit(images), vit.norm(expected)[:, 0])


def test_a_map_moves_with_its_patch(vit):
    """Rows are rows: a patch that draws all attention shows at its place."""
    images = torch.zeros(1, 3, 24, 40)
    vit.pos_embed.data.zero_()
    plain = attention_maps(vit, images)
    images[:, :, 8:16, 32:40] = torch.randn(3, 8, 8)
    change = (attention_maps(vit, images) - plain).abs().sum(1)[0]
    assert divmod(int(change.argmax()), 5) == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_picture_opens_and_has_a_row_for_each_image(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = {}
    for rows in (1, 2):
        pictures = [
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)
        ]
        path = tmp_path / f"{rows}.png"
        draw_attention(pictures, torch.rand(rows, 3, 4, 4).to(dtype), path, title="a title")
        with Image.open(path) as image:
            assert image.format == "PNG"
            image.load()
            shapes[rows] = image.size
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert shapes[1][0] == shapes[2][0]
    assert shapes[2][1] - shapes[1][1] == math.floor(1.25 * 120)


def test_pictures_and_maps_must_be_as_many(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        draw_attention([Image.new("RGB", (8, 8))], torch.rand(2, 3, 4, 4), tmp_path / "x.png")

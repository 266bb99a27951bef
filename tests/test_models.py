from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastdino.errors import ConfigError
from fastdino.models.attention import attend, choose_attention, xformers_problem
from fastdino.models.backbones import build_backbone, build_networks
from fastdino.models.head import DINOHead, MultiCropWrapper
from fastdino.models.vit import DropPath, VisionTransformer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("arch", "millions"), [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8)]
)
def test_the_papers_architectures_have_their_sizes(arch, millions):
    with torch.device("meta"):
        vit, width = build_backbone(arch, patch_size=16)
    assert width == vit.embed_dim
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_deit_means_vit():
    with torch.device("meta"):
        names = [build_backbone(arch)[0].state_dict().keys() for arch in ("deit_tiny", "vit_tiny")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("arch", "width"),
    [
        ("resnet50", 2048),
        ("xcit_nano_12_p16", 128),
        ("convnext_atto", 320),
        ("vit_tiny_patch16_224", 192),
    ],
)
def test_other_backbones_give_one_vector_for_both_crop_sizes(arch, width):
    backbone, built_width = build_backbone(arch)
    backbone.eval()
    assert built_width == width
    for size in (64, 96):
        assert backbone(torch.zeros(1, 3, size, size)).shape == (1, width)


def test_an_unknown_architecture_offers_near_names():
    with pytest.raises(ConfigError, match=r"--arch 'vit_smal' .*vit_small"):
        build_backbone("vit_smal")


def test_timm_names_that_begin_with_deit_are_timms():
    assert build_backbone("deit_tiny_distilled_patch16_224")[1] == 192


@pytest.mark.parametrize("arch", ["alexnet", "squeezenet1_0"])
def test_a_torchvision_model_without_an_fc_layer_says_so(arch):
    with pytest.raises(ConfigError, match=f"{arch}: torchvision's has no single fc layer"):
        build_backbone(arch)


def test_an_architecture_that_cannot_take_the_crops_is_found_before_the_run(tiny):
    with pytest.raises(ConfigError, match="cannot take 16 px crops"):
        build_networks(tiny(arch="mixer_s32_224", global_crops_size=224))


def test_networks_start_equal_and_the_teacher_takes_no_gradient(tiny):
    student, teacher = build_networks(tiny(norm_last_layer=False, drop_path_rate=0.3))
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad
        assert not theirs.requires_grad
    rates = [m.rate for m in student.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.3 * i / 5 for i in range(6)])
    assert all(m.rate == 0 for m in teacher.modules() if isinstance(m, DropPath))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(4000, 2, 3))
    values = out.flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))
    assert values[:, 0].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(5, 1)), torch.ones(5, 1))


def test_positions_of_another_size_follow_the_papers_scale_factor(float64):
    vit = VisionTransformer(patch_size=16, embed_dim=8, depth=1, num_heads=1)
    assert vit.positions((14, 14)) is vit.pos_embed
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    want = nn.functional.interpolate(grid, scale_factor=(6.1 / 14, 9.1 / 14), mode="bicubic")
    got = vit.positions((6, 9))
    assert torch.equal(got[:, 1:], want.permute(0, 2, 3, 1).reshape(1, 54, 8))
    assert torch.equal(got[:, :1], vit.pos_embed[:, :1])
    # Without the 0.1 the coordinates are others: the test would pass on a resize by size alone.
    by_size = nn.functional.interpolate(grid, size=(6, 9), mode="bicubic")
    assert not torch.allclose(want, by_size)


def test_attention_is_softmax_of_scaled_products(float64):
    query, key, value = (torch.randn(2, 5, 3, 4) for _ in range(3))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(4)
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
    torch.testing.assert_close(attend(query, key, value, backend="sdpa"), want)


def test_last_selfattention_is_what_the_last_block_applies(float64):
    vit = VisionTransformer(patch_size=8, embed_dim=12, depth=2, num_heads=3, img_size=32).eval()
    images = torch.randn(2, 3, 16, 24)
    weights = vit.get_last_selfattention(images)
    assert weights.shape == (2, 3, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    block = vit.blocks[1]
    tokens = block.norm1(vit.blocks[0](vit.embed(images)))
    value = block.attn._project(tokens)[2]
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(tokens))


def test_intermediate_layers_end_with_what_forward_returns():
    vit = VisionTransformer(patch_size=8, embed_dim=12, depth=3, num_heads=3, img_size=16).eval()
    images = torch.randn(1, 3, 16, 16)
    layers = vit.get_intermediate_layers(images, n=2)
    assert len(layers) == 2
    assert torch.equal(layers[-1][:, 0], vit(images))


def test_attention_falls_back_on_a_cpu_and_says_why():
    choice = choose_attention("auto", CPU)
    assert choice.name == "sdpa"
    assert xformers_problem(CPU) in choice.reason
    with pytest.raises(ConfigError, match="--attention xformers cannot run"):
        choose_attention("xformers", CPU)


def test_head_normalises_and_keeps_the_papers_names(float64):
    head = DINOHead(8, 5, use_bn=True, norm_last_layer=True)
    assert not head.last_layer.weight_g.requires_grad
    assert DINOHead(8, 5, norm_last_layer=False).last_layer.weight_g.requires_grad
    names = set(head.state_dict())
    assert {"last_layer.weight_g", "last_layer.weight_v", "mlp.0.weight", "mlp.6.bias"} <= names
    head.eval()
    with torch.no_grad():
        logits = head(torch.randn(3, 8) * 100)
        head.last_layer.weight_v.mul_(7)
        assert logits.abs().max() <= 1  # cosines: neither length counts
        torch.testing.assert_close(head(torch.zeros(1, 8)), head(torch.zeros(1, 8)))


def test_crops_of_one_size_share_a_pass_and_keep_their_order():
    passes = []

    class Backbone(nn.Module):
        def forward(self, x):
            passes.append(tuple(x.shape))
            return x.mean((2, 3))

    head = nn.Identity()
    crops = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((8, 8, 4, 4, 4))]
    out = MultiCropWrapper(Backbone(), head)(crops)
    assert passes == [(4, 3, 8, 8), (6, 3, 4, 4)]
    assert out[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

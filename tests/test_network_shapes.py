"""Widths, stochastic depth rates and resized positions of networks against the papers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastdino.models.head import DINOHead
from fastdino.models.vit import VisionTransformer


def test_head_has_the_papers_widths():
    head = DINOHead(24, 64)
    shapes = [tuple(layer.weight.shape) for layer in head.mlp if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(2048, 24), (2048, 2048), (256, 2048)]
    assert head.last_layer.weight_v.shape == (64, 256)


@pytest.mark.parametrize(("depth", "rates"), [(1, [0]), (5, [0, 0.1, 0.2, 0.3, 0.4])])
def test_stochastic_depth_rises_from_0_to_the_rate(depth, rates):
    vit = VisionTransformer(
        patch_size=8, embed_dim=8, depth=depth, num_heads=1, img_size=16, drop_path_rate=0.4
    )
    assert vit.drop_path_rates == pytest.approx(rates)


def test_positions_with_registers_are_resized_with_antialiasing_as_in_dinov2():
    """Darcet et al. 2023: bicubic to the exact grid, with antialiasing."""
    vit = VisionTransformer(
        patch_size=8, embed_dim=6, depth=1, num_heads=1, img_size=64, registers=2
    )
    grid = vit.pos_embed.detach()[:, 1:].reshape(1, 8, 8, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(3, 5), mode="bicubic", antialias=True)
    positions = vit.positions((24, 40)).detach()
    assert torch.equal(positions[:, :1], vit.pos_embed[:, :1])
    torch.testing.assert_close(positions[:, 1:], expected.flatten(2).transpose(1, 2))

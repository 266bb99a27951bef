"""Smaller networks: a step of a few milliseconds."""

from __future__ import annotations

import pytest

from fastdino.models.head import DINOHead
from fastdino.models.vit import VIT_ARCHS


def shrink_networks(patch: pytest.MonkeyPatch) -> None:
    """Make vit_nano and the head small, until the patch is undone."""
    patch.setitem(VIT_ARCHS, "vit_nano", {"embed_dim": 32, "depth": 2, "num_heads": 2})
    widths = {"hidden_dim": 32, "bottleneck_dim": 16}
    patch.setattr(DINOHead.__init__, "__kwdefaults__", widths)

"""From a checkpoint to a backbone for evaluation."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdino import checkpoint
from fastdino.checkpoint import check_shapes, strip_prefix
from fastdino.errors import CheckpointError
from fastdino.models.backbones import build_backbone


@dataclass(frozen=True)
class Backbone:
    """A backbone [B, 3, H, W] -> [B, D] in eval mode, and what it was built as."""

    module: nn.Module
    arch: str
    patch_size: int


def load_backbone(
    path: str,
    *,
    checkpoint_key: str,
    arch: str | None,
    patch_size: int | None,
    img_size: int = 224,
) -> Backbone:
    """The backbone of a checkpoint of this project or the paper's code; fresh weights for path "".

    Args:
        path: a full checkpoint, or a file of one network's or of the backbone's weights alone.
        checkpoint_key: "teacher" or "student", used where the file has both.
        arch, patch_size: None: what the checkpoint's `args` say, else vit_small, 16.
        img_size: of fresh weights, in pixels; a checkpoint's is read off its position embedding.

    Raises: CheckpointError: no such key, or weights of another network (tensors are named).
    """
    state: dict[str, Any] = checkpoint.load(Path(path)) if path else {}
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args or {}
    arch = arch or args.get("arch", "vit_small")
    patch_size = patch_size or args.get("patch_size", 16)
    weights = _backbone_weights(state, checkpoint_key, path)
    if "pos_embed" in weights:
        img_size = math.isqrt(weights["pos_embed"].shape[1] - 1) * patch_size
    module, _ = build_backbone(arch, patch_size=patch_size, img_size=img_size)
    if path:
        check_shapes(module, weights, f"{path} for --arch {arch} --patch_size {patch_size}")
        module.load_state_dict(weights)
    return Backbone(module.eval(), arch, patch_size)


def _backbone_weights(state: dict[str, Any], key: str, path: str) -> dict[str, Tensor]:
    if "student" in state or "teacher" in state:
        if not isinstance(state.get(key), dict):
            networks = [name for name in ("student", "teacher") if name in state]
            raise CheckpointError(
                f"{path} has no network {key!r}, it has {', '.join(networks)}: "
                "name one with --checkpoint_key"
            )
        state = state[key]
    state = strip_prefix(state, "module.")
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    return strip_prefix(backbone or state, "backbone.")

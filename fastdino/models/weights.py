"""From a checkpoint to a backbone, for evaluation or to go on with."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdino import checkpoint
from fastdino.checkpoint import check_shapes, strip_prefix
from fastdino.errors import CheckpointError
from fastdino.models.backbones import build_backbone
from fastdino.models.downloads import RELEASED, local_file
from fastdino.models.vit import VIT_ARCHS, VisionTransformer
from fastdino.models.weight_names import own_names, vit_of

# What a folder of Hugging Face's holds the weights in, in the order they are looked for.
HF_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Backbone:
    """A backbone [B, 3, H, W] -> [B, D] in eval mode, what it was built as, and its training.

    Attributes:
        args: the settings of its training, where the checkpoint has them.
        epoch: the epochs that were done, where the checkpoint says it.
        key: "teacher" or "student", where the checkpoint says which it is.
    """

    module: nn.Module
    arch: str
    patch_size: int
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    key: str | None = None


def load_backbone(
    path: str,
    *,
    checkpoint_key: str | None,
    arch: str | None,
    patch_size: int | None,
    img_size: int = 224,
    default: tuple[str, int] = ("vit_small", 16),
) -> Backbone:
    """The backbone of a checkpoint; fresh weights for path "".

    Args:
        path: a file: a full checkpoint of this project or the paper's code, one network's or the
            backbone's weights alone, as .pth or .safetensors, under the paper's names, timm's
            (its DINO ViTs) or Hugging Face's (facebook/dino-*). Or a folder of Hugging Face's,
            with model.safetensors or pytorch_model.bin, and config.json or not. Or the URL of a
            file, or a name of released.RELEASED.
        checkpoint_key: "teacher" or "student", used where the file has either; None: the teacher,
            or the student where there is no teacher.
        arch, patch_size: None: what the checkpoint's `args` say, else what the shapes of its
            tensors say, else the default's.
        img_size: of fresh weights, in pixels; a checkpoint's is read off its position embedding.
        default: architecture and patch size where nothing says them.

    Raises: CheckpointError: no such key, or weights of another network (tensors are named).
    """
    state = _read(local_file(path)) if path else {}
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args or {}
    networks = [name for name in ("teacher", "student") if name in state]
    key = (checkpoint_key or networks[0]) if networks else None
    weights = _backbone_weights(state, key, path)
    if path in RELEASED:
        default = (RELEASED[path].arch, 16)
    seen_arch, seen_patch_size = vit_of(weights) or default
    arch = arch or args.get("arch", seen_arch)
    patch_size = patch_size or args.get("patch_size", seen_patch_size)
    if "pos_embed" in weights:
        img_size = math.isqrt(weights["pos_embed"].shape[1] - 1) * patch_size
    module, _ = build_backbone(arch, patch_size=patch_size, img_size=img_size)
    if path:
        check_shapes(module, weights, f"{path} for --arch {arch} --patch_size {patch_size}")
        module.load_state_dict(weights)
    epoch = state.get("epoch")
    epoch = epoch if isinstance(epoch, int) else None
    return Backbone(module.eval(), arch, patch_size, args, epoch, key)


def initial_weights(
    path: str, *, arch: str, patch_size: int, img_size: int
) -> tuple[dict[str, Tensor], str | None]:
    """The weights that a backbone starts a run from, and whose they are.

    The teacher's, or the student's of a file without a teacher; None of a file that says neither.
    A ViT's position embedding is resized to the patch grid of images of img_size px, as the paper
    resizes it for other sizes.

    Raises: CheckpointError as load_backbone does.
    """
    backbone = load_backbone(path, checkpoint_key=None, arch=arch, patch_size=patch_size)
    module = backbone.module
    weights: dict[str, Tensor] = module.state_dict()
    if isinstance(module, VisionTransformer):
        weights["pos_embed"] = module.positions((img_size, img_size)).detach().clone()
    return weights, backbone.key


def _read(path: Path) -> dict[str, Any]:
    """What a file, or a folder of Hugging Face's, holds."""
    if not path.is_dir():
        return checkpoint.load(path)
    files = [path / name for name in HF_FILES if (path / name).is_file()]
    if not files:
        raise CheckpointError(
            f"{path} is a folder without {' or '.join(HF_FILES)}: name a checkpoint, or a folder "
            "of Hugging Face's"
        )
    state = checkpoint.load(files[0])
    _check_hf_config(path / "config.json")
    return state


def _check_hf_config(path: Path) -> None:
    """Raises CheckpointError where a config.json is of a ViT that is not the paper's."""
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text())
        shape = {
            "embed_dim": config["hidden_size"],
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no config of a ViT ({error!r})") from error
    if config.get("model_type", "vit") != "vit" or shape not in VIT_ARCHS.values():
        raise CheckpointError(
            f"{path} is of a {config.get('model_type')} with {shape}, expected a vit that is one "
            f"of {', '.join(VIT_ARCHS)}"
        )


def _backbone_weights(state: dict[str, Any], key: str | None, path: str) -> dict[str, Tensor]:
    if key is not None:
        if not isinstance(state.get(key), dict):
            networks = [name for name in ("student", "teacher") if name in state]
            raise CheckpointError(
                f"{path} has no network {key!r}, it has {', '.join(networks)}: "
                "name one with --checkpoint_key"
            )
        state = state[key]
    state = strip_prefix(state, "module.")
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    return own_names(strip_prefix(backbone or state, "backbone."), path)

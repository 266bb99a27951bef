"""Loading of backbone weights: checkpoints, bare weights, Hugging Face folders, URLs and names."""

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
from fastdino.models.weight_names import infer_vit, to_paper_names

# Weight files of a Hugging Face folder, in order of preference.
HF_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Backbone:
    """A backbone [B, 3, H, W] -> [B, D] in eval mode, with the facts from its checkpoint.

    Attributes:
        args: training settings, if the checkpoint has them.
        epoch: epochs trained, if the checkpoint has it.
        key: "teacher" or "student", if the checkpoint has such keys.
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
    """Load a backbone; path "" gives random weights.

    Args:
        path: a file: a full checkpoint of fastdino or the paper's code, one network, or bare
            backbone weights, as .pth or .safetensors, with the names of the paper, of timm (its
            DINO ViTs) or of Hugging Face (facebook/dino-*). Or a Hugging Face folder, with
            model.safetensors or pytorch_model.bin, and optionally config.json. Or the URL of a
            file, or a name in downloads.RELEASED.
        checkpoint_key: "teacher" or "student", used if the file has either; None: the teacher, or
            the student if there is no teacher.
        arch, patch_size: None: read from the `args` of the checkpoint, else inferred from its
            tensor shapes, else from `default`.
        img_size: for random weights, in pixels; a checkpoint's position embedding determines it.
        default: fallback architecture and patch size.

    Raises: CheckpointError: no such key, or weights of another network (with the tensors' names).
    """
    state = _read(local_file(path)) if path else {}
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args or {}
    networks = [name for name in ("teacher", "student") if name in state]
    key = (checkpoint_key or networks[0]) if networks else None
    weights = _backbone_weights(state, key, path)
    if path in RELEASED:
        default = (RELEASED[path].arch, 16)
    inferred_arch, inferred_patch_size = infer_vit(weights) or default
    arch = arch or args.get("arch", inferred_arch)
    patch_size = patch_size or args.get("patch_size", inferred_patch_size)
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
    """Return the backbone weights for --init_from, and the checkpoint key they were read from.

    The key is "teacher", "student" if there is no teacher, or None for bare weights. The position
    embedding of a ViT is resized to the patch grid of img_size pixels, as in the paper's code.

    Raises: CheckpointError: as load_backbone.
    """
    backbone = load_backbone(path, checkpoint_key=None, arch=arch, patch_size=patch_size)
    module = backbone.module
    weights: dict[str, Tensor] = module.state_dict()
    if isinstance(module, VisionTransformer):
        weights["pos_embed"] = module.positions((img_size, img_size)).detach().clone()
    return weights, backbone.key


def _read(path: Path) -> dict[str, Any]:
    """Read a weight file, or the weight file of a Hugging Face folder."""
    if not path.is_dir():
        return checkpoint.load(path)
    files = [path / name for name in HF_FILES if (path / name).is_file()]
    if not files:
        raise CheckpointError(
            f"{path} is a folder without {' or '.join(HF_FILES)}: use a checkpoint file or a "
            "Hugging Face folder"
        )
    state = checkpoint.load(files[0])
    _check_hf_config(path / "config.json")
    return state


def _check_hf_config(path: Path) -> None:
    """Raise CheckpointError if config.json exists and is not of one of the paper's ViTs."""
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
        raise CheckpointError(f"{path} is not the config of a ViT ({error!r})") from error
    if config.get("model_type", "vit") != "vit" or shape not in VIT_ARCHS.values():
        raise CheckpointError(
            f"{path} describes a {config.get('model_type')} with {shape}, expected a vit that is "
            f"one of {', '.join(VIT_ARCHS)}"
        )


def _backbone_weights(state: dict[str, Any], key: str | None, path: str) -> dict[str, Tensor]:
    """Extract the weights of the backbone, without prefixes and with the paper's names."""
    if key is not None:
        if not isinstance(state.get(key), dict):
            networks = [name for name in ("student", "teacher") if name in state]
            raise CheckpointError(
                f"{path} has no network {key!r}, it has {', '.join(networks)}: "
                "select one with --checkpoint_key"
            )
        state = state[key]
    state = strip_prefix(state, "module.")
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    return to_paper_names(strip_prefix(backbone or state, "backbone."), path)

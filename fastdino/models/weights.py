"""Loading of backbone weights: checkpoints, bare weights, Hugging Face folders, URLs and names."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino import checkpoint
from fastdino.checkpoint import check_shapes
from fastdino.errors import CheckpointError
from fastdino.models.backbones import build_backbone, is_known_arch, is_vit
from fastdino.models.downloads import RELEASED, discard_damaged, local_file
from fastdino.models.vit import VIT_ARCHS, VisionTransformer
from fastdino.models.weight_layouts import Network, find_network
from fastdino.models.weight_names import drop_other_parts, infer_vit, to_paper_names, vit_sizes

# Weight files of a Hugging Face folder, in order of preference.
HF_FILES = ("model.safetensors", "pytorch_model.bin")
# The model types in config.json that a VisionTransformer can hold.
HF_TYPES = ("vit", "dinov2", "dinov2_with_registers")
LARGEST_PATCH = 1024  # px


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
            backbone weights, as .pth or .safetensors, nested in other dicts and with prefixes or
            without, with the names of the paper, of timm, DINOv2, iBOT (their ViTs) or Hugging
            Face (facebook/dino-*, facebook/dinov2-*). Or a Hugging Face folder, with
            model.safetensors or pytorch_model.bin, and optionally config.json. Or the URL of a
            file, or a name in downloads.RELEASED.
        checkpoint_key: "teacher" or "student", used if the file has either; None: the teacher, or
            the student if there is no teacher.
        arch, patch_size: None: read from the `args` of the checkpoint, else inferred from its
            tensor shapes, else from `default`.
        img_size: for random weights, in pixels; a checkpoint's position embedding determines it.
        default: architecture and patch size of random weights.

    Raises: CheckpointError: no such key, no network of this architecture in the file, or weights of
        another network (with the tensors' names).
    """
    if not path:
        arch, patch_size = arch or default[0], patch_size or default[1]
        module, _ = build_backbone(arch, patch_size=patch_size, img_size=img_size)
        return Backbone(module.eval(), arch, patch_size)
    state = _read_weights(path)
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    arch = arch or _stated_arch(path, args)
    sizes = _Sizes(arch, patch_size or _stated_patch_size(args), default[1])
    load = _load_other if arch is not None and not is_vit(arch) else _load_vit
    with checkpoint.explain_content(path):
        module, arch, patch_size, network = load(path, state, checkpoint_key, sizes)
    _check_finite(module, path)
    epoch = state.get("epoch")
    epoch = epoch if isinstance(epoch, int) else None
    return Backbone(module.eval(), arch, patch_size, args, epoch, network.role)


class _Sizes(NamedTuple):
    """Architecture and patch size as far as they are stated, and the usual patch size."""

    arch: str | None
    patch_size: int | None
    default_patch_size: int


def _stated_arch(path: str, args: dict[str, Any]) -> str | None:
    """Return the architecture that the file's settings or its name among RELEASED state."""
    if path in RELEASED:
        return RELEASED[path].arch
    arch = args.get("arch")
    return arch if isinstance(arch, str) and is_known_arch(arch) else None


def _stated_patch_size(args: dict[str, Any]) -> int | None:
    """Return the patch size that the file's settings state, if it can be one."""
    size = args.get("patch_size")
    return size if type(size) is int and 0 < size <= LARGEST_PATCH else None


def _check_finite(module: nn.Module, path: str) -> None:
    """Raise CheckpointError for NaN or infinite weights, whose features are all NaN."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} is not finite: the training diverged; use an earlier checkpoint"
            )


def _load_vit(
    path: str, state: dict[str, Any], key: str | None, sizes: _Sizes
) -> tuple[nn.Module, str, int, Network]:
    network = find_network(state, key, path)
    weights = to_paper_names(network.tensors, path)
    inferred = infer_vit(weights)
    if sizes.arch is None and inferred is None:
        dim, depth, side = vit_sizes(weights)
        raise CheckpointError(
            f"{path} is {network} of width {dim} with {depth} blocks and {side} px patches, "
            f"expected one of {', '.join(VIT_ARCHS)}: select another network with --arch"
        )
    arch, patch_size = inferred or ("", sizes.default_patch_size)
    arch, patch_size = sizes.arch or arch, sizes.patch_size or patch_size
    registers = weights.get("register_tokens")
    module, _ = build_backbone(
        arch,
        patch_size=patch_size,
        img_size=math.isqrt(max(weights["pos_embed"].shape[1] - 1, 1)) * patch_size,
        registers=0 if registers is None else registers.shape[1],
    )
    what = f"{path}, {network}, for --arch {arch} --patch_size {patch_size}"
    check_shapes(module, weights, what)
    module.load_state_dict(weights)
    return module, arch, patch_size, network


def _load_other(
    path: str, state: dict[str, Any], key: str | None, sizes: _Sizes
) -> tuple[nn.Module, str, int, Network]:
    """Load a network of torchvision or timm, whose tensors have its own names in the file."""
    assert sizes.arch is not None
    module, _ = build_backbone(sizes.arch)
    own = module.state_dict()
    network = find_network(state, key, path, own_names=own)
    weights = drop_other_parts(network.tensors, keep=own)
    weights = _resize_positions(weights, own)
    under = f", under {network.prefix.rstrip('.')!r}," if network.prefix else ""
    check_shapes(module, weights, f"{path}{under} for --arch {sizes.arch}")
    module.load_state_dict(weights)
    return module, sizes.arch, sizes.patch_size or sizes.default_patch_size, network


def _resize_positions(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resize a position embedding [1, CLS + patches, D] to another network's square grid.

    It is resized bicubically, as by VisionTransformer.positions.
    """
    name = "pos_embed"
    if name not in own or name not in weights or weights[name].ndim != 3:
        return weights
    number, target = weights[name].shape[1], own[name].shape[1]
    sides = [math.isqrt(n) for n in (number, target)]
    extra = 0
    if sides[0] ** 2 != number:  # one position of CLS
        sides, extra = [math.isqrt(n - 1) for n in (number, target)], 1
    squares = [side**2 + extra for side in sides]
    if number == target or squares != [number, target]:
        return weights
    first, patches = weights[name][:, :extra], weights[name][:, extra:]
    image = patches.unflatten(1, (sides[0], sides[0])).permute(0, 3, 1, 2)
    scale = (sides[1] + 0.1) / sides[0]
    resized = F.interpolate(image, scale_factor=(scale, scale), mode="bicubic")
    return weights | {name: torch.cat((first, resized.flatten(2).transpose(1, 2)), 1)}


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
        if module.registers:
            raise CheckpointError(
                f"{path} is a ViT with {module.registers} registers, which networks trained here "
                "do not have: start from weights without registers"
            )
        weights["pos_embed"] = module.positions((img_size, img_size)).detach().clone()
    return weights, backbone.key


def _read_weights(weights: str) -> dict[str, Any]:
    """Read a path, URL or name; a downloaded file that is damaged is downloaded again."""
    path = local_file(weights)
    try:
        return _read(path)
    except CheckpointError as error:
        if path == Path(weights) or not discard_damaged(path, error):
            raise
    return _read(local_file(weights))


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
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text("utf-8"))
        shape = {
            "embed_dim": config["hidden_size"],
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not the config of a ViT ({error!r})") from error
    kind = config.get("model_type", "vit")
    if kind not in HF_TYPES or shape not in VIT_ARCHS.values():
        raise CheckpointError(
            f"{path} describes a {kind} with {shape}, expected a {' or '.join(HF_TYPES)} that is "
            f"one of {', '.join(VIT_ARCHS)}"
        )

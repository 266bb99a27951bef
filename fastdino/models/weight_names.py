"""Conversion of ViT weights between Hugging Face's, timm's and the paper's tensor names.

fastdino uses the paper's names (`blocks.0.attn.qkv.weight`), which are also those of timm's ViTs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from fastdino.errors import CheckpointError
from fastdino.models.vit import VIT_ARCHS

# Names of Hugging Face's ViTModel and Dinov2Model, and their counterparts in the paper. Within a
# block they follow `encoder.layer.<N>.` there and `blocks.<N>.` here.
_HF_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_HF_IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_HF_OTHERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_DINOV2_IN_BLOCK = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")  # as in the paper
_PAPER_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
# Other names of a tensor, by project; the pattern applies to the whole name.
_SYNONYMS = (
    (re.compile(r"embeddings\.(register_tokens|mask_token)"), r"\1"),  # Hugging Face's DINOv2
    (re.compile(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1"), r"blocks.\1.ls\2.gamma"),
    (re.compile(r"blocks\.(\d+)\.gamma_([12])"), r"blocks.\1.ls\2.gamma"),  # iBOT
    (re.compile(r"reg_token"), "register_tokens"),  # timm
    (re.compile(r"blocks\.\d+\.(\d+\..+)"), r"blocks.\1"),  # DINOv2's chunks of blocks
)
# What follows the LayerScale of each branch of a block.
_SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
# Parts of a network that are no backbone: classifiers, decoders, tokens for masked patches.
_DROPPED = re.compile(
    r"(?:head|head_dist|fc|classifier|pooler|projector|predictor)\..+|decoder_.+"
    r"|mask_token|masked_embed"
)
# What a VisionTransformer cannot hold: a pattern of the tensors, and what they are.
_UNSUPPORTED = (
    (r"rope_embed\..+|storage_tokens|layer\.\d+\..+", "rotary positions (DINOv3)"),
    (r".*\.mlp\.(w12|w1|w2|w3|weights_in|gate_proj|fc1_g)\..+", "SwiGLU MLPs"),
    (r"dist_token", "a distillation token"),
    (r".*\.(q_norm|k_norm)\..+", "normalised queries and keys"),
    (r".*relative_position.*", "relative positions"),
)


def drop_other_parts(state: dict[str, Tensor], keep: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the weights without those of classifiers, decoders and mask tokens.

    Args: keep: names that are part of the network.
    """
    kept = {*keep}
    return {n: tensor for n, tensor in state.items() if n in kept or not _DROPPED.fullmatch(n)}


def to_paper_names(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename the weights of a ViT to the paper's names; drop what is no part of the backbone.

    Args:
        state: weights of Hugging Face's ViTModel, ViTForImageClassification or Dinov2Model, of a
            timm ViT, of DINOv2 or iBOT, or with the paper's names.
        source: the file, for error messages.

    Hugging Face's query, key and value become one tensor. Its config has a LayerNorm eps of 1e-12;
    fastdino uses 1e-6, with which the weights were trained. LayerScale (y = gamma * (W x + b)) is
    folded into the layer before it: W' = diag(gamma) W, b' = gamma b.

    Raises: CheckpointError: a block lacks its query, key or value, or a VisionTransformer cannot
        hold these weights.
    """
    renamed = {_apply_synonyms(name): tensor for name, tensor in state.items()}
    if "embeddings.cls_token" in renamed:
        renamed = _from_hf(renamed, source)
    renamed = drop_other_parts(renamed)
    _check_supported(renamed, source)
    return _with_cls_position(_fold_layer_scale(renamed))


def _apply_synonyms(name: str) -> str:
    for pattern, paper in _SYNONYMS:
        name = pattern.sub(paper, name) if pattern.fullmatch(name) else name
    return name


def _check_supported(state: dict[str, Tensor], source: str) -> None:
    parts = [what for pattern, what in _UNSUPPORTED if any(re.fullmatch(pattern, n) for n in state)]
    if not parts and "pos_embed" not in state:
        parts = ["no position embedding (as DINOv3)"]
    if parts:
        raise CheckpointError(
            f"{source} is a ViT with {' and '.join(parts)}, which fastdino's vit_* does not have: "
            "use timm's model by --arch, if there is one, with weights in timm's format"
        )


def _fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    folded = dict(state)
    for name in state:
        block, _, scale = name.removesuffix(".gamma").rpartition(".")
        if name.endswith(".gamma") and scale in _SCALED:
            gamma = folded.pop(name)
            for kind in ("weight", "bias"):
                layer = f"{block}.{_SCALED[scale]}.{kind}"
                if layer in folded:
                    factor = gamma[:, None] if kind == "weight" else gamma
                    folded[layer] = factor * folded[layer]
    return folded


def _with_cls_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give CLS a position of 0 if it has none: timm adds it to cls_token for some models."""
    positions = state["pos_embed"]
    number = positions.shape[1] if positions.ndim == 3 else 0
    if number < 2 or math.isqrt(number) ** 2 != number:
        return state
    return state | {
        "pos_embed": torch.cat((positions.new_zeros(1, 1, positions.shape[2]), positions), 1)
    }


def _from_hf(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _HF_BLOCK.fullmatch(name)
        if block and block[2] in _HF_QKV:
            parts = [f"encoder.layer.{block[1]}.{part}.{block[3]}" for part in _HF_QKV]
            missing = [part for part in parts if part not in state]
            if missing:
                raise CheckpointError(f"{source} has {name}, but {', '.join(missing)} is missing")
            if name == parts[0]:
                qkv = torch.cat([state[part] for part in parts])
                renamed[f"blocks.{block[1]}.attn.qkv.{block[3]}"] = qkv
        elif block and block[2] in (*_HF_IN_BLOCK, *_DINOV2_IN_BLOCK):
            layer = _HF_IN_BLOCK.get(block[2], block[2])
            renamed[f"blocks.{block[1]}.{layer}.{block[3]}"] = tensor
        else:
            renamed[_rename(name, _HF_OTHERS)] = tensor
    return renamed


def to_hf_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a vit_* to those of Hugging Face's ViTModel without a pooler."""
    in_block = {paper: hf for hf, paper in _HF_IN_BLOCK.items()}
    others = {paper: hf for hf, paper in _HF_OTHERS.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _PAPER_BLOCK.fullmatch(name)
        if block and block[2] == "attn.qkv":
            for part, rows in zip(_HF_QKV, tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{block[1]}.{part}.{block[3]}"] = rows.clone()
        elif block:
            renamed[f"encoder.layer.{block[1]}.{in_block[block[2]]}.{block[3]}"] = tensor
        else:
            renamed[_rename(name, others)] = tensor
    return renamed


def _rename(name: str, table: dict[str, str]) -> str:
    """Rename a tensor, or the layer it belongs to, by `table`; keep names that are not in it."""
    layer, _, kind = name.rpartition(".")
    return f"{table[layer]}.{kind}" if layer in table else table.get(name, name)


def infer_vit(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """Return the vit_* architecture and patch size with these tensor shapes, or None."""
    dim, depth, patch_size = vit_sizes(state)
    for arch, shape in VIT_ARCHS.items():
        if (shape["embed_dim"], shape["depth"]) == (dim, depth):
            return arch, patch_size
    return None


def vit_sizes(state: dict[str, Tensor]) -> tuple[int, int, int]:
    """Return width, number of blocks and patch size of a ViT with the paper's names."""
    patches = state["patch_embed.proj.weight"]
    if patches.ndim != 4:
        return 0, 0, 0
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return patches.shape[0], depth, patches.shape[-1]

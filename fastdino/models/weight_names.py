"""Conversion of ViT weights between Hugging Face's, timm's and the paper's tensor names.

fastdino uses the paper's names (`blocks.0.attn.qkv.weight`), which are also those of timm's ViTs.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastdino.errors import CheckpointError
from fastdino.models.vit import VIT_ARCHS

# Names of Hugging Face's ViTModel and their counterparts in the paper. Within a block they follow
# `encoder.layer.<N>.` there and `blocks.<N>.` here.
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
_PAPER_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
# Layers on top of the backbone, which are dropped.
_HF_HEADS = ("pooler.", "classifier.")
_TIMM_HEAD = ("head.weight", "head.bias")


def to_paper_names(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename the weights of a backbone to the paper's names; drop its classifier and pooler.

    Args:
        state: weights of Hugging Face's ViTModel or ViTForImageClassification, of a timm ViT, or
            with the paper's names.
        source: the file, for error messages.

    Hugging Face's query, key and value become one tensor. Its config has a LayerNorm eps of 1e-12;
    fastdino uses 1e-6, with which the weights were trained.

    Raises: CheckpointError: a block lacks its query, key or value.
    """
    bare = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
    if "embeddings.cls_token" in bare:
        return _from_hf(bare, source)
    if "cls_token" in state and "pos_embed" in state:
        return {name: tensor for name, tensor in state.items() if name not in _TIMM_HEAD}
    return state


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
        elif block and block[2] in _HF_IN_BLOCK:
            renamed[f"blocks.{block[1]}.{_HF_IN_BLOCK[block[2]]}.{block[3]}"] = tensor
        elif not name.startswith(_HF_HEADS):
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
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4 or "pos_embed" not in state:
        return None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for arch, shape in VIT_ARCHS.items():
        if (shape["embed_dim"], shape["depth"]) == (patches.shape[0], depth):
            return arch, patches.shape[-1]
    return None

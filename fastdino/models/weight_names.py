"""DINO weights under other projects' names: told by the names, brought to this project's, and back.

This project's names are the paper's (`blocks.0.attn.qkv.weight`), which timm's ViTs have too.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastdino.errors import CheckpointError
from fastdino.models.vit import VIT_ARCHS

# Hugging Face's ViTModel; the names within a block follow `encoder.layer.<N>.`, ours `blocks.<N>.`.
# One table: own_names reads it from left to right, hf_names from right to left.
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
_OWN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
# What stands above the backbone: a classifier, Hugging Face's pooler.
_HF_ABOVE = ("pooler.", "classifier.")
_TIMM_ABOVE = ("head.weight", "head.bias")


def own_names(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """A backbone's weights under this project's names.

    Args:
        state: as Hugging Face's ViTModel or ViTForImageClassification names them; or in the
            paper's names, timm's among them. A ViT's classifier and pooler are left out.
        what: the file, for messages.

    Hugging Face keeps query, key and value apart; here they are one tensor. Its config says a
    LayerNorm eps of 1e-12; it is 1e-6 here, with which the weights were trained.

    Raises: CheckpointError: a block of Hugging Face's lacks its query, key or value.
    """
    bare = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
    if "embeddings.cls_token" in bare:
        return _from_hf(bare, what)
    if "cls_token" in state and "pos_embed" in state:
        return {name: tensor for name, tensor in state.items() if name not in _TIMM_ABOVE}
    return state


def _from_hf(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_HF_ABOVE):
            continue
        block = _HF_BLOCK.fullmatch(name)
        stem, _, kind = name.rpartition(".")
        if block and block[2] in _HF_QKV:
            parts = [f"encoder.layer.{block[1]}.{part}.{block[3]}" for part in _HF_QKV]
            missing = [part for part in parts if part not in state]
            if missing:
                raise CheckpointError(f"{what}: {', '.join(missing)} is missing beside {name}")
            if block[2] == _HF_QKV[0]:
                own[f"blocks.{block[1]}.attn.qkv.{block[3]}"] = torch.cat(
                    [state[part] for part in parts]
                )
        elif block and block[2] in _HF_IN_BLOCK:
            own[f"blocks.{block[1]}.{_HF_IN_BLOCK[block[2]]}.{block[3]}"] = tensor
        elif name in _HF_OTHERS:
            own[_HF_OTHERS[name]] = tensor
        elif stem in _HF_OTHERS:
            own[f"{_HF_OTHERS[stem]}.{kind}"] = tensor
        else:  # of another model: check_shapes names it
            own[name] = tensor
    return own


def hf_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a vit_* as Hugging Face's ViTModel without a pooler names them."""
    in_block = {own: hf for hf, own in _HF_IN_BLOCK.items()}
    others = {own: hf for hf, own in _HF_OTHERS.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _OWN_BLOCK.fullmatch(name)
        stem, _, kind = name.rpartition(".")
        if block and block[2] == "attn.qkv":
            for part, rows in zip(_HF_QKV, tensor.chunk(3), strict=True):
                named[f"encoder.layer.{block[1]}.{part}.{block[3]}"] = rows.clone()
        elif block:
            named[f"encoder.layer.{block[1]}.{in_block[block[2]]}.{block[3]}"] = tensor
        elif name in others:
            named[others[name]] = tensor
        else:
            named[f"{others[stem]}.{kind}"] = tensor
    return named


def vit_of(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """The vit_* architecture and patch size whose shapes these are; None where there is none."""
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4 or "pos_embed" not in state:
        return None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for arch, shape in VIT_ARCHS.items():
        if (shape["embed_dim"], shape["depth"]) == (patches.shape[0], depth):
            return arch, patches.shape[-1]
    return None

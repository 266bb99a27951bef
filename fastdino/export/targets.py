"""What `fastdino export` writes, each target in its own library's form, and how it is read again.

Legend: B images, N tokens, H heads, D channels.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdino import checkpoint
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.models.vit import VIT_ARCHS, Attention, Block, VisionTransformer
from fastdino.models.weight_names import hf_names
from fastdino.models.weights import load_backbone

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """A backbone [B, 3, image_size, image_size] -> [B, dim], in fp32 and eval mode."""

    module: nn.Module
    arch: str
    patch_size: int
    image_size: int
    dim: int

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, contiguous and each of its own memory, as safetensors wants them."""
        state = self.module.state_dict()
        return {name: tensor.clone().contiguous() for name, tensor in state.items()}


@dataclass(frozen=True)
class Target:
    """A form of export.

    Attributes:
        write: writes a network to a path; a folder's path does not exist yet.
        read: the features of what write wrote, by the library that it is for.
        usage: Python that loads it, given the network and the path as a user will write it.
        needs: packages without which it cannot be written.
        reader: package without which it cannot be read again.
        suffixes: of the files it writes; none: it writes a folder.
        vit_only: whether it takes vit_* alone.
    """

    write: Callable[[Network, Path], None]
    read: Callable[[Network, Path], Features]
    usage: Callable[[Network, str], str]
    needs: tuple[str, ...]
    reader: str
    suffixes: tuple[str, ...]
    vit_only: bool = False


class PlainViT(nn.Module):
    """A ViT's forward for images of one size, in operators that every exporter knows.

    VisionTransformer packs crops of many sizes as one sequence whose layout is fixed when it runs;
    here the number of images stays free. Its parameters are the ViT's own.
    """

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width], of the size of the position embedding -> [B, D]."""
        patches = self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
        cls = self.vit.cls_token.expand(patches.shape[0], -1, -1)
        x = torch.cat((cls, patches), dim=1) + self.vit.pos_embed
        for block in self.vit.blocks:
            assert isinstance(block, Block)
            x = x + self._attention(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return self.vit.norm(x[:, 0])

    @staticmethod
    def _attention(attn: Attention, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return attn.proj(out.transpose(1, 2).flatten(2))


def _plain(network: Network) -> nn.Module:
    vit = network.module
    return PlainViT(vit).eval() if isinstance(vit, VisionTransformer) else vit


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what other libraries warn of: their own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _example(network: Network) -> Tensor:
    """Two images: of one, an exporter takes the number for a constant."""
    return torch.zeros(2, 3, network.image_size, network.image_size)


def timm_call(network: Network) -> tuple[str, dict[str, Any]]:
    """The model's name and arguments for timm.create_model."""
    name, arguments = f"{network.arch}_patch16_224", {"num_classes": 0}
    if network.arch == "vit_nano":  # this project's own: timm's tiny in other sizes
        name, arguments = "vit_tiny_patch16_224", arguments | VIT_ARCHS["vit_nano"]
    if network.patch_size != 16:
        arguments["patch_size"] = network.patch_size
    if network.image_size != 224:
        arguments["img_size"] = network.image_size
    return name, arguments


def _timm_usage(network: Network, path: str) -> str:
    name, arguments = timm_call(network)
    words = ", ".join([repr(name), *(f"{key}={value}" for key, value in arguments.items())])
    return (
        "import timm\n"
        "from timm.models import load_state_dict\n\n"
        f"model = timm.create_model({words}).eval()\n"
        f"model.load_state_dict(load_state_dict({path!r}))\n"
        "features = model(images)  "
    ) + _shapes(network)


def _write_timm(network: Network, path: Path) -> None:
    if path.suffix == ".safetensors":
        _write_tensors(network.tensors(), path, {"format": "pt"})
    else:
        torch.save(network.tensors(), path)


def _read_timm(network: Network, path: Path) -> Features:
    import timm

    name, arguments = timm_call(network)
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    model.load_state_dict(checkpoint.load(path))
    return model


def hf_config(network: Network) -> dict[str, Any]:
    """What config.json says of a ViTModel."""
    shape = VIT_ARCHS[network.arch]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape["embed_dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["num_heads"],
        "intermediate_size": 4 * shape["embed_dim"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": network.image_size,
        "patch_size": network.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def hf_preprocessor(network: Network) -> dict[str, Any]:
    """What preprocessor_config.json says: the paper's resize and centre crop for evaluation."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize_of(network.image_size)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": network.image_size, "width": network.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def resize_of(image_size: int) -> int:
    """The short side that images are resized to before a crop: 256 for 224, as in the paper.

    The margin is even: transformers and torchvision halve an odd one to different sides.
    """
    return image_size + 2 * round(image_size / 14)


def _hf_usage(network: Network, path: str) -> str:
    return (
        "from transformers import AutoImageProcessor, ViTModel\n\n"
        f"processor = AutoImageProcessor.from_pretrained({path!r})\n"
        f"model = ViTModel.from_pretrained({path!r}, add_pooling_layer=False).eval()\n"
        'inputs = processor(image, return_tensors="pt")\n'
        "features = model(**inputs).last_hidden_state[:, 0]  "
    ) + f"# [1, {network.dim}]"


def _write_hf(network: Network, path: Path) -> None:
    path.mkdir()
    for name, content in (
        ("config.json", hf_config(network)),
        ("preprocessor_config.json", hf_preprocessor(network)),
    ):
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    _write_tensors(hf_names(network.tensors()), path / "model.safetensors", {"format": "pt"})


@contextmanager
def _no_bar() -> Iterator[None]:
    """Leaves out transformers' bar of the weights' loading, which shows in files of logs too."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read_hf(network: Network, path: Path) -> Features:
    from transformers import ViTModel

    with _quiet(), _no_bar():
        model, found = ViTModel.from_pretrained(
            path, add_pooling_layer=False, output_loading_info=True
        )
    problems = {kind: sorted(names) for kind, names in found.items() if names}
    if problems:
        raise ValueError(f"ViTModel does not take all weights as they are: {problems}")
    model.eval()
    return lambda images: model(pixel_values=images).last_hidden_state[:, 0]


def _write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    # Not save_file, whose files the owner alone may read.
    path.write_bytes(save(tensors, metadata))


def _write_safetensors(network: Network, path: Path) -> None:
    metadata = {
        "format": "pt",
        "arch": network.arch,
        "patch_size": str(network.patch_size),
        "image_size": str(network.image_size),
    }
    _write_tensors(network.tensors(), path, metadata)


def _read_safetensors(network: Network, path: Path) -> Features:
    return load_backbone(
        str(path), checkpoint_key="teacher", arch=network.arch, patch_size=network.patch_size
    ).module


def _safetensors_usage(network: Network, path: str) -> str:
    return (
        "from fastdino.models.weights import load_backbone\n\n"
        f'model = load_backbone({path!r}, checkpoint_key="teacher", arch={network.arch!r}, '
        f"patch_size={network.patch_size}).module\n"
        "features = model(images)  "
    ) + _shapes(network)


def _write_onnx(network: Network, path: Path) -> None:
    with _quiet():
        torch.onnx.export(
            _plain(network),
            (_example(network),),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def _read_onnx(network: Network, path: Path) -> Features:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        (found,) = session.run(["features"], {"images": images.numpy()})
        return torch.from_numpy(np.asarray(found))

    return features


def _onnx_usage(network: Network, path: str) -> str:
    return (
        "import onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({path!r})\n"
        '(features,) = session.run(["features"], {"images": images})  '
    ) + _shapes(network)


def _write_torchscript(network: Network, path: Path) -> None:
    with _quiet():  # torch.jit is deprecated; what it writes is read by those who need it
        traced = torch.jit.trace(_plain(network), _example(network), check_trace=False)
        torch.jit.save(traced, path)


def _read_torchscript(network: Network, path: Path) -> Features:
    with _quiet():
        return torch.jit.load(path, map_location="cpu").eval()


def _torchscript_usage(network: Network, path: str) -> str:
    lines = f"import torch\n\nmodel = torch.jit.load({path!r})\nfeatures = model(images)  "
    return lines + _shapes(network)


def _shapes(network: Network) -> str:
    side = network.image_size
    return f"# [B, 3, {side}, {side}] -> [B, {network.dim}]"


def image_size_of(module: nn.Module, patch_size: int) -> int:
    """The side in pixels of the images that a network's position embedding is for; else 224."""
    if isinstance(module, VisionTransformer):
        return math.isqrt(module.pos_embed.shape[1] - 1) * patch_size
    return 224


TARGETS = {
    "timm": Target(
        _write_timm, _read_timm, _timm_usage,
        needs=("timm",), reader="timm", suffixes=(".safetensors", ".pth"), vit_only=True,
    ),
    "hf": Target(
        _write_hf, _read_hf, _hf_usage,
        needs=("safetensors",), reader="transformers", suffixes=(), vit_only=True,
    ),
    "safetensors": Target(
        _write_safetensors, _read_safetensors, _safetensors_usage,
        needs=("safetensors",), reader="safetensors", suffixes=(".safetensors",),
    ),
    "onnx": Target(
        _write_onnx, _read_onnx, _onnx_usage,
        needs=("onnx", "onnxscript"), reader="onnxruntime", suffixes=(".onnx",),
    ),
    "torchscript": Target(
        _write_torchscript, _read_torchscript, _torchscript_usage,
        needs=("torch",), reader="torch", suffixes=(".pt", ".pth"),
    ),
}  # fmt: skip

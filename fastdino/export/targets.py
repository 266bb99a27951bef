"""Export targets: how each library's format is written, read back and used.

Shapes: B images, N tokens, D channels.
"""

from __future__ import annotations

import json
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
from fastdino.models.weight_names import to_hf_names
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

    @property
    def is_vit(self) -> bool:
        """True for a vit_*."""
        return isinstance(self.module, VisionTransformer)

    @property
    def signature(self) -> str:
        """Input and output shapes, as a comment for usage examples."""
        return f"# [B, 3, {self.image_size}, {self.image_size}] -> [B, {self.dim}]"

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights as safetensors requires them: contiguous, without shared memory."""
        state = self.module.state_dict()
        return {name: tensor.clone().contiguous() for name, tensor in state.items()}


@dataclass(frozen=True)
class Target:
    """An export format.

    Attributes:
        write: write a network to a path; the folder of a folder format does not exist yet.
        read: load what `write` wrote with the format's own library; return the features function.
        usage: Python code that loads the export, for a network and the path to show.
        needs: packages required for writing.
        reader: package required for reading.
        suffixes: allowed file suffixes; none: the format is a folder.
        vit_only: only vit_* are supported.
    """

    write: Callable[[Network, Path], None]
    read: Callable[[Network, Path], Features]
    usage: Callable[[Network, str], str]
    needs: tuple[str, ...]
    reader: str
    suffixes: tuple[str, ...]
    vit_only: bool = False


def resize_of(image_size: int) -> int:
    """Return the short side to resize to before a centre crop: 256 for 224, as in the paper.

    The margin is even, since transformers and torchvision round half an odd one differently.
    """
    return image_size + 2 * round(image_size / 14)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence deprecation warnings of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    # save_file would create a file that only its owner can read.
    path.write_bytes(save(tensors, metadata))


# timm


def timm_call(network: Network) -> tuple[str, dict[str, Any]]:
    """Return the model name and arguments for timm.create_model."""
    name, arguments = f"{network.arch}_patch16_224", {"num_classes": 0}
    if network.arch == "vit_nano":  # not in timm: its vit_tiny with other sizes
        name, arguments = "vit_tiny_patch16_224", arguments | VIT_ARCHS["vit_nano"]
    if network.patch_size != 16:
        arguments["patch_size"] = network.patch_size
    if network.image_size != 224:
        arguments["img_size"] = network.image_size
    return name, arguments


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


def _timm_usage(network: Network, path: str) -> str:
    name, arguments = timm_call(network)
    call = ", ".join([repr(name), *(f"{key}={value}" for key, value in arguments.items())])
    return f"""\
import timm
from timm.models import load_state_dict

model = timm.create_model({call}).eval()
model.load_state_dict(load_state_dict({path!r}))
features = model(images)  {network.signature}"""


# Hugging Face


def hf_config(network: Network) -> dict[str, Any]:
    """Return the config.json of a ViTModel."""
    shape = VIT_ARCHS[network.arch]
    return {
        "architectures": ["ViTModel"], "model_type": "vit", "torch_dtype": "float32",
        "image_size": network.image_size, "patch_size": network.patch_size, "num_channels": 3,
        "hidden_size": shape["embed_dim"], "intermediate_size": 4 * shape["embed_dim"],
        "num_hidden_layers": shape["depth"], "num_attention_heads": shape["num_heads"],
        "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "initializer_range": 0.02,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def hf_preprocessor(network: Network) -> dict[str, Any]:
    """Return the preprocessor_config.json: the paper's resize and centre crop for evaluation."""
    side, bicubic = network.image_size, 3
    return {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": resize_of(side)}, "resample": bicubic,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD),
    }  # fmt: skip


def _write_hf(network: Network, path: Path) -> None:
    path.mkdir()
    files = {"config": hf_config(network), "preprocessor_config": hf_preprocessor(network)}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    _write_tensors(to_hf_names(network.tensors()), path / "model.safetensors", {"format": "pt"})


def _read_hf(network: Network, path: Path) -> Features:
    from transformers import ViTModel
    from transformers.utils import logging

    progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it is shown even if stderr is redirected
    try:
        with _no_warnings():
            model, report = ViTModel.from_pretrained(
                path, add_pooling_layer=False, output_loading_info=True
            )
    finally:
        if progress_bar:
            logging.enable_progress_bar()
    problems = {kind: sorted(names) for kind, names in report.items() if names}
    if problems:
        raise ValueError(f"ViTModel does not load all weights: {problems}")
    model.eval()
    return lambda images: model(pixel_values=images).last_hidden_state[:, 0]


def _hf_usage(network: Network, path: str) -> str:
    return f"""\
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained({path!r})
model = ViTModel.from_pretrained({path!r}, add_pooling_layer=False).eval()
inputs = processor(image, return_tensors="pt")
features = model(**inputs).last_hidden_state[:, 0]  # [1, {network.dim}]"""


# safetensors


def _write_safetensors(network: Network, path: Path) -> None:
    sizes = {"patch_size": str(network.patch_size), "image_size": str(network.image_size)}
    _write_tensors(network.tensors(), path, {"format": "pt", "arch": network.arch, **sizes})


def _read_safetensors(network: Network, path: Path) -> Features:
    sizes: dict[str, Any] = {"arch": network.arch, "patch_size": network.patch_size}
    return load_backbone(str(path), checkpoint_key="teacher", **sizes).module


def _safetensors_usage(network: Network, path: str) -> str:
    return f"""\
from fastdino.models.weights import load_backbone

model = load_backbone({path!r}, checkpoint_key="teacher", arch={network.arch!r}, \
patch_size={network.patch_size}).module
features = model(images)  {network.signature}"""


# ONNX and TorchScript


class PlainViT(nn.Module):
    """A ViT's forward pass for images of one size, in operators that all exporters support.

    VisionTransformer packs crops of several sizes into one sequence with a fixed layout; here the
    number of images is free. The parameters are shared with the ViT.
    """

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W], of the position embedding's size, to features [B, D]."""
        patches = self.vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
        cls = self.vit.cls_token.expand(patches.shape[0], -1, -1)
        x = self.vit.add_registers(torch.cat((cls, patches), dim=1) + self.vit.pos_embed)
        for block in self.vit.blocks:
            assert isinstance(block, Block)
            x = x + self._attention(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return self.vit.norm(x[:, 0])

    @staticmethod
    def _attention(attn: Attention, x: Tensor) -> Tensor:
        """Apply self-attention, [B, N, D] -> [B, N, D]."""
        query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return attn.proj(out.transpose(1, 2).flatten(2))


def _traceable(network: Network) -> tuple[nn.Module, Tensor]:
    """Return a module that exporters support, and example images.

    Two images: an exporter would treat a batch size of one as a constant.
    """
    vit = network.module
    module = PlainViT(vit).eval() if isinstance(vit, VisionTransformer) else vit
    return module, torch.zeros(2, 3, network.image_size, network.image_size)


def _write_onnx(network: Network, path: Path) -> None:
    module, images = _traceable(network)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["features"]}
    names["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    with _no_warnings():
        torch.onnx.export(module, (images,), path, external_data=False, verbose=False, **names)


def _read_onnx(network: Network, path: Path) -> Features:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        (output,) = session.run(["features"], {"images": images.numpy()})
        return torch.from_numpy(np.asarray(output))

    return features


def _onnx_usage(network: Network, path: str) -> str:
    return f"""\
import onnxruntime

session = onnxruntime.InferenceSession({path!r})
(features,) = session.run(["features"], {{"images": images}})  {network.signature}"""


def _write_torchscript(network: Network, path: Path) -> None:
    with _no_warnings():  # torch.jit is deprecated
        torch.jit.save(torch.jit.trace(*_traceable(network), check_trace=False), path)


def _read_torchscript(network: Network, path: Path) -> Features:
    with _no_warnings():
        return torch.jit.load(path, map_location="cpu").eval()


def _torchscript_usage(network: Network, path: str) -> str:
    return f"""\
import torch

model = torch.jit.load({path!r})
features = model(images)  {network.signature}"""


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

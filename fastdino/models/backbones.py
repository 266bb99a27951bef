"""Construction of backbones by architecture name, and of the student and teacher networks."""

from __future__ import annotations

import difflib
import functools

import timm
import torch
import torchvision.models
from torch import Tensor, nn

from fastdino.config import TrainConfig
from fastdino.errors import ConfigError
from fastdino.models.head import DINOHead, MultiCropWrapper
from fastdino.models.vit import VIT_ARCHS, VisionTransformer


def build_backbone(
    arch: str, *, patch_size: int = 16, drop_path_rate: float = 0.0, img_size: int = 224
) -> tuple[nn.Module, int]:
    """Build a backbone [B, 3, H, W] -> [B, D] with random weights; return it and D.

    Args:
        arch: vit_* or deit_* (synonyms), xcit_* with the names of the paper's authors or of timm,
            a torchvision model with an fc layer, or any timm model.
        patch_size, img_size: in pixels, for vit_* only.
        drop_path_rate: stochastic depth rate; ignored by architectures without it.

    Raises: ConfigError: an unknown architecture (the message suggests similar names), or one
        without a single feature vector.
    """
    vit_name = arch.replace("deit_", "vit_", 1) if arch.startswith("deit_") else arch
    if vit_name in VIT_ARCHS:
        vit = VisionTransformer(
            patch_size=patch_size,
            drop_path_rate=drop_path_rate,
            img_size=img_size,
            **VIT_ARCHS[vit_name],
        )
        return vit, vit.embed_dim
    if arch in _torchvision_archs():
        model = torchvision.models.get_model(arch, weights=None)
        if isinstance(getattr(model, "fc", None), nn.Linear) and not hasattr(model, "aux_logits"):
            width = model.fc.in_features
            model.fc = nn.Identity()
            return model, width
    timm_name = f"{arch}_224" if timm.is_model(f"{arch}_224") and arch.startswith("xcit") else arch
    if timm.is_model(timm_name):
        return _build_timm(timm_name, drop_path_rate)
    if arch in _torchvision_archs():
        raise ConfigError(f"--arch {arch}: the torchvision model does not end in one fc layer")
    raise ConfigError(f"unknown --arch {arch!r}{_suggestion(arch)}")


@functools.cache
def _torchvision_archs() -> frozenset[str]:
    return frozenset(torchvision.models.list_models(module=torchvision.models))


def _suggestion(name: str) -> str:
    """Return the end of an error message, with similar architecture names."""
    names = [*VIT_ARCHS, *_torchvision_archs(), *timm.list_models()]
    near = difflib.get_close_matches(name, names, n=3)
    return (
        f"; did you mean {', '.join(near)}?" if near else f"; expected {', '.join(VIT_ARCHS)}, ..."
    )


def _build_timm(name: str, drop_path_rate: float) -> tuple[nn.Module, int]:
    """Build a timm model without its classifier, for images of any size if it supports that."""
    any_size = [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]
    rates = [{"drop_path_rate": drop_path_rate}, {}] if drop_path_rate else [{}]
    for rate in rates:
        for options in any_size:
            try:
                model = timm.create_model(name, pretrained=False, num_classes=0, **options, **rate)
            except TypeError:  # this model has no such argument
                continue
            width = getattr(model, "head_hidden_size", None) or model.num_features
            return model, int(width)
    raise ConfigError(f"--arch {name}: timm cannot build it without a classifier")


@torch.no_grad()
def feature_shape(backbone: nn.Module, size: int, problem: str) -> torch.Size:
    """Return the shape of the features of one image of `size` px.

    Raises: ConfigError: `problem` and the backbone's error, if it does not accept such an image.
    """
    image = torch.zeros(1, 3, size, size, dtype=next(backbone.parameters()).dtype)
    try:
        features: Tensor = backbone(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{problem}: {error}") from error
    return features.shape


def build_networks(config: TrainConfig) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Build student and teacher on the CPU, with equal weights; the teacher has no gradients.

    Raises: ConfigError: the architecture is unknown or does not support these crop sizes.
    """
    networks = []
    for drop_path_rate, norm_last_layer in (
        (config.drop_path_rate, config.norm_last_layer),
        (0, True),
    ):
        backbone, width = build_backbone(
            config.arch,
            patch_size=config.patch_size,
            drop_path_rate=drop_path_rate,
            img_size=config.global_crops_size,
        )
        head = DINOHead(width, config.out_dim, config.use_bn_in_head, norm_last_layer)
        networks.append(MultiCropWrapper(backbone, head))
    student, teacher = networks
    _check_crop_sizes(student, config)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def _check_crop_sizes(network: MultiCropWrapper, config: TrainConfig) -> None:
    """Raise ConfigError unless the backbone maps an image of each crop size to one vector."""
    sizes = {config.global_crops_size}
    if config.local_crops_number:
        sizes.add(config.local_crops_size)
    was_training = network.training
    network.eval()
    for size in sorted(sizes):
        problem = f"--arch {config.arch} does not support {size} px crops"
        shape = feature_shape(network.backbone, size, problem)
        if shape != (1, network.head.in_dim):
            raise ConfigError(
                f"--arch {config.arch} returns {tuple(shape)} for one image, "
                f"expected one vector of {network.head.in_dim}"
            )
    network.train(was_training)


def has_batch_norm(network: nn.Module) -> bool:
    """Return True if a layer normalizes over the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())

"""Construction of backbones by architecture name, and of the student and teacher networks."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterator

import timm
import torch
import torchvision.models
from torch import Tensor, nn

from fastdino import distributed
from fastdino.config import TrainConfig
from fastdino.errors import ConfigError
from fastdino.models.batch_norm import is_batch_norm
from fastdino.models.head import DINOHead, MultiCropWrapper
from fastdino.models.vit import VIT_ARCHS, VisionTransformer


def build_backbone(
    arch: str,
    *,
    patch_size: int = 16,
    drop_path_rate: float = 0.0,
    img_size: int = 224,
    registers: int = 0,
) -> tuple[nn.Module, int]:
    """Build a backbone [B, 3, H, W] -> [B, D] with random weights; return it and D.

    Args:
        arch: vit_* or deit_* (synonyms), xcit_* with the names of the paper's authors or of timm,
            a torchvision model with an fc layer, or any timm model.
        patch_size, img_size: in pixels, for vit_* only.
        registers: number of registers of a vit_*, as DINOv2's; 0 in the paper.
        drop_path_rate: stochastic depth rate; ignored by architectures without it.

    Raises: ConfigError: an unknown architecture (the message suggests similar names), or one
        without a single feature vector.
    """
    vit_name = arch.replace("deit_", "vit_", 1) if arch.startswith("deit_") else arch
    if is_vit(arch):
        vit = VisionTransformer(
            patch_size=patch_size,
            drop_path_rate=drop_path_rate,
            img_size=img_size,
            registers=registers,
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


def is_vit(arch: str) -> bool:
    """Return True for vit_* and deit_*, which are built as a VisionTransformer."""
    return arch in VIT_ARCHS or arch.replace("deit_", "vit_", 1) in VIT_ARCHS


def is_known_arch(arch: str) -> bool:
    """Return True for a name of this package, torchvision or timm."""
    return is_vit(arch) or arch in _torchvision_archs() or timm.is_model(arch)


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
    """Raise ConfigError unless the backbone maps an image of each crop size to one vector.

    Each batch norm must also see more than one value per channel.
    """
    crops = {"global": 2, "local": config.local_crops_number}
    was_training = network.training
    network.eval()
    for kind, number in crops.items():
        flag = f"--{kind}_crops_size"
        size = getattr(config, flag[2:])
        if number == 0:
            continue
        with _batch_norm_inputs(network.backbone) as values:
            try:
                shape = feature_shape(network.backbone, size, "")
            except ConfigError as error:
                hint = _working_size(network.backbone, size)
                use = f"; use {flag} {hint}" if hint else ""
                raise ConfigError(
                    f"--arch {config.arch} does not support {size} px crops{use}{error}"
                ) from error
        if shape != (1, network.head.in_dim):
            raise ConfigError(
                f"--arch {config.arch} returns {tuple(shape)} for one image, "
                f"expected one vector of {network.head.in_dim}"
            )
        # The two networks process crops of one size together.
        same_size = config.global_crops_size == config.local_crops_size
        together = sum(crops.values()) if same_size else number
        world_size = distributed.world_size()
        images = together * config.split_batch(world_size).images * world_size  # of SyncBN
        if min(values, default=2) * images == 1:
            raise ConfigError(
                f"a batch norm of --arch {config.arch} would see one value per channel: "
                f"{number} {kind} crop of {size} px; raise --batch_size_per_gpu or {flag}"
            )
    network.train(was_training)


@contextlib.contextmanager
def _batch_norm_inputs(module: nn.Module) -> Iterator[list[int]]:
    """Collect the number of values per channel that each batch norm sees."""
    values: list[int] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values.append(inputs[0].numel() // inputs[0].shape[1])

    layers = [layer for layer in module.modules() if is_batch_norm(layer)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


def _working_size(backbone: nn.Module, size: int) -> int | None:
    """Return the closest size in pixels that the backbone accepts, of those that are usual."""
    fixed = getattr(backbone, "pretrained_cfg", {}).get("input_size", ())[1:]  # timm's
    multiples = {max(1, round(size / step)) * step for step in (8, 14, 16, 32)}
    for candidate in sorted({*multiples, *fixed}, key=lambda candidate: abs(candidate - size)):
        with contextlib.suppress(ConfigError):
            feature_shape(backbone, candidate, "")
            return int(candidate)
    return None

"""What evaluations share: the network, the two splits, the images as tensors, their features.

Legend: N images, D channels.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.functional import normalize, to_tensor
from tqdm import tqdm

from fastdino import distributed
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data import scan_images
from fastdino.data.image_dataset import ImageDataset
from fastdino.environment import cpu_count
from fastdino.errors import ConfigError, DataError
from fastdino.models.vit import VIT_ARCHS, VisionTransformer
from fastdino.models.weights import load_backbone

PATH_HELP = "folder with train/ and val/, or torchvision:NAME, hf:NAME, hf:FOLDER"
UNREADABLE = -1  # the label of an image whose header was good and whose pixels are not


class Images(Dataset[tuple[Tensor, int]]):
    """The images of a source, transformed, with their labels."""

    def __init__(self, source: ImageDataset, transform: Callable[[Image.Image], Tensor]):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image and its label; any image and UNREADABLE where it cannot be decoded."""
        try:
            image = self.source.read_rgb(index)
        except Exception:  # Pillow's plugins raise all kinds on broken files.
            return self.transform(Image.new("RGB", (1, 1))), UNREADABLE
        return self.transform(image), int(self.source.labels[index])


def to_input(picture: Image.Image) -> Tensor:
    """RGB -> fp32 [3, height, width], less ImageNet's mean, over its std; the paper's to the bit.

    (It divides by 255. torchvision's v2.ToDtype multiplies by 1/255, which rounds otherwise.)
    """
    return normalize(to_tensor(picture), MEAN, STD)


def eval_transform(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """The paper's: short side to `resize` (bicubic), centre crop, ImageNet mean and std."""
    return v2.Compose(
        [
            v2.Resize(resize, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(crop),
            to_input,
        ]
    )


@torch.no_grad()
def extract_features(
    model: Callable[[Tensor], Tensor],
    source: ImageDataset,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    title: str = "",
) -> tuple[Tensor, Tensor]:
    """L2-normalised features [N, D] and labels [N] of all images, on the CPU, in order.

    Images that cannot be decoded have no row. In a run of many processes each computes a share,
    and every one gets the whole.
    """
    images: Dataset[tuple[Tensor, int]] = Images(source, transform)
    share = range(distributed.rank(), len(source), distributed.world_size())
    loader = DataLoader(
        torch.utils.data.Subset(images, share),
        batch_size=batch_size,
        num_workers=min(workers, cpu_count()),
        pin_memory=device.type == "cuda",
    )
    features: Tensor | None = None
    labels = torch.zeros(len(source), dtype=torch.long)
    done = 0
    for batch, batch_labels in tqdm(loader, desc=title, disable=not sys.stderr.isatty()):
        rows = share[done : done + len(batch)]
        out = F.normalize(model(batch.to(device)).float(), dim=1).cpu()
        if features is None:
            features = torch.zeros(len(source), out.shape[1])
        features[rows] = out
        labels[rows] = batch_labels
        done += len(batch)
    if distributed.world_size() > 1:
        widths = distributed.gather(0 if features is None else features.shape[1])
        if features is None:  # more processes than images: this one had none
            features = torch.zeros(len(source), max(widths))
    assert features is not None
    features, labels = distributed.total(features), distributed.total(labels)
    good = labels != UNREADABLE
    return features[good], labels[good]


def add_network_flags(
    parser: argparse.ArgumentParser,
    arch: str = "architecture",
    *,
    default: tuple[str, int] = ("vit_small", 16),
) -> None:
    """The flags of the paper's evaluations that say which network, and where it computes.

    Args:
        arch: what --arch may be.
        default: the paper's script's architecture and patch size; a checkpoint knows its own.
    """
    add = parser.add_argument
    parser.set_defaults(default_network=default)
    says = "default: what the checkpoint says, else"
    add("--arch", help=f"{arch} ({says} {default[0]})")
    add("--patch_size", type=int, help=f"patch size ({says} {default[1]})")
    about = "file, URL or name (dino_vits16, ...); without it the network is untrained"
    add("--pretrained_weights", default="", help=about)
    add("--checkpoint_key", default="teacher", help="which network of the checkpoint (teacher)")
    add("--seed", type=int, default=0, help="of what is drawn, an untrained network's weights (0)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Those of an evaluation that loads images in workers, in one process or many."""
    add = parser.add_argument
    add("--num_workers", type=int, default=10, help="data loading workers, at most (10)")
    add("--dist_url", default="env://", help="how the processes find each other")
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def load_vit(
    args: argparse.Namespace, device: torch.device, *, lacks: str
) -> tuple[VisionTransformer, str]:
    """The ViT of add_network_flags' flags, in eval mode on the device, and its architecture.

    Args:
        lacks: what networks of other kinds do not give, for the message.

    Raises: ConfigError: it is no ViT of ours. CheckpointError: see load_backbone.
    """
    torch.manual_seed(args.seed)
    backbone = load_backbone(
        args.pretrained_weights,
        checkpoint_key=args.checkpoint_key,
        arch=args.arch,
        patch_size=args.patch_size,
        default=args.default_network,
    )
    if not isinstance(backbone.module, VisionTransformer):
        raise ConfigError(f"--arch {backbone.arch} {lacks}: expected one of {', '.join(VIT_ARCHS)}")
    return backbone.module.to(device), backbone.arch


@distributed.together()
def build_model(
    args: argparse.Namespace, device: torch.device, *, size_flag: str = "crop"
) -> torch.nn.Module:
    """The network of the flags, on the device.

    Args:
        size_flag: which of the flags has the side of the images.

    Raises: ConfigError: it cannot take images of that side.
    """
    torch.manual_seed(args.seed)
    side = getattr(args, size_flag)
    backbone = load_backbone(
        args.pretrained_weights,
        checkpoint_key=args.checkpoint_key,
        arch=args.arch,
        patch_size=args.patch_size,
        img_size=side,
        default=args.default_network,
    )
    try:
        with torch.no_grad():
            backbone.module(torch.zeros(1, 3, side, side))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"--arch {backbone.arch} cannot take --{size_flag} {side} px images: {error}"
        ) from error
    return backbone.module.to(device)


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of the names and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(
    args: argparse.Namespace, model: torch.nn.Module | None, *flags: str
) -> dict[str, Any]:
    """What an evaluation's figures depend on, for its JSON: flags, and the weights' digest.

    model: None where there is none.
    """
    names = ("pretrained_weights", "checkpoint_key", *flags)
    return {
        **{name: getattr(args, name) for name in names},
        "weights": None if model is None else weights_digest(model),
    }


def scan_splits(
    args: argparse.Namespace, splits: tuple[str, ...] = ("train", "val")
) -> dict[str, ImageDataset]:
    """The images of train/ and val/, or of a set's two splits.

    Raises: DataError: their classes differ.
    """
    sources = {
        # A bad file is left out and counted; only a folder without any image ends the evaluation.
        split: scan_images(args.data_path, role=split, max_bad_share=1.0, workers=args.num_workers)
        for split in splits
    }
    classes = sources[splits[0]].classes, sources[splits[-1]].classes
    if classes[0] != classes[1]:
        raise DataError(
            f"train/ and val/ of {args.data_path} must have the same class folders; "
            f"only one has {sorted(set(classes[0]) ^ set(classes[1]))[:5]}"
        )
    return sources

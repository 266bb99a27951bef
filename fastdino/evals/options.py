"""Options shared by the evaluation commands, and the network and datasets that they select."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdino import distributed
from fastdino.config import check_at_least, parse_bool, user_path
from fastdino.data import scan_images
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import Conversion
from fastdino.data.rgb_conversion import IMAGE_RANGES, deep_warning
from fastdino.errors import ConfigError, DataError
from fastdino.files import explain_write_errors, file_lock, write_json
from fastdino.models.backbones import feature_shape
from fastdino.models.vit import VIT_ARCHS, VisionTransformer
from fastdino.models.weights import Backbone, load_backbone
from fastdino.runtime import choose_device
from fastdino.terminal import print_err, print_out

SPLITS_HELP = "folder with train/ and val/, or torchvision:NAME, hf:NAME, hf:FOLDER"
DEFAULT = "(default: %(default)s)"


def add_network_flags(
    parser: argparse.ArgumentParser,
    arch_help: str = "architecture",
    *,
    default: tuple[str, int] = ("vit_small", 16),
) -> None:
    """Add the flags that select the network and the device.

    Args:
        arch_help: help text of --arch.
        default: architecture and patch size of the paper's script, used unless the checkpoint
            records its own.
    """
    parser.set_defaults(default_network=default)
    add = parser.add_argument_group("network").add_argument
    recorded = "default: from the checkpoint, else"
    add("--arch", help=f"{arch_help} ({recorded} {default[0]})")
    add("--patch_size", type=int, help=f"patch size in pixels ({recorded} {default[1]})")
    about = "checkpoint file, URL, or released name such as dino_vits16 (default: untrained)"
    add("--pretrained_weights", type=user_path, default="", help=about)
    about = f"network to read from a checkpoint: teacher or student {DEFAULT}"
    add("--checkpoint_key", default="teacher", help=about)
    add("--seed", type=int, default=0, help=f"random seed {DEFAULT}")
    about = f"device to compute on {DEFAULT}"
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help=about)


def add_conversion_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, exif: bool = True
) -> None:
    """Add the flags for the conversion of images to RGB; `load_vit` and others resolve them.

    exif: False for images with masks or boxes, which belong to the stored pixels.
    """
    default = "(default: as the checkpoint's training did)"
    if exif:
        about = f"apply the EXIF orientation of images {default}"
        parser.add_argument("--exif_orientation", type=parse_bool, metavar="BOOL", help=about)
    about = f"16-bit and float images: clip values to 0..255, or scale their range to it {default}"
    parser.add_argument("--image_range", choices=IMAGE_RANGES, help=about)


def conversion_of(args: argparse.Namespace) -> Conversion:
    """Return the conversion of the flags, once a checkpoint has resolved them."""
    exif = getattr(args, "exif_orientation", None) or False
    return Conversion(exif, getattr(args, "image_range", None) or IMAGE_RANGES[0])


def warn_of_deep(args: argparse.Namespace, deep: int, total: int) -> None:
    """Warn on rank 0 of images that --image_range clip makes white or black.

    deep: number of the `total` images with one channel of more than 8 bits.
    """
    warning = deep_warning(deep, total, conversion_of(args).image_range)
    if warning:
        print_on_main(f"warning: {warning}", stderr=True)


def add_process_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags for data loading workers and distributed runs; return their group."""
    group = parser.add_argument_group("data loading and processes")
    add = group.add_argument
    add("--num_workers", type=int, default=10, help=f"maximum data loading workers {DEFAULT}")
    add("--dist_url", default="env://", help=f"rendezvous URL of a distributed run {DEFAULT}")
    about = f"minutes after which a rank that does not answer ends a distributed run {DEFAULT}"
    default = distributed.TIMEOUT_MINUTES
    add("--dist_timeout_minutes", type=float, metavar="X", default=default, help=about)
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return group


def add_extraction_flags(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add the flags of a command that extracts features, compares them and reports scores."""
    add = add_process_flags(parser).add_argument
    about = f"images per forward pass {DEFAULT}"
    add("--batch_size_per_gpu", type=int, default=batch_size, help=about)
    about = f"compare features on the GPU, if there is one {DEFAULT}"
    add("--use_cuda", type=parse_bool, default=True, metavar="BOOL", help=about)
    add(
        "--output",
        type=user_path,
        metavar="JSON",
        help="write the scores and settings to this file",
    )


def check_extraction_flags(args: argparse.Namespace, *sizes: str) -> None:
    """Raise ConfigError unless the flags of add_extraction_flags and `sizes` are in range."""
    check_at_least(args, 1, *sizes, "batch_size_per_gpu", "patch_size")
    check_at_least(args, 0, "num_workers")


def comparison_device(args: argparse.Namespace, device: torch.device) -> torch.device:
    """Return the device on which to compare features."""
    return device if args.use_cuda else torch.device("cpu")


def write_scores(
    args: argparse.Namespace,
    model: torch.nn.Module | None,
    flags: tuple[str, ...],
    scores: dict[str, Any],
) -> None:
    """Write the scores, after their `settings`, to the JSON file of --output, if it is given."""
    if args.output:
        write_json({"settings": settings_of(args, model, *flags), **scores}, Path(args.output))


@contextmanager
def join_ranks(args: argparse.Namespace) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if any; yield the device of this rank."""
    device = choose_device(args.device)
    with distributed.process_group(device, args.dist_url, args.dist_timeout_minutes):
        yield device


@contextmanager
def lock_output(folder: Path, command: str, flag: str = "--output_dir") -> Iterator[None]:
    """Create an output folder, which one run of a command at a time may write to.

    flag: the one that selects the folder, for the message.

    Raises: ConfigError: another run of the command writes there. CheckpointError: it cannot be
        written.
    """
    with ExitStack() as stack:
        distributed.from_main(lambda: _lock_folder(folder, command, flag, stack))
        yield


def _lock_folder(folder: Path, command: str, flag: str, stack: ExitStack) -> None:
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(file_lock(folder / f".{command}.lock", wait=False))
        except BlockingIOError:
            raise ConfigError(
                f"{flag} {folder}: another `fastdino {command}` is writing there; use another one"
            ) from None


def print_on_main(text: str, *, stderr: bool = False) -> None:
    """Print a line on rank 0."""
    if distributed.rank() == 0:
        (print_err if stderr else print_out)(text)


def load_vit(
    args: argparse.Namespace, device: torch.device, *, reason: str
) -> tuple[VisionTransformer, str]:
    """Load the ViT of the network flags in eval mode; return it and its architecture.

    Args:
        reason: why other networks are not supported, for the message: "gives no ...".

    Raises: ConfigError: the network is no vit_*. CheckpointError: see load_backbone.
    """
    backbone = load_frozen(args)
    if not isinstance(backbone.module, VisionTransformer):
        raise ConfigError(
            f"--arch {backbone.arch} {reason}: expected one of {', '.join(VIT_ARCHS)}"
        )
    return backbone.module.to(device), backbone.arch


def load_network(
    args: argparse.Namespace, device: torch.device, *, size_flag: str = "crop"
) -> torch.nn.Module:
    """Return the network of `load_sized`."""
    return load_sized(args, device, size_flag=size_flag).module


@distributed.fail_together()
def load_sized(
    args: argparse.Namespace, device: torch.device, *, size_flag: str = "crop"
) -> Backbone:
    """Load the network of the network flags in eval mode, for square images of one size.

    Args:
        size_flag: name of the flag that holds the side of the input images.

    Raises: ConfigError: the network does not accept images of that size.
    """
    side = getattr(args, size_flag)
    backbone = load_frozen(args, img_size=side)
    problem = f"--arch {backbone.arch} cannot take --{size_flag} {side} px images"
    feature_shape(backbone.module, side, problem)
    backbone.module.to(device)
    return backbone


def load_frozen(args: argparse.Namespace, **options: Any) -> Backbone:
    """Load the network of the network flags in eval mode, on the CPU.

    It also resolves the flags of the conversion to RGB, which default to those of its training.

    Args:
        options: of load_backbone.
    """
    torch.manual_seed(args.seed)
    backbone = load_backbone(
        args.pretrained_weights,
        checkpoint_key=args.checkpoint_key,
        arch=args.arch,
        patch_size=args.patch_size,
        default=args.default_network,
        **options,
    )
    if getattr(args, "exif_orientation", True) is None:
        args.exif_orientation = bool(backbone.args.get("exif_orientation", False))
    if getattr(args, "image_range", "") is None:
        recorded = backbone.args.get("image_range")
        args.image_range = recorded if recorded in IMAGE_RANGES else IMAGE_RANGES[0]
    return backbone


def weights_digest(model: torch.nn.Module) -> str:
    """Return a hash of the names and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(
    args: argparse.Namespace, model: torch.nn.Module | None, *flags: str
) -> dict[str, Any]:
    """Return the `settings` of a JSON report: flags that affect the scores, and a weights hash.

    Args:
        model: None if the scores use no network.
        flags: names of flags in addition to the weights'.
    """
    names = ("pretrained_weights", "checkpoint_key", *flags)
    optional = ("exif_orientation", "image_range")
    own = {name: getattr(args, name) for name in optional if getattr(args, name, None) is not None}
    return {
        **{name: getattr(args, name) for name in names},
        **own,
        "weights": None if model is None else weights_digest(model),
    }


def scan_splits(
    args: argparse.Namespace, splits: tuple[str, ...] = ("train", "val")
) -> dict[str, ImageDataset]:
    """Scan the training and validation split of --data_path; see `scan_labelled`."""
    return scan_labelled(
        args.data_path, splits, workers=args.num_workers, conversion=conversion_of(args)
    )


def scan_labelled(
    data_path: str,
    splits: tuple[str, ...] = ("train", "val"),
    *,
    workers: int,
    conversion: Conversion,
    caches: Mapping[str, Path] | None = None,
) -> dict[str, ImageDataset]:
    """Scan the training and validation split of a labelled dataset; print notes and warnings.

    Unreadable images are left out; a split without any readable image is an error.

    Args:
        caches: for each split the `cache` of scan_images; None for no caches.

    Raises: DataError: nothing to read, or the splits have different classes.
    """
    sources = {
        split: scan_images(
            data_path,
            role=split,
            max_bad_share=1.0,
            workers=workers,
            conversion=conversion,
            cache=caches[split] if caches else None,
        )
        for split in splits
    }
    for split, source in sources.items():
        for note in source.notes:
            print_err(f"{split}: {note}")
        if source.warning:
            print_err(f"warning: {split}: {source.warning}")
    first, last = sources[splits[0]].classes, sources[splits[-1]].classes
    if first != last:
        raise DataError(
            f"train/ and val/ of {data_path} must have the same class folders; "
            f"only one has {sorted(set(first) ^ set(last))[:5]}"
        )
    return sources

"""`fastdino embed`: features of a dataset by a frozen network, in one file.

The images are divided into parts, which the ranks share and write next to the file. Rank 0 then
joins them. A stopped or killed run continues from the finished parts, and its file has the bits of
an uninterrupted one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastdino import distributed
from fastdino.config import check_at_least, user_path
from fastdino.data import scan_images
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.workers import SteadyLoader
from fastdino.environment import cpu_count
from fastdino.errors import CheckpointError, ConfigError, DataError
from fastdino.evals import options
from fastdino.evals.feature_cache import cache_key
from fastdino.evals.feature_files import (
    SUFFIXES,
    FeatureTable,
    check_path,
    name_texts,
    read_metadata,
    write_features,
)
from fastdino.evals.feature_parts import FeatureParts
from fastdino.evals.features import Batch, ImageInputs, collate_usable
from fastdino.evals.options import DEFAULT, print_on_main
from fastdino.evals.token_features import TOKENS, TokenFeatures, has_patches, patch_size_of
from fastdino.evals.transforms import center_crop
from fastdino.models.weights import Backbone
from fastdino.signals import EXIT_INTERRUPTED, StopSignals
from fastdino.terminal import print_err

FORMAT = "fastdino features 1"
DTYPES = {"fp32": "<f4", "fp16": "<f2"}
# The flags that the features depend on, besides network, images and conversion.
SETTINGS = ("tokens", "n_last_blocks", "dtype", "resize", "crop", "batch_size_per_gpu")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino embed`."""
    options.add_network_flags(parser)
    options.add_conversion_flags(parser)
    add = options.add_process_flags(parser).add_argument
    add("--batch_size_per_gpu", type=int, default=128, help=f"images per forward pass {DEFAULT}")
    add = parser.add_argument_group("images").add_argument
    about = (
        "dataset, as `fastdino train` reads it: folder, archives, list, hf:NAME, torchvision:NAME"
    )
    add("--data_path", type=user_path, required=True, help=about)
    add("--resize", type=int, default=256, help=f"resize the short side to this, in px {DEFAULT}")
    add("--crop", type=int, default=224, help=f"side of the centre crop, in px {DEFAULT}")
    add = parser.add_argument_group("features").add_argument
    about = "CLS token, mean of the patch tokens, and each patch token (default: cls)"
    add("--tokens", nargs="+", choices=TOKENS, default=["cls"], help=about)
    about = f"concatenate the tokens of this many last blocks {DEFAULT}"
    add("--n_last_blocks", type=int, default=1, help=about)
    about = f"type of the stored features {DEFAULT}"
    add("--dtype", choices=DTYPES, default="fp32", help=about)
    about = f"file to write, which ends in {', '.join(SUFFIXES)}"
    add("--output", type=user_path, required=True, metavar="FILE", help=about)
    about = "replace an existing file, and the parts of a run with other settings"
    add("--overwrite", action="store_true", help=about)


@dataclass
class Extraction:
    """The computation of the parts that are not finished, as this rank sees it.

    Attributes:
        remaining: the parts that are not finished on any rank.
    """

    features: TokenFeatures
    images: ImageDataset
    parts: FeatureParts
    remaining: list[int]
    device: torch.device
    args: argparse.Namespace
    rows: dict[str, list[NDArray[np.floating]]] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def run(self, signals: StopSignals) -> bool:
        """Compute and write this rank's parts; return False if a signal stopped all ranks."""
        rank, world = distributed.rank(), distributed.world_size()
        shares = [self._schedule(self.remaining[i::world]) for i in range(world)]
        loader = SteadyLoader(
            ImageInputs(self.images, center_crop(self.args.resize, self.args.crop), min_side=1),
            batch_sampler=[list(batch) for _, batch, _ in shares[rank]],
            collate_fn=collate_usable,
            num_workers=min(self.args.num_workers, cpu_count()),
            pin_memory=self.device.type == "cuda",
        )
        # The same number of steps on every rank, because they exchange signals.
        steps = range(max(map(len, shares)))
        total = sum(self.parts.images_in(part) for part in self.remaining)
        bar = tqdm(
            total=total, unit="image", disable=rank > 0 or not sys.stderr.isatty(), desc="embed"
        )
        with bar:
            for step, batch in zip_longest(steps, loader):
                if batch is not None:
                    part, _, is_last = shares[rank][step]
                    self._add(batch)
                    if is_last:
                        self._write(part)
                bar.update(sum(len(share[step][1]) for share in shares if step < len(share)))
                if signals.should_stop_after_step() and step + 1 < len(steps):
                    return False
        return True

    def _schedule(self, parts: list[int]) -> list[tuple[int, range, bool]]:
        """Return part, images, and if they are the part's last, of each batch of these parts."""
        schedule = []
        for part in parts:
            *batches, last = self.parts.batches(part)
            schedule += [(part, batch, False) for batch in batches] + [(part, last, True)]
        return schedule

    def _add(self, batch: Batch) -> None:
        """Add the features of a batch to the current part.

        Raises: ConfigError: they do not fit in the dtype.
        """
        usable, inputs, reasons = batch
        self.reasons |= reasons
        if inputs is None:
            return
        for name, values in self.features(inputs.to(self.device)).items():
            self.rows.setdefault(name, []).append(self._stored(values))
        self.indices += usable

    def _stored(self, values: Tensor) -> NDArray[np.floating]:
        array = values.float().cpu().numpy()
        with np.errstate(over="ignore"):
            stored = array.astype(self.parts.dtype)
        if not np.isfinite(stored).all():
            if np.isfinite(array).all():
                largest = f"{float(abs(array).max()):.3g}"
                raise ConfigError(f"--dtype fp16 holds at most 65504, got {largest}: use fp32")
            raise CheckpointError(
                "the network gives features that are not finite: check its weights"
            )
        return stored

    def _write(self, part: int) -> None:
        empty = {
            name: np.empty((0, *shape), self.parts.dtype)
            for name, shape in self.parts.shapes.items()
        }
        arrays = {name: np.concatenate(rows) for name, rows in self.rows.items()}
        self.parts.write(part, empty | arrays, np.array(self.indices, np.int64), self.reasons)
        self.rows, self.indices, self.reasons = {}, [], {}


def main(args: argparse.Namespace) -> int:
    """Run `fastdino embed`."""
    check_at_least(args, 1, "resize", "crop", "batch_size_per_gpu", "patch_size", "n_last_blocks")
    check_at_least(args, 0, "num_workers")
    args.tokens = [token for token in TOKENS if token in args.tokens]
    path = Path(args.output)
    check_path(path)
    with options.join_ranks(args) as device:
        backbone = options.load_sized(args, device)
        with distributed.fail_together():
            features = TokenFeatures(backbone, args.tokens, args.n_last_blocks)
        images = distributed.from_main(lambda: _scan(args))
        _warn_of_crop(args, backbone)
        blank = torch.zeros(1, 3, args.crop, args.crop, device=device)
        shapes = {name: tuple(values.shape[1:]) for name, values in features(blank).items()}
        metadata = _metadata(args, backbone, images, shapes)
        key = distributed.from_main(lambda: _key(args, backbone, images, device))
        if not args.overwrite and distributed.from_main(lambda: _is_complete(path, key)):
            print_on_main(f"{path} has these features already; --overwrite computes them again")
            return 0
        dtype = np.dtype(DTYPES[args.dtype])
        folder = path.with_name(path.name + ".parts")
        parts = FeatureParts(folder, key, shapes, dtype, len(images), args.batch_size_per_gpu)
        with options.lock_output(folder, "embed", "--output"):
            remaining = distributed.from_main(lambda: parts.open(overwrite=args.overwrite))
            _announce(args, backbone, parts, remaining, device)
            with StopSignals() as signals:
                extraction = Extraction(features, images, parts, remaining, device, args)
                if not extraction.run(signals):
                    print_on_main(
                        f"stopped by {signals.received}; finished parts are kept in {folder}: run "
                        "the same command to continue"
                    )
                    return EXIT_INTERRUPTED
            distributed.gather(None)  # wait until all parts are on disk
            distributed.from_main(lambda: _join(path, parts, images, metadata | {"key": key}))
    return 0


def _scan(args: argparse.Namespace) -> ImageDataset:
    """List the images of --data_path; unreadable ones are left out."""
    images = scan_images(
        args.data_path,
        max_bad_share=1.0,
        workers=args.num_workers,
        conversion=options.conversion_of(args),
    )
    print_err(*images.notes)
    if images.warning:
        print_err(f"warning: {images.warning}")
    return images


def _warn_of_crop(args: argparse.Namespace, backbone: Backbone) -> None:
    """Report what happens to a crop off the grid of patches."""
    if not has_patches(backbone.module):
        return
    patch_size = patch_size_of(backbone)
    if args.crop % patch_size:
        side = args.crop - args.crop % patch_size
        print_on_main(
            f"--crop {args.crop} is no multiple of the patch size {patch_size}: the network sees "
            f"the upper left {side} x {side} px",
            stderr=True,
        )


def _key(
    args: argparse.Namespace, backbone: Backbone, images: ImageDataset, device: torch.device
) -> str:
    """Return a hash of all that the features, names and labels depend on."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    labels, classes = images.known_labels()
    settings |= {"arch": backbone.arch, "device": device.type, "classes": classes}
    settings["labels"] = sha256(labels.tobytes()).hexdigest()
    return cache_key(backbone.module, images, {"format": FORMAT, **settings})


def _metadata(
    args: argparse.Namespace,
    backbone: Backbone,
    images: ImageDataset,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    settings = options.settings_of(args, backbone.module, "data_path", *SETTINGS)
    patch_size = patch_size_of(backbone) if has_patches(backbone.module) else None
    return {
        "format": FORMAT,
        "settings": settings | {"arch": backbone.arch, "patch_size": patch_size},
        "classes": images.known_labels()[1],
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }


def _is_complete(path: Path, key: str) -> bool:
    """Return True if the file has the features of this key.

    Raises: ConfigError: the file exists and has others.
    """
    if not path.exists():
        return False
    try:
        found = read_metadata(path).get("key")
    except CheckpointError:
        found = None
    if found != key:
        raise ConfigError(
            f"--output {path} exists and is of other weights, images or settings: use another "
            "path, or --overwrite"
        )
    return True


def _announce(
    args: argparse.Namespace,
    backbone: Backbone,
    parts: FeatureParts,
    remaining: list[int],
    device: torch.device,
) -> None:
    """Print what will be computed, and how much of it is there."""
    tokens = ", ".join(f"{name} {'x'.join(map(str, n))}" for name, n in parts.shapes.items())
    size = parts.images * parts.bytes_per_image
    shown = f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
    print_on_main(
        f"{parts.images} images by {backbone.arch} ({args.pretrained_weights or 'untrained'}) on "
        f"{device}, {distributed.world_size()} process(es): {tokens} {args.dtype} per image, "
        f"{shown} in all"
    )
    if done := len(parts) - len(remaining):
        print_on_main(f"resumed {parts.folder}: {done} of {len(parts)} parts are done")


def _join(path: Path, parts: FeatureParts, images: ImageDataset, metadata: dict[str, Any]) -> None:
    """Write the file from the parts, remove them, and report.

    Raises: DataError: no image is usable. CheckpointError: the file cannot be written.
    """
    indices = [parts.indices(part) for part in range(len(parts))]
    usable = np.concatenate(indices)
    reasons = {i: why for part in range(len(parts)) for i, why in parts.reasons(part).items()}
    if not len(usable):
        parts.remove()
        raise DataError(f"none of the {len(images)} images can be used: {reasons[min(reasons)]}")
    left_out = len(reasons) + len(images.skipped)
    table = FeatureTable(
        names=name_texts(images.name(i) for i in usable.tolist()),
        labels=images.known_labels()[0][usable],
        shapes=parts.shapes,
        dtype=parts.dtype,
        rows=[len(rows) for rows in indices],
        read=parts.read,
        metadata=metadata | {"left_out": left_out},
    )
    write_features(path, table)
    parts.remove()
    if left_out:
        example = reasons[min(reasons)] if reasons else " ".join(next(iter(images.skipped.items())))
        print_err(f"{left_out} images left out: {example}")
    classes = f"{len(metadata['classes'])} classes" if metadata["classes"] else "no labels"
    print_on_main(f"{path}: features of {len(usable)} images, {classes}")

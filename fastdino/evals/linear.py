"""`fastdino linear`: top-1 and top-5 of a linear classifier on frozen features.

With --cache the backbone sees each image once (or --cache_epochs times) instead of once an epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch.utils.data.distributed import DistributedSampler

from fastdino import distributed
from fastdino.config import check_at_least, parse_bool
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.workers import SteadyLoader
from fastdino.environment import cpu_count
from fastdino.errors import ConfigError, DataError
from fastdino.evals.feature_cache import CachedFeatures, cache_key, cached
from fastdino.evals.features import (
    Images,
)
from fastdino.evals.linear_probe import FrozenFeatures, Probe
from fastdino.evals.options import (
    SPLITS_HELP,
    add_network_flags,
    add_process_flags,
    load_network,
    scan_splits,
    settings_of,
    weights_digest,
)
from fastdino.evals.transforms import center_crop, random_crop
from fastdino.files import explain_write_errors, write_json
from fastdino.models.downloads import local_file
from fastdino.runtime import choose_device
from fastdino.signals import EXIT_INTERRUPTED, StopSignals
from fastdino.training.logging import drop_log_lines

Batches = Iterable[tuple[Tensor, Tensor]]
AT_LEAST_ONE = (
    "n_last_blocks", "epochs", "batch_size_per_gpu", "val_freq", "resize", "crop", "patch_size",
    "num_labels",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino linear`: the paper's eval_linear.py's, then this project's."""
    add_network_flags(parser)
    add_process_flags(parser)
    add = parser.add_argument
    add("--n_last_blocks", type=int, default=4, help="CLS tokens of so many last blocks (4)")
    about = "add the mean patch token, with --n_last_blocks 1: the paper's ViT-B (false)"
    add("--avgpool_patchtokens", type=parse_bool, default=False, metavar="BOOL", help=about)
    add("--epochs", type=int, default=100, help="passes over train/ (100)")
    add("--lr", type=float, default=0.001, help="for a global batch of 256; scaled with it (.001)")
    add("--batch_size_per_gpu", type=int, default=128, help="images a step of a process (128)")
    add("--data_path", default="/path/to/imagenet/", help=SPLITS_HELP)
    add("--val_freq", type=int, default=1, help="validate every so many epochs (1)")
    add("--output_dir", default=".", help="checkpoint.pth.tar, log.txt, linear.json; resumed (.)")
    add("--num_labels", type=int, help="classes (default: as many as there are)")
    add("--evaluate", action="store_true", help="validate a trained classifier, train none")
    about = "classifier for --evaluate, a file or URL (default: output_dir's checkpoint)"
    add("--linear_weights", help=about)
    about = (
        "keep features on disk (default folder: output_dir/features). Unlike in the paper's "
        "protocol, all epochs then see the same centre crops, or --cache_epochs augmentations"
    )
    add("--cache", nargs="?", const="", metavar="FOLDER", help=about)
    about = "with --cache: keep N augmented passes, used in turn; 0: one of centre crops (0)"
    add("--cache_epochs", type=int, default=0, metavar="N", help=about)
    add("--resize", type=int, default=256, help="short side of validation images (256)")
    add("--crop", type=int, default=224, help="side of all crops (224)")


def main(args: argparse.Namespace) -> int:
    """Runs `fastdino linear`."""
    _check_flags(args)
    device = choose_device(args.device)
    with distributed.process_group(device, args.dist_url):
        if args.evaluate:
            return evaluate(args, device)
        return train(args, device)


def _check_flags(args: argparse.Namespace) -> None:
    check_at_least(args, 1, *AT_LEAST_ONE)
    check_at_least(args, 0, "num_workers", "cache_epochs", "seed")
    if not 0 < args.lr < float("inf"):
        raise ConfigError(f"--lr must be a finite number above 0, got {args.lr}")
    if args.cache_epochs and args.cache is None:
        raise ConfigError("--cache_epochs is for --cache, which was not given")
    if args.cache is not None and args.evaluate:
        raise ConfigError("--cache is for training: leave it out with --evaluate")
    if args.linear_weights and not args.evaluate:
        raise ConfigError("--linear_weights is for --evaluate, which was not given")


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Trains a classifier, or goes on with output_dir's, and says how good it is.

    Returns: 0, or 75 where SIGTERM or SIGINT came: the step was finished and everything saved.
    """
    output = Path(args.output_dir)
    distributed.from_main(lambda: _make_folder(output))
    data = Data.load(args, device, ("train", "val"))
    probe = data.probe()
    data.say(
        f"linear probe on {device}, {distributed.world_size()} process(es): {data.dim} features, "
        f"{probe.linear.out_features} classes, {len(data.sources['train'])} training images"
    )
    path = output / "checkpoint.pth.tar"
    if distributed.from_main(path.exists):
        with distributed.together():
            probe.resume(path, data.protocol)
        begun = f", and {probe.seen} images of the next" if probe.seen else ""
        data.say(f"resumed {path}: {probe.epoch} of {args.epochs} epochs are done{begun}")
    distributed.from_main(lambda: _trim_log(output / "log.txt", probe.epoch))
    if probe.epoch < args.epochs:
        with StopSignals() as signals:
            passes = data.passes(signals.agreed_after_step)
            if passes is None:
                data.say(
                    f"stopped by {signals.received} while features were written, which are kept; "
                    "the same command goes on"
                )
                return EXIT_INTERRUPTED
            while probe.epoch < args.epochs:
                line = _run_epoch(data, probe, *passes, signals)
                if line is not None:
                    distributed.from_main(partial(_end_epoch, output, probe, data.protocol, line))
                if signals.agreed() and probe.epoch < args.epochs:
                    distributed.from_main(partial(probe.save, path, data.protocol))
                    data.say(
                        f"stopped by {signals.received} after {probe.epoch} epochs and "
                        f"{probe.seen} images, saved; the same command goes on"
                    )
                    return EXIT_INTERRUPTED
    if distributed.rank() == 0:
        _write_results(output, probe, data)
    return 0


def _run_epoch(
    data: Data, probe: Probe, passes: list[_Pass], val: _Pass, signals: StopSignals
) -> dict[str, float] | None:
    """Trains for an epoch, or the rest of one, and validates; the log's line, None if stopped."""
    args, epoch = data.args, probe.epoch
    line: dict[str, float] = {"train_lr": probe.lr}
    images, features = passes[epoch % len(passes)]
    batches = data.train_batches(images, epoch, seen=probe.seen)
    loss = probe.train_epoch(batches, features, signals.agreed_after_step)
    if loss is None:
        return None
    line |= {"train_loss": loss, "epoch": epoch}
    if epoch % args.val_freq == 0 or probe.epoch == args.epochs:
        found = probe.validate(data.val_batches(val[0]), val[1])
        _require_images(found, args)
        probe.best_acc = max(probe.best_acc, found["acc1"])
        line |= {f"test_{name}": found[name] for name in ("loss", "acc1", "acc5")}
        data.say(_accuracies(found, f"epoch {probe.epoch}/{args.epochs}: "))
    return line


def evaluate(args: argparse.Namespace, device: torch.device) -> int:
    """Says how good a trained classifier is: this command's, or the paper's linear weights."""
    data = Data.load(args, device, ("val",))
    path = args.linear_weights or str(Path(args.output_dir) / "checkpoint.pth.tar")
    probe = data.probe()
    with distributed.together():
        probe.load_head(local_file(path))
    found = probe.validate(data.val_batches(data.images("val")), data.features)
    _require_images(found, args)
    data.say(_accuracies(found))
    if distributed.rank() == 0:
        classifier = {"linear_weights": path, "classifier": weights_digest(probe.linear)}
        found |= {"images": int(found["images"])}
        result = {"settings": data.settings() | classifier, **found}
        write_json(result, Path(args.output_dir) / "evaluate.json")
    return 0


class AugmentedImages(Images):
    """Images whose random crops depend on seed, epoch and place alone: not on who makes them."""

    def __init__(
        self,
        source: ImageDataset,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int,
        epoch: int,
    ):
        super().__init__(source, transform)
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image, cropped anew each epoch, and its label."""
        words = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(words[0] >> np.uint64(1)))
            return super().__getitem__(index)


@dataclass(frozen=True)
class Data:
    """What the flags name: the frozen features, their width, and the images of the splits.

    protocol: what the features depend on, in plain values, for checkpoint and results.
    """

    args: argparse.Namespace
    device: torch.device
    features: FrozenFeatures
    dim: int
    sources: dict[str, ImageDataset]
    protocol: dict[str, Any]

    @classmethod
    def load(cls, args: argparse.Namespace, device: torch.device, splits: tuple[str, ...]) -> Data:
        """Builds the network and scans the splits.

        Raises: UserError: weights, flags or folders that cannot be.
        """
        model = load_network(args, device)
        features = FrozenFeatures(
            model, blocks=args.n_last_blocks, avgpool=args.avgpool_patchtokens
        )
        dim = features(torch.zeros(1, 3, args.crop, args.crop, device=device)).shape[1]
        sources = distributed.from_main(lambda: _scan(args, splits))
        if distributed.rank() == 0:
            for split, source in sources.items():
                if source.skipped:
                    print(f"{split}: {len(source.skipped)} images left out", file=sys.stderr)
        protocol = {
            "weights": weights_digest(model),
            "n_last_blocks": args.n_last_blocks,
            "avgpool_patchtokens": args.avgpool_patchtokens,
            "cache_epochs": None if args.cache is None else args.cache_epochs,
            "crop": args.crop,
        }
        return cls(args, device, features, dim, sources, protocol)

    def settings(self, *flags: str) -> dict[str, Any]:
        """What the accuracies depend on, for the results' JSON; flags: what they do beside."""
        return (
            settings_of(self.args, self.features.model, "data_path", "resize", *flags)
            | self.protocol
        )

    def say(self, text: str) -> None:
        """Prints a line, in one process."""
        if distributed.rank() == 0:
            print(text, flush=True)

    def probe(self) -> Probe:
        """A classifier of these features, untrained."""
        args = self.args
        batch = args.batch_size_per_gpu * distributed.world_size()
        return Probe(
            self.dim,
            args.num_labels or len(self.sources["val"].classes),
            lr=args.lr * batch / 256,
            epochs=args.epochs,
            seed=args.seed,
            device=self.device,
        )

    def images(self, split: str, epoch: int | None = None) -> Images:
        """A split's images: centre crops, or those of an epoch of training."""
        args, source = self.args, self.sources[split]
        if epoch is None:
            return Images(source, center_crop(args.resize, args.crop))
        return AugmentedImages(source, random_crop(args.crop), seed=args.seed, epoch=epoch)

    def passes(self, stopped: Callable[[], bool]) -> tuple[list[_Pass], _Pass] | None:
        """What the epochs of training see, in turn, and what is validated on.

        None where `stopped` said so while features were written.
        """
        args = self.args
        if args.cache is None:
            passes: list[_Pass] = [
                (self.images("train", epoch), self.features) for epoch in range(args.epochs)
            ]
            return passes, (self.images("val"), self.features)
        epochs = range(args.cache_epochs)
        names = [f"train-augmented{epoch:04}" for epoch in epochs] or ["train-center"]
        images = [self.images("train", epoch) for epoch in epochs] or [self.images("train")]
        number = len(names) * len(self.sources["train"]) + len(self.sources["val"])
        self.say(
            f"cache: {number * self.dim * 4 / 1e9:.2f} GB of features in {self._folder()}; "
            + (
                f"unlike in the paper's protocol, {len(names)} augmentation(s) are used in turn"
                if args.cache_epochs
                else "unlike in the paper's protocol, training sees centre crops"
            )
        )
        kept: list[_Pass] = []
        for split, name, each in (
            *(("train", *pair) for pair in zip(names, images, strict=True)),
            ("val", "val", self.images("val")),
        ):
            rows = self._cached(split, name, each, stopped)
            if rows is None:
                return None
            kept.append((rows, _as_it_is))
        return kept[:-1], kept[-1]

    def _folder(self) -> Path:
        return Path(self.args.cache or Path(self.args.output_dir) / "features")

    def _cached(
        self, split: str, name: str, images: Images, stopped: Callable[[], bool]
    ) -> CachedFeatures | None:
        args = self.args
        settings = {
            key: getattr(args, key)
            for key in ("n_last_blocks", "avgpool_patchtokens", "resize", "crop", "seed")
        }
        model = self.features.model
        key = distributed.from_main(lambda: cache_key(model, self.sources[split], settings))
        path = self._folder() / f"{split}-{key}" / f"{name}.npy"
        return cached(
            path,
            self.features,
            images,
            dim=self.dim,
            batch_size=args.batch_size_per_gpu,
            workers=args.num_workers,
            device=self.device,
            stopped=stopped,
        )

    def train_batches(self, images: Dataset[tuple[Tensor, int]], epoch: int, seen: int) -> Batches:
        """Shuffled batches of this process; images are repeated until the processes divide them.

        seen: images of the epoch that all processes together are done with.
        """
        sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(
            images,
            num_replicas=distributed.world_size(),
            rank=distributed.rank(),
            seed=self.args.seed,
        )
        sampler.set_epoch(epoch)
        left = list(sampler)[seen // distributed.world_size() :]
        return self._loader(images, sampler=left)

    def val_batches(self, images: Dataset[tuple[Tensor, int]]) -> Batches:
        """Batches of this process's share, in order."""
        number = len(images)  # type: ignore[arg-type]
        share = range(distributed.rank(), number, distributed.world_size())
        return self._loader(Subset(images, share))

    def _loader(self, images: Dataset[tuple[Tensor, int]], **options: Any) -> Batches:
        return SteadyLoader(
            images,
            batch_size=self.args.batch_size_per_gpu,
            num_workers=min(self.args.num_workers, cpu_count()),
            pin_memory=self.device.type == "cuda",
            **options,
        )


# Images, or features of them, and what makes the classifier's input of a batch.
_Pass = tuple[Dataset[tuple[Tensor, int]], Callable[[Tensor], Tensor]]


def _as_it_is(features: Tensor) -> Tensor:
    return features


def _make_folder(output: Path) -> None:
    if (output / "checkpoint.pth").exists():
        raise ConfigError(
            f"--output_dir {output} is of a pretraining run, which has its own log.txt: "
            "name another"
        )
    with explain_write_errors(output):
        output.mkdir(parents=True, exist_ok=True)


def _scan(args: argparse.Namespace, splits: tuple[str, ...]) -> dict[str, ImageDataset]:
    sources = scan_splits(args, splits)
    classes = len(sources["val"].classes)
    if args.num_labels and args.num_labels < classes:
        raise ConfigError(f"--num_labels {args.num_labels}: there are {classes} classes")
    return sources


@distributed.together()
def _require_images(found: dict[str, float], args: argparse.Namespace) -> None:
    if not found["images"]:
        raise DataError(f"none of the images in val/ of {args.data_path} can be decoded")


def _accuracies(found: dict[str, float], start: str = "") -> str:
    return (
        f"{start}accuracy on {found['images']:.0f} images: top-1 {found['acc1']:.2f} %, "
        f"top-5 {found['acc5']:.2f} %"
    )


def _trim_log(log: Path, epoch: int) -> None:
    """Drops what a run that was cut off has logged beyond its checkpoint."""
    if log.exists():
        with explain_write_errors(log):
            drop_log_lines(log, epoch)


def _end_epoch(
    output: Path, probe: Probe, protocol: dict[str, Any], line: dict[str, float]
) -> None:
    with explain_write_errors(output / "log.txt"), open(output / "log.txt", "a") as file:
        file.write(json.dumps(line) + "\n")
    probe.save(output / "checkpoint.pth.tar", protocol)


def _write_results(output: Path, probe: Probe, data: Data) -> None:
    lines = (output / "log.txt").read_text().splitlines()
    last = json.loads(lines[-1]) if lines else {}
    result = {
        "settings": data.settings("lr", "batch_size_per_gpu", "seed")
        | {"processes": distributed.world_size()},
        "acc1": last.get("test_acc1"),
        "acc5": last.get("test_acc5"),
        "best_acc1": probe.best_acc,
        "epochs": probe.epoch,
        "classes": probe.linear.out_features,
        "features": data.dim,
    }
    write_json(result, output / "linear.json")
    data.say(f"best top-1 {probe.best_acc:.2f} %; results in {output / 'linear.json'}")

"""Inputs of the linear probe: images or cached features of the two splits, in batches per rank."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torch.utils.data.distributed import DistributedSampler

from fastdino import distributed
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.workers import SteadyLoader
from fastdino.environment import cpu_count
from fastdino.errors import ConfigError
from fastdino.evals import options
from fastdino.evals.feature_cache import FeatureCache, cache_key
from fastdino.evals.linear_probe import UNREADABLE, FrozenFeatures
from fastdino.evals.options import print_on_main
from fastdino.evals.transforms import Transform, center_crop, random_crop

Labelled = Dataset[Any]  # of images or features, with labels
Batches = Iterable[tuple[Tensor, Tensor]]


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images with their labels; an unreadable one is black, with the label UNREADABLE."""

    def __init__(self, images: ImageDataset, transform: Transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = self.images.read_rgb(index)
        except Exception:  # Pillow raises many types on broken files.
            return self.transform(Image.new("RGB", (1, 1))), UNREADABLE
        return self.transform(image), int(self.images.labels[index])


class AugmentedImages(LabelledImages):
    """Labelled images whose random crops depend only on the seed, the epoch and the index."""

    def __init__(self, images: ImageDataset, transform: Transform, *, seed: int, epoch: int):
        super().__init__(images, transform)
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        words = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(words[0] >> np.uint64(1)))
            return super().__getitem__(index)


class Inputs(NamedTuple):
    """Samples of one pass, and the function from a batch of them to classifier inputs [B, D]."""

    samples: Labelled
    features: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ProbeData:
    """The frozen features, their width, and the images of the splits.

    Attributes:
        protocol: settings that the features depend on, as plain values.
    """

    args: argparse.Namespace
    device: torch.device
    features: FrozenFeatures
    dim: int
    datasets: dict[str, ImageDataset]
    protocol: dict[str, Any]

    @classmethod
    def load(
        cls, args: argparse.Namespace, device: torch.device, splits: tuple[str, ...]
    ) -> ProbeData:
        """Load the network and scan the splits.

        Raises: UserError: invalid weights, flags or folders.
        """
        model = options.load_network(args, device)
        features = FrozenFeatures(
            model, blocks=args.n_last_blocks, avgpool=args.avgpool_patchtokens
        )
        dim = features(torch.zeros(1, 3, args.crop, args.crop, device=device)).shape[1]
        datasets = distributed.from_main(lambda: _scan(args, splits))
        for split, dataset in datasets.items():
            if dataset.skipped:
                print_on_main(f"{split}: {len(dataset.skipped)} images left out", stderr=True)
        protocol = {
            "weights": options.weights_digest(model),
            "n_last_blocks": args.n_last_blocks,
            "avgpool_patchtokens": args.avgpool_patchtokens,
            "cache_epochs": None if args.cache is None else args.cache_epochs,
            "crop": args.crop,
        }
        protocol |= options.conversion_of(args)._asdict()
        return cls(args, device, features, dim, datasets, protocol)

    def settings(self, *flags: str) -> dict[str, Any]:
        """Return the settings for the JSON report, including the values of `flags`."""
        model = self.features.model
        return options.settings_of(self.args, model, "data_path", "resize", *flags) | self.protocol

    def images(self, split: str, epoch: int | None = None) -> LabelledImages:
        """Return a split's images: augmented for a training epoch, or centre crops."""
        args, images = self.args, self.datasets[split]
        if epoch is None:
            return LabelledImages(images, center_crop(args.resize, args.crop))
        return AugmentedImages(images, random_crop(args.crop), seed=args.seed, epoch=epoch)

    def inputs(self, stopped: Callable[[], bool]) -> tuple[list[Inputs], Inputs] | None:
        """Return the inputs of training, which epochs use in turn, and of validation.

        None if `stopped` returned True while features were written to the cache.
        """
        if self.args.cache is not None:
            return self._cached_inputs(stopped)
        epochs = range(self.args.epochs)
        train = [Inputs(self.images("train", epoch), self.features) for epoch in epochs]
        return train, Inputs(self.images("val"), self.features)

    def _cached_inputs(self, stopped: Callable[[], bool]) -> tuple[list[Inputs], Inputs] | None:
        args = self.args
        folder = Path(args.cache or Path(args.output_dir) / "features")
        passes = [
            ("train", f"train-augmented{epoch:04}", self.images("train", epoch))
            for epoch in range(args.cache_epochs)
        ] or [("train", "train-center", self.images("train"))]
        passes.append(("val", "val", self.images("val")))
        augmented = f"{args.cache_epochs} augmentation(s) are used in turn"
        seen = augmented if args.cache_epochs else "training sees centre crops"
        gigabytes = sum(len(images) for _, _, images in passes) * self.dim * 4 / 1e9
        size = f"{gigabytes:.2f} GB of features in {folder}"
        print_on_main(f"cache: {size}; unlike in the paper's protocol, {seen}")
        loading = args.batch_size_per_gpu, args.num_workers, self.device
        cache = FeatureCache(self.features, self.dim, *loading, stopped)
        names = ("n_last_blocks", "avgpool_patchtokens", "resize", "crop", "seed")
        settings = {name: getattr(args, name) for name in names}
        keys = distributed.from_main(
            lambda: {
                split: cache_key(self.features.model, dataset, settings)
                for split, dataset in self.datasets.items()
            }
        )
        cached: list[Inputs] = []
        for split, name, images in passes:
            samples = cache.load_or_write(folder / f"{split}-{keys[split]}" / f"{name}.npy", images)
            if samples is None:
                return None
            cached.append(Inputs(samples, nn.Identity()))
        return cached[:-1], cached[-1]

    def train_batches(self, samples: Labelled, epoch: int, seen: int) -> Batches:
        """Return shuffled batches of this rank; samples repeat until every rank has equally many.

        seen: samples of the epoch that all ranks together have seen already.
        """
        sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(
            samples,
            num_replicas=distributed.world_size(),
            rank=distributed.rank(),
            seed=self.args.seed,
        )
        sampler.set_epoch(epoch)
        return self._loader(samples, sampler=list(sampler)[seen // distributed.world_size() :])

    def val_batches(self, samples: Labelled) -> Batches:
        """Return batches of this rank's share, in order."""
        number = len(samples)  # type: ignore[arg-type]
        share = range(distributed.rank(), number, distributed.world_size())
        return self._loader(Subset(samples, share))

    def _loader(self, samples: Labelled, **options: Any) -> Batches:
        return SteadyLoader(
            samples,
            batch_size=self.args.batch_size_per_gpu,
            num_workers=min(self.args.num_workers, cpu_count()),
            pin_memory=self.device.type == "cuda",
            **options,
        )


def _scan(args: argparse.Namespace, splits: tuple[str, ...]) -> dict[str, ImageDataset]:
    datasets = options.scan_splits(args, splits)
    classes = len(datasets["val"].classes)
    if args.num_labels and args.num_labels < classes:
        raise ConfigError(f"--num_labels {args.num_labels}: there are {classes} classes")
    return datasets

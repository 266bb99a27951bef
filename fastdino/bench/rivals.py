"""The loaders that people use for DINO, as their own authors write them, in torch's DataLoader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from fastdino.augmentation.params import (
    BLUR_P,
    BLUR_RADIUS,
    FLIP_P,
    GRAY_P,
    JITTER,
    JITTER_P,
    SOLARIZE_P,
)
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.config import TrainConfig
from fastdino.data.image_dataset import ImageDataset

# Of a picture, all its crops.
MultiCrop = Callable[[Image.Image], Sequence[Tensor]]


class PaperBlur:
    """Pillow's Gaussian blur with a probability and a drawn radius: the paper's GaussianBlur."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, blurred or not."""
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*BLUR_RADIUS)))


class PaperSolarize:
    """Pillow's solarize with a probability: the paper's Solarization."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, solarized or not."""
        return ImageOps.solarize(image) if random.random() < self.p else image


def paper_crops(config: TrainConfig) -> MultiCrop:
    """The paper's DataAugmentationDINO: torchvision's classes, on PIL images."""

    def chain(size: int, scale: tuple[float, float], kind: int) -> Callable[..., Tensor]:
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale=scale, interpolation=InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(FLIP_P),
                transforms.RandomApply([transforms.ColorJitter(*JITTER)], JITTER_P),
                transforms.RandomGrayscale(GRAY_P),
                PaperBlur(BLUR_P[kind]),
                PaperSolarize(SOLARIZE_P[kind]),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    return _Each(_chains(config, chain))


def v2_crops(config: TrainConfig) -> MultiCrop:
    """The same with torchvision's v2 transforms on uint8 tensors.

    Their Gaussian blur takes a kernel size: of 9 taps, two standard deviations of the largest.
    """

    def chain(size: int, scale: tuple[float, float], kind: int) -> Callable[..., Tensor]:
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(FLIP_P),
                v2.RandomApply([v2.ColorJitter(*JITTER)], JITTER_P),
                v2.RandomGrayscale(GRAY_P),
                v2.RandomApply([v2.GaussianBlur(9, BLUR_RADIUS)], BLUR_P[kind]),
                v2.RandomSolarize(128, SOLARIZE_P[kind]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    return _Each(_chains(config, chain), first=v2.PILToTensor())


def lightly_crops(config: TrainConfig) -> MultiCrop:
    """The DINOTransform of the installed package lightly."""
    from lightly.transforms.dino_transform import DINOTransform

    transform: Any = DINOTransform(
        global_crop_size=config.global_crops_size,
        global_crop_scale=config.global_crops_scale,
        local_crop_size=config.local_crops_size,
        local_crop_scale=config.local_crops_scale,
        n_local_views=config.local_crops_number,
    )
    return transform


def _chains(
    config: TrainConfig, chain: Callable[[int, tuple[float, float], int], Callable[..., Tensor]]
) -> list[Callable[..., Tensor]]:
    size, scale = config.global_crops_size, config.global_crops_scale
    local = chain(config.local_crops_size, config.local_crops_scale, 2)
    return [chain(size, scale, 0), chain(size, scale, 1), *[local] * config.local_crops_number]


class _Each:
    """Every chain, applied to what `first` makes of a picture."""

    def __init__(
        self, chains: list[Callable[..., Tensor]], first: Callable[[Any], Any] = lambda image: image
    ) -> None:
        self._chains, self._first = chains, first

    def __call__(self, image: Image.Image) -> list[Tensor]:
        start = self._first(image)
        return [chain(start) for chain in self._chains]


class DataLoaderArm:
    """Batches of 2 + N crops [B, 3, size, size], made by the worker processes of a DataLoader."""

    def __init__(
        self, crops: MultiCrop, source: ImageDataset, config: TrainConfig, *, pin_memory: bool
    ) -> None:
        self._batches = _Batches(len(source), config.batch_size_per_gpu)
        self._loader: DataLoader[Any] | None = DataLoader(
            _Crops(crops, source),
            batch_sampler=self._batches,
            num_workers=config.num_workers,
            persistent_workers=True,
            pin_memory=pin_memory,
        )

    def batches(self, number: int) -> Iterator[list[Tensor]]:
        """So many batches, from the first request to the last."""
        assert self._loader is not None
        self._batches.number = number
        yield from self._loader

    def close(self) -> None:
        """Ends the workers."""
        self._loader = None


class _Crops(Dataset[Sequence[Tensor]]):
    def __init__(self, crops: MultiCrop, source: ImageDataset) -> None:
        self._crops, self._source = crops, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        """The crops of one image."""
        return self._crops(self._source.read_rgb(index))


class _Batches:
    """A batch sampler: the images over and over."""

    def __init__(self, images: int, batch: int) -> None:
        self._images, self._batch, self._next = images, batch, 0
        self.number = 0

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.number):
            batch = range(self._next, self._next + self._batch)
            self._next += self._batch
            yield [index % self._images for index in batch]

    def __len__(self) -> int:
        return self.number

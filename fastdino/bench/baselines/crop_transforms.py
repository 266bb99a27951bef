"""The multi-crop transforms that people use for DINO, as their authors write them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
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

# Maps an image to all its crops.
MultiCrop = Callable[[Image.Image], Sequence[Tensor]]


class PaperBlur:
    """The paper's GaussianBlur: Pillow's blur with probability p and a random radius."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur the image or return it unchanged."""
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*BLUR_RADIUS)))


class PaperSolarize:
    """The paper's Solarization: Pillow's solarize with probability p."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Solarize the image or return it unchanged."""
        return ImageOps.solarize(image) if random.random() < self.p else image


def paper_crops(config: TrainConfig) -> MultiCrop:
    """Build the paper's DataAugmentationDINO: torchvision's classes on PIL images."""

    def chain(size: int, scale: tuple[float, float], kind: int) -> Callable[..., Tensor]:
        resize = transforms.RandomResizedCrop(
            size, scale=scale, interpolation=InterpolationMode.BICUBIC
        )
        return transforms.Compose(
            [
                resize,
                transforms.RandomHorizontalFlip(FLIP_P),
                transforms.RandomApply([transforms.ColorJitter(*JITTER)], JITTER_P),
                transforms.RandomGrayscale(GRAY_P),
                PaperBlur(BLUR_P[kind]),
                PaperSolarize(SOLARIZE_P[kind]),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    return _MultiCrop(config, chain)


def v2_crops(config: TrainConfig) -> MultiCrop:
    """Build the same transforms with torchvision's v2 classes on uint8 tensors.

    Their Gaussian blur needs a kernel size: 9 taps, two standard deviations at the largest radius.
    """

    def chain(size: int, scale: tuple[float, float], kind: int) -> Callable[..., Tensor]:
        resize = v2.RandomResizedCrop(
            size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        return v2.Compose(
            [
                resize,
                v2.RandomHorizontalFlip(FLIP_P),
                v2.RandomApply([v2.ColorJitter(*JITTER)], JITTER_P),
                v2.RandomGrayscale(GRAY_P),
                v2.RandomApply([v2.GaussianBlur(9, BLUR_RADIUS)], BLUR_P[kind]),
                v2.RandomSolarize(128, SOLARIZE_P[kind]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    return _MultiCrop(config, chain, first=v2.PILToTensor())


def lightly_crops(config: TrainConfig) -> MultiCrop:
    """Build the DINOTransform of the installed lightly."""
    from lightly.transforms.dino_transform import DINOTransform

    transform: Any = DINOTransform(
        global_crop_size=config.global_crops_size,
        global_crop_scale=config.global_crops_scale,
        local_crop_size=config.local_crops_size,
        local_crop_scale=config.local_crops_scale,
        n_local_views=config.local_crops_number,
    )
    return transform


class _MultiCrop:
    """Two global chains and the local one, applied to `first(image)`."""

    def __init__(
        self,
        config: TrainConfig,
        chain: Callable[[int, tuple[float, float], int], Callable[..., Tensor]],
        first: Callable[[Any], Any] = lambda image: image,
    ) -> None:
        size, scale = config.global_crops_size, config.global_crops_scale
        local = chain(config.local_crops_size, config.local_crops_scale, 2)
        self._chains = [chain(size, scale, 0), chain(size, scale, 1)]
        self._chains += [local] * config.local_crops_number
        self._first = first

    def __call__(self, image: Image.Image) -> list[Tensor]:
        start = self._first(image)
        return [chain(start) for chain in self._chains]

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fastdino.evals.transforms import center_crop, fit_within, random_crop, square

INPUT = (
    transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
BICUBIC, BILINEAR = (
    transforms.InterpolationMode.BICUBIC,
    transforms.InterpolationMode.BILINEAR,
)
PAPER = {
    "center_crop": (
        center_crop(36, 32),
        transforms.Compose(
            [transforms.Resize(36, interpolation=BICUBIC), transforms.CenterCrop(32), *INPUT]
        ),
    ),
    "random_crop": (
        random_crop(24),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    24, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), interpolation=BILINEAR
                ),
                transforms.RandomHorizontalFlip(0.5),
                *INPUT,
            ]
        ),
    ),
    "square": (
        square(24),
        transforms.Compose([transforms.Resize((24, 24), interpolation=BICUBIC), *INPUT]),
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_transforms_match_the_papers_bit_for_bit(name):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for seed in range(20 if name == "random_crop" else 1):
        outputs = []
        for transform in PAPER[name]:
            torch.manual_seed(seed)
            outputs.append(transform(Image.fromarray(pixels)))
        assert torch.equal(*outputs)


def test_fit_within_shrinks_to_the_aspect_ratio_and_never_enlarges():
    transform = fit_within(40)
    assert transform(Image.new("RGB", (80, 60))).shape == (3, 30, 40)
    assert transform(Image.new("RGB", (30, 20))).shape == (3, 20, 30)

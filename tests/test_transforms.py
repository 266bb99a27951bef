from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from fastdino.evals.transforms import center_crop, fit_within, random_crop, square

BICUBIC = tv.InterpolationMode.BICUBIC
INPUT = (tv.ToTensor(), tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
CROP = tv.RandomResizedCrop(24, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
PAPER = {
    "center_crop": (center_crop(36, 32), [tv.Resize(36, BICUBIC), tv.CenterCrop(32)]),
    "random_crop": (random_crop(24), [CROP, tv.RandomHorizontalFlip(0.5)]),
    "square": (square(24), [tv.Resize((24, 24), BICUBIC)]),
}


@pytest.mark.parametrize("name", PAPER)
def test_transforms_match_the_papers_bit_for_bit(name):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    ours, papers = PAPER[name]
    for seed in range(20 if name == "random_crop" else 1):
        outputs = []
        for transform in (ours, tv.Compose([*papers, *INPUT])):
            torch.manual_seed(seed)
            outputs.append(transform(Image.fromarray(pixels)))
        assert torch.equal(*outputs)


def test_fit_within_shrinks_to_the_aspect_ratio_and_never_enlarges():
    transform = fit_within(40)
    assert transform(Image.new("RGB", (80, 60))).shape == (3, 30, 40)
    assert transform(Image.new("RGB", (30, 20))).shape == (3, 20, 30)

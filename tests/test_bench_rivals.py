"""fastdino.bench.rivals: that what is compared with is what it says, and does the same work."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from fastdino_kernels import Crop
from PIL import Image

from fastdino.augmentation import pillow
from fastdino.augmentation.params import GRAY_P
from fastdino.bench import rivals
from fastdino.bench.photos import photo
from tests.loaders import levels

HAS_LIGHTLY = importlib.util.find_spec("lightly") is not None
all_rivals = pytest.mark.parametrize(
    "crops",
    [
        rivals.paper_crops,
        rivals.v2_crops,
        pytest.param(
            rivals.lightly_crops,
            marks=pytest.mark.skipif(not HAS_LIGHTLY, reason="lightly is not installed"),
        ),
    ],
)


@all_rivals
def test_an_image_gives_all_its_crops(crops, tiny):
    made = crops(tiny(local_crops_number=3))(photo(0))
    assert [tuple(crop.shape) for crop in made] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert all(crop.dtype == torch.float32 and crop.isfinite().all() for crop in made)


@pytest.mark.parametrize("crops", [rivals.paper_crops, rivals.v2_crops])
@pytest.mark.parametrize("gray", [0.0, 1.0])
@pytest.mark.parametrize("blur", [0.0, 1.0])
@pytest.mark.parametrize("solarize", [0.0, 1.0])
def test_crops_with_nothing_left_to_chance_are_the_papers(
    crops, gray, blur, solarize, tiny, monkeypatch
):
    for name, value in (
        ("FLIP_P", 1.0), ("JITTER_P", 0.0), ("GRAY_P", gray), ("BLUR_P", [blur] * 3),
        ("SOLARIZE_P", [solarize] * 3), ("BLUR_RADIUS", (1.5, 1.5)),
    ):  # fmt: skip
        monkeypatch.setattr(rivals, name, value)
    # Twice as wide as high: no box of the whole area fits, and its middle, 4:3, is what is left.
    image = photo(0).crop((0, 0, 500, 250))
    whole = tiny(local_crops_number=1, global_crops_scale=(1, 1), local_crops_scale=(1, 1))
    crop = Crop(
        top=0, left=83, height=250, width=333, flip=True, jitter=False,
        jitter_order=[0, 1, 2, 3], jitter_factor=[1, 1, 1, 0], gray=bool(gray),
        blur_radius=1.5 * blur, solarize=bool(solarize),
    )  # fmt: skip
    for made, size in zip(crops(whole)(image), (32, 32, 16), strict=True):
        expected = pillow.make_crop(image, crop, size)
        if crops is rivals.paper_crops:
            assert torch.equal(made, expected)
        else:
            # Its blur reflects at the edges. Where a level falls on the other side of solarize's
            # threshold, it jumps.
            assert levels(made, expected) < (2.5 if solarize or blur else 0.8)


@all_rivals
def test_crops_turn_gray_as_often_as_the_papers(crops, tiny):
    torch.manual_seed(0)
    transform = crops(tiny(local_crops_number=0, global_crops_size=8))
    flat = Image.new("RGB", (40, 30), (200, 90, 60))
    std, mean = (torch.tensor(values)[:, None, None] for values in (pillow.STD, pillow.MEAN))
    made = [crop * std + mean for _ in range(200) for crop in transform(flat)]
    gray = [(crop.amax(0) - crop.amin(0)).max() < 1e-3 for crop in made]
    assert abs(np.mean(gray) - GRAY_P) < 0.06

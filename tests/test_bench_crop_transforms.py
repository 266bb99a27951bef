"""fastdino.bench.baselines.crop_transforms: the baselines make the paper's crops."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from fastdino_kernels import Crop
from PIL import Image

from fastdino.augmentation import pillow
from fastdino.augmentation.params import GRAY_P
from fastdino.bench.baselines import crop_transforms
from fastdino.bench.generated_photos import QUALITY, SIZE, photo, write_photos
from tests.loaders import levels

HAS_LIGHTLY = importlib.util.find_spec("lightly") is not None
all_transforms = pytest.mark.parametrize(
    "crops",
    [
        crop_transforms.paper_crops,
        crop_transforms.v2_crops,
        pytest.param(
            crop_transforms.lightly_crops,
            marks=pytest.mark.skipif(not HAS_LIGHTLY, reason="lightly is not installed"),
        ),
    ],
)


@all_transforms
def test_an_image_gives_all_its_crops(crops, tiny):
    made = crops(tiny(local_crops_number=3))(photo(0))
    assert [tuple(crop.shape) for crop in made] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert all(crop.dtype == torch.float32 and crop.isfinite().all() for crop in made)


@pytest.mark.parametrize("crops", [crop_transforms.paper_crops, crop_transforms.v2_crops])
@pytest.mark.parametrize("gray", [0.0, 1.0])
@pytest.mark.parametrize("blur", [0.0, 1.0])
@pytest.mark.parametrize("solarize", [0.0, 1.0])
def test_crops_without_randomness_match_ours(crops, gray, blur, solarize, tiny, monkeypatch):
    for name, value in (
        ("FLIP_P", 1.0), ("JITTER_P", 0.0), ("GRAY_P", gray), ("BLUR_P", [blur] * 3),
        ("SOLARIZE_P", [solarize] * 3), ("BLUR_RADIUS", (1.5, 1.5)),
    ):  # fmt: skip
        monkeypatch.setattr(crop_transforms, name, value)
    # No box of the whole area fits an image of 2:1: the fallback is its center, 4:3.
    image = photo(0).crop((0, 0, 500, 250))
    whole = tiny(local_crops_number=1, global_crops_scale=(1, 1), local_crops_scale=(1, 1))
    crop = Crop(
        top=0, left=83, height=250, width=333, flip=True, jitter=False,
        jitter_order=[0, 1, 2, 3], jitter_factor=[1, 1, 1, 0], gray=bool(gray),
        blur_radius=1.5 * blur, solarize=bool(solarize),
    )  # fmt: skip
    for made, size in zip(crops(whole)(image), (32, 32, 16), strict=True):
        expected = pillow.make_crop(image, crop, size)
        if crops is crop_transforms.paper_crops:
            assert torch.equal(made, expected)
        else:
            # The v2 blur reflects at the edges; solarize jumps at its threshold.
            assert levels(made, expected) < (2.5 if solarize or blur else 0.8)


@all_transforms
def test_crops_are_gray_as_often_as_in_the_paper(crops, tiny):
    torch.manual_seed(0)
    transform = crops(tiny(local_crops_number=0, global_crops_size=8))
    flat = Image.new("RGB", (40, 30), (200, 90, 60))
    std, mean = (torch.tensor(values)[:, None, None] for values in (pillow.STD, pillow.MEAN))
    made = [crop * std + mean for _ in range(200) for crop in transform(flat)]
    gray = [(crop.amax(0) - crop.amin(0)).max() < 1e-3 for crop in made]
    assert abs(np.mean(gray) - GRAY_P) < 0.06


def test_generated_photos_are_as_large_as_photographs_and_reproducible(tmp_path):
    write_photos(tmp_path, 4)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{n:05}.jpg" for n in range(4)]
    assert all(55_000 < file.stat().st_size < 85_000 for file in files)
    pixels = [np.asarray(Image.open(file)) for file in files]
    assert {p.shape for p in pixels} == {(SIZE[1], SIZE[0], 3)}
    assert len({p.tobytes() for p in pixels}) == 4
    (tmp_path / "again").mkdir()
    write_photos(tmp_path / "again", 1)
    assert (tmp_path / "again" / "00000.jpg").read_bytes() == files[0].read_bytes()
    assert QUALITY == 90

"""fastdino.augmentation.backends: who makes the crops, and how their differences are counted."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from fastdino.augmentation import backends
from fastdino.augmentation.backends import Difference, description, difference, levels, make_crops
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data import draw_crops

CPU = torch.device("cpu")
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + 9 * i, 41, 3), dtype=np.uint8) for i in range(2)]


@pytest.fixture
def drawn(pictures, tiny):
    params = draw_crops(tiny(), 3, [0, 1], [picture.shape[:2] for picture in pictures])
    return list(zip(params, (16, 8), strict=True))


def normalised(pixels):
    return F.normalize(torch.as_tensor(pixels).permute(2, 0, 1) / 255, MEAN, STD)


def test_levels_are_what_was_normalised():
    pixels = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 2, 3)
    assert torch.equal(levels(normalised(pixels)).permute(1, 2, 0), pixels)


def test_a_difference_counts_every_pixel_and_channel_of_every_crop():
    oracle = torch.full((4, 5, 3), 100)
    near = oracle.clone()
    near[1, 2, 0], near[3, 4, 2] = 103, 93
    small = torch.full((2, 2, 3), 7)
    gap = difference([normalised(near), normalised(small)], [normalised(oracle), normalised(small)])
    assert gap == Difference(7, 10 / (4 * 5 * 3 + 2 * 2 * 3), exact=False)
    assert str(gap) == "max 7, mean 0.14"


def test_equal_levels_are_0_and_exact_only_to_the_last_bit():
    oracle = normalised(torch.full((4, 5, 3), 100))
    assert difference([oracle], [oracle.clone()]) == Difference(0, 0.0, exact=True)
    nearly = oracle.clone()
    nearly[0, 0, 0] = torch.nextafter(nearly[0, 0, 0], torch.tensor(9.0))
    gap = difference([nearly], [oracle])
    assert (gap, str(gap)) == (Difference(0, 0.0, exact=False), "0")


@pytest.mark.parametrize(("name", "impl"), [("fused", None), ("multi_crop", "torch")])
def test_exact_executors_make_the_oracles_crops(name, impl, pictures, drawn):
    oracle = make_crops("torchvision", pictures, drawn, CPU)
    assert [tuple(crops.shape) for crops in oracle] == [(2, 2, 3, 16, 16), (2, 2, 3, 8, 8)]
    assert difference(make_crops(name, pictures, drawn, CPU, impl=impl), oracle).exact


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_dali_follows_the_same_draws(pictures, drawn):
    oracle = make_crops("torchvision", pictures, drawn, CPU)
    ours = make_crops("dali", pictures, drawn, CPU)
    assert 0 < difference(ours, oracle).mean < 8
    other_images = [crops.flip(0) for crops in oracle]
    assert difference(ours, other_images).mean > 30


@pytest.mark.parametrize("name", ["torchvision", "fused", "dali"])
def test_no_local_crops_are_no_crops(name, pictures, tiny):
    if backends.problem(name):
        pytest.skip(backends.problem(name))
    params = draw_crops(tiny(local_crops_number=0), 0, [0], [pictures[0].shape[:2]])
    pairs = list(zip(params, (4, 8), strict=True))
    shapes = [tuple(crops.shape) for crops in make_crops(name, pictures[:1], pairs, CPU)]
    assert shapes == [(1, 2, 3, 4, 4), (1, 0, 3, 8, 8)]


def test_each_is_here_or_says_why_not(monkeypatch):
    here = [name for name in backends.BACKENDS if backends.problem(name) is None]
    assert here[:3] == ["torchvision", "fused", "multi_crop"]
    for name in here:
        assert description(name, CPU).endswith(("on cpu", "in its interpreter"))

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="numba")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert "Numba is not installed" in backends.problem("fused")

"""fastdino.augmentation.backends: crop backends and the measure of their differences."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from fastdino.augmentation import backends
from fastdino.augmentation.backends import Difference, description, difference, levels, make_crops
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data import draw_crops
from tests.loaders import needs_dali

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + 9 * i, 41, 3), dtype=np.uint8) for i in range(2)]


@pytest.fixture
def drawn(images, tiny):
    params = draw_crops(tiny(), 3, [0, 1], [image.shape[:2] for image in images])
    return list(zip(params, (16, 8), strict=True))


def normalized(pixels):
    return F.normalize(torch.as_tensor(pixels).permute(2, 0, 1) / 255, MEAN, STD)


def test_levels_invert_the_normalization():
    pixels = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 2, 3)
    assert torch.equal(levels(normalized(pixels)).permute(1, 2, 0), pixels)


def test_difference_covers_every_pixel_and_channel_of_every_crop():
    reference = torch.full((4, 5, 3), 100)
    other = reference.clone()
    other[1, 2, 0], other[3, 4, 2] = 103, 93
    small = normalized(torch.full((2, 2, 3), 7))
    gap = difference([normalized(other), small], [normalized(reference), small])
    assert gap == Difference(7, 10 / (4 * 5 * 3 + 2 * 2 * 3), exact=False)
    assert str(gap) == "max 7, mean 0.14"


def test_equal_levels_are_exact_only_if_equal_to_the_last_bit():
    reference = normalized(torch.full((4, 5, 3), 100))
    assert difference([reference], [reference.clone()]) == Difference(0, 0.0, exact=True)
    other = reference.clone()
    other[0, 0, 0] = torch.nextafter(other[0, 0, 0], torch.tensor(9.0))
    gap = difference([other], [reference])
    assert (gap, str(gap)) == (Difference(0, 0.0, exact=False), "0")


@pytest.mark.parametrize(("name", "impl"), [("fused", None), ("multi_crop", "torch")])
def test_exact_backends_equal_the_reference(name, impl, images, drawn):
    reference = make_crops("torchvision", images, drawn, CPU)
    assert [tuple(crops.shape) for crops in reference] == [(2, 2, 3, 16, 16), (2, 2, 3, 8, 8)]
    assert difference(make_crops(name, images, drawn, CPU, impl=impl), reference).exact


@needs_dali
def test_dali_uses_the_same_draws(images, drawn):
    reference = make_crops("torchvision", images, drawn, CPU)
    ours = make_crops("dali", images, drawn, CPU)
    assert 0 < difference(ours, reference).mean < 8
    other_images = [crops.flip(0) for crops in reference]
    assert difference(ours, other_images).mean > 30


@pytest.mark.parametrize("name", ["torchvision", "fused", pytest.param("dali", marks=needs_dali)])
def test_no_local_crops(name, images, tiny):
    params = draw_crops(tiny(local_crops_number=0), 0, [0], [images[0].shape[:2]])
    pairs = list(zip(params, (4, 8), strict=True))
    shapes = [tuple(crops.shape) for crops in make_crops(name, images[:1], pairs, CPU)]
    assert shapes == [(1, 2, 3, 4, 4), (1, 0, 3, 8, 8)]


def test_backends_are_described_or_report_a_problem(monkeypatch):
    available = [name for name in backends.BACKENDS if backends.problem(name) is None]
    assert available[:3] == ["torchvision", "fused", "multi_crop"]
    for name in available:
        assert description(name, CPU).endswith(("on cpu", "in its interpreter"))

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="numba")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert "Numba is not installed" in backends.problem("fused")


def test_multi_crop_uses_triton_where_it_runs(monkeypatch):
    """On a CPU only its interpreter runs it; on a GPU it is as the kernels report."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.multi_crop_impl(torch.device("cpu")) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backends.multi_crop_impl(torch.device("cpu")) == "torch"
    problems = {"cuda": None, "meta": "no kernels"}
    monkeypatch.setattr(backends, "triton_problem", lambda device: problems[device.type])
    assert backends.multi_crop_impl(torch.device("cuda")) == "triton"
    assert backends.multi_crop_impl(torch.device("meta")) == "torch"

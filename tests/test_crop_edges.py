"""Boxes at every edge and corner of an image, for every backend of exact crops."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from fastdino_kernels import multi_crop
from PIL import Image, ImageFilter

from fastdino.augmentation.pillow import MEAN, STD, make_crop

HEIGHT, WIDTH = 13, 15
PLAIN = {"flip": False, "jitter": False, "gray": False, "blur_radius": 0, "solarize": False}


SIZES = ((5, 6), (1, 9), (11, 2))  # of boxes
CORNERS = [(top, left) for top in (0, 1) for left in (0, 1)]


def boxes(sizes=SIZES):
    """The whole image, boxes in its 4 corners and in its middle, and its outermost lines."""
    yield 0, 0, HEIGHT, WIDTH
    for height, width in sizes:
        down, right = HEIGHT - height, WIDTH - width
        yield from ((top * down, left * right, height, width) for top, left in CORNERS)
        yield down // 2, right // 2, height, width
    yield from ((0, 0, 1, WIDTH), (HEIGHT - 1, 0, 1, WIDTH))
    yield from ((0, 0, HEIGHT, 1), (0, WIDTH - 1, HEIGHT, 1))


@pytest.fixture
def image():
    """Noise with distinct outermost lines, as a window of a larger image of other pixels."""
    rng = np.random.default_rng(0)
    window = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    window[0], window[-1], window[:, 0], window[:, -1] = 255, 0, (255, 0, 0), (0, 0, 255)
    larger = np.full((HEIGHT + 10, WIDTH + 10, 3), (0, 255, 0), dtype=np.uint8)
    larger[5:-5, 5:-5] = window
    return larger[5:-5, 5:-5]


def by_pillow(pixels, params, size):
    made = [make_crop(Image.fromarray(pixels), crop, size) for crop in params.of_sample(0)]
    return torch.stack(made)[None]


def by_numba(pixels, params, size):
    from fastdino.augmentation.cpu import fused_crops

    return fused_crops([pixels], [(params, size)])[0]


def by_multi_crop(pixels, params, size, impl):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    window = torch.from_numpy(pixels.base).to(device)[5:-5, 5:-5]  # of memory, not a copy
    return multi_crop([window], params, size=size, mean=MEAN, std=STD, impl=impl).cpu()


def by_torch(pixels, params, size):
    return by_multi_crop(pixels, params, size, "torch")


def by_triton(pixels, params, size):
    return by_multi_crop(pixels, params, size, "triton")


has_numba = importlib.util.find_spec("numba") is not None
backends = pytest.mark.parametrize(
    "make",
    [
        by_pillow,
        pytest.param(by_numba, marks=pytest.mark.skipif(not has_numba, reason="needs Numba")),
        by_torch,
        pytest.param(by_triton, marks=[pytest.mark.gpu] * torch.cuda.is_available()),
    ],
    ids=["pillow", "numba", "torch", "triton"],
)


@backends
@pytest.mark.parametrize("changes", [{}, {"flip": True, "blur_radius": 1.3}], ids=["plain", "blur"])
def test_crop_is_the_pixels_of_its_box_and_no_others(image, make, changes, draw_any_crops):
    """The oracle cuts the box out of the array first, so that it cannot read outside of it."""
    interpreted = make is by_triton and not torch.cuda.is_available()
    size, every = 7, list(boxes(SIZES[:1] if interpreted else SIZES))
    tensor = torch.from_numpy(image.copy())
    params = draw_any_crops([tensor], len(every), **(PLAIN | changes))
    columns = dict(zip(("top", "left", "height", "width"), np.transpose(every), strict=True))
    columns = {
        name: torch.tensor(values[None], dtype=torch.int32) for name, values in columns.items()
    }
    made = make(image, dataclasses.replace(params, **columns), size)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    for n, (top, left, height, width) in enumerate(every):
        piece = Image.fromarray(image[top : top + height, left : left + width].copy())
        piece = piece.resize((size, size), Image.Resampling.BICUBIC)
        if changes:
            piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            piece = piece.filter(ImageFilter.GaussianBlur(1.3))
        expected = torch.from_numpy(np.array(piece)).permute(2, 0, 1).float().div(255)
        assert torch.equal(made[0, n], expected.sub(mean).div(std)), every[n]

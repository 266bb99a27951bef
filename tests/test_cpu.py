"""fastdino.augmentation.cpu: equal to Pillow and torchvision to the last bit."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdino_kernels import multi_crop, multi_crop_torch

from fastdino.augmentation import cpu_kernels
from fastdino.augmentation.cpu import fused_crops
from fastdino.augmentation.pillow import MEAN, STD
from fastdino.data import draw_crops

PLAIN = {"flip": False, "jitter": False, "gray": False, "blur_radius": 0, "solarize": False}
STAGES = {
    "resize": {},
    "flip": {"flip": True},
    "jitter": {"jitter": True},
    "gray": {"gray": True},
    "blur by less than a pixel": {"blur_radius": 0.6},
    "blur by two pixels": {"blur_radius": 2.0},
    "blur by many pixels": {"blur_radius": 40.0},
    "solarize": {"solarize": True},
}


def crops(images, *crops, **options):
    arrays = [image.numpy() for image in images]
    return fused_crops(arrays, crops, **options)


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    wrong = (ours != theirs).flatten(2).any(-1).nonzero().tolist()
    assert not wrong, f"crops that differ, as [image, crop]: {wrong}"


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_matches_pillow(stage, ragged_images, draw_any_crops, crops_by_pil):
    params = draw_any_crops(ragged_images, 3, **(PLAIN | STAGES[stage]))
    (ours,) = crops(ragged_images, (params, 17))
    assert_equal(ours, crops_by_pil(ragged_images, params, 17))


@pytest.mark.parametrize(("n", "size"), [(40, 24), (10, 1), (10, 2), (10, 65)])
def test_whole_crops_match_pillow(n, size, ragged_images, draw_any_crops, crops_by_pil):
    params = draw_any_crops(ragged_images, n, seed=size)
    (ours,) = crops(ragged_images, (params, size))
    assert_equal(ours, crops_by_pil(ragged_images, params, size))


def test_the_papers_crops_match_pillow(ragged_images, tiny, crops_by_pil):
    sizes = [image.shape[:2] for image in ragged_images]
    drawn = draw_crops(tiny(local_crops_number=8), 0, range(len(sizes)), sizes)
    for ours, params, size in zip(
        crops(ragged_images, *zip(drawn, (224, 96), strict=True)), drawn, (224, 96), strict=True
    ):
        assert_equal(ours, crops_by_pil(ragged_images, params, size))


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 1, 100), (0, 7, 75, 1), (10, 20, 16, 16)])
def test_extreme_boxes(box, ragged_images, draw_any_crops, crops_by_pil):
    images = ragged_images[:1]
    fixed = dict(zip(("top", "left", "height", "width"), box, strict=True))
    params = draw_any_crops(images, 4, **fixed)
    (ours,) = crops(images, (params, 16))
    assert_equal(ours, crops_by_pil(images, params, 16))


def every_colour(step):
    levels = torch.arange(0, 256, step, dtype=torch.uint8)
    return torch.cartesian_prod(levels, levels, levels).T.contiguous()


@pytest.mark.parametrize(
    ("step", "shifts"),
    [(5, range(-127, 128, 5)), pytest.param(1, range(-25, 26), marks=pytest.mark.slow)],
)
def test_hue_of_every_color_matches_the_reference(step, shifts):
    for pixels in every_colour(step).split(1 << 20, dim=1):
        h, s, v = multi_crop_torch.rgb_to_hsv(pixels.T.int()).unbind(-1)
        for shift in shifts:
            shifted = torch.stack([(h + shift) & 255, s, v], dim=-1)
            planes = [plane.copy() for plane in pixels.numpy()]
            cpu_kernels._hue(np.int32(shift), *planes)
            expected = multi_crop_torch.hsv_to_rgb(shifted).T
            assert np.array_equal(np.stack(planes), expected.numpy()), shift


def test_blur_weights_match_the_reference():
    for radius in np.linspace(0.001, 100, 5000, dtype=np.float32):
        assert cpu_kernels.blur_weights(radius) == multi_crop_torch.blur_weights(float(radius))


def test_resize_weights_match_the_reference():
    rng = np.random.default_rng(0)
    for length, size in [(1, 1), (1, 50), (5000, 7), *rng.integers(1, 600, (200, 2)).tolist()]:
        first, weights = (torch.from_numpy(a) for a in cpu_kernels._weights(length, size))
        theirs_first, theirs = multi_crop_torch.resize_weights(length, size)
        assert torch.equal(first.long(), theirs_first)
        taps = min(weights.shape[1], theirs.shape[1])
        assert torch.equal(weights[:, :taps], theirs[:, :taps])
        assert not weights[:, taps:].any()
        assert not theirs[:, taps:].any()


def test_threads_and_multi_crop_make_the_same_crops(ragged_images, draw_any_crops):
    params, more = draw_any_crops(ragged_images, 3), draw_any_crops(ragged_images, 5, seed=1)
    alone = crops(ragged_images, (params, 24), (more, 9))
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            together = crops(ragged_images, (params, 24), (more, 9), pool=pool)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(alone[0], multi_crop(ragged_images, params, size=24, mean=MEAN, std=STD))


def test_strided_images_are_supported(ragged_images, draw_any_crops):
    mirrored = ragged_images[0].numpy()[:, ::-1]
    params = draw_any_crops(ragged_images[:1], 2)
    copied = torch.from_numpy(mirrored.copy())
    (expected,) = crops([copied], (params, 8))
    (ours,) = fused_crops([mirrored], [(params, 8)])
    assert_equal(ours, expected)


def test_no_images_and_no_crops(ragged_images, draw_any_crops):
    assert crops([], (draw_any_crops([], 3), 8))[0].shape == (0, 3, 3, 8, 8)
    images = ragged_images[:2]
    assert crops(images, (draw_any_crops(images, 0), 8))[0].shape == (2, 0, 3, 8, 8)
    assert crops(images) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": [np.zeros((4, 4, 3))]}, TypeError, "array of uint8, got float64"),
        ({"images": [torch.zeros(4, 4, 3)]}, TypeError, "array of uint8, got torch.float32"),
        ({"images": [np.zeros((4, 4), np.uint8)]}, ValueError, r"\[H, W, 3\] .* shape \(4, 4\)"),
        ({"images": []}, ValueError, r"B = 0 like the images, got top of shape \(1, 2\)"),
        ({"size": 0}, ValueError, "size must be from 1 to 4096, got 0"),
        ({"top": 1000}, ValueError, "must be inside its image"),
    ],
)
def test_invalid_arguments_are_refused(changes, error, message, ragged_images, draw_any_crops):
    params = draw_any_crops(ragged_images[:1], 2)
    if "top" in changes:
        params = dataclasses.replace(params, top=torch.full_like(params.top, changes.pop("top")))
    arguments = {"images": [ragged_images[0].numpy()], "size": 8} | changes
    with pytest.raises(error, match=message):
        fused_crops(arguments["images"], [(params, arguments["size"])])


def test_the_crops_work_without_a_folder_for_compiled_code():
    """In a read-only container without a home, Numba has nowhere to keep compiled functions."""
    code = (
        "from numba.core import caching\n"
        "base = getattr(caching, 'CacheImpl', None) or caching._CacheImpl\n"
        "base._locator_classes = []\n"
        "from fastdino.augmentation import fused_problem\n"
        "problem = fused_problem('cpu')\n"
        "assert problem is None, problem\n"
        "from fastdino.augmentation import cpu_kernels\n"
        "assert cpu_kernels.up8(9) == 16\n"
    )
    paths = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in (".", "kernels"))
    environ = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)


MODULE = """
from fastdino.augmentation.cpu_kernels import _compiled

@_compiled
def increment(number):
    return number + 1
"""


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("kept", [0, 30])
def test_a_damaged_cache_of_numba_is_written_again_with_a_warning(
    tmp_path, monkeypatch, capsys, suffix, kept
):
    (tmp_path / f"kernel_{kept}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def call():
        sys.modules.pop(f"kernel_{kept}", None)
        increment = importlib.import_module(f"kernel_{kept}").increment
        assert increment(3) == 4
        return sum(increment.stats.cache_hits.values()), capsys.readouterr().err

    assert call() == (0, "")
    assert call() == (1, "")
    files = [*tmp_path.rglob(f"*{suffix}")]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:kept])
    hits, warning = call()
    assert hits == 0
    assert "warning: Numba's cache in" in warning
    assert "is damaged" in warning
    assert call() == (1, "")

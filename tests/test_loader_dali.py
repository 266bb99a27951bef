"""fastdino.data.loader_dali: crops by DALI's operators, approximately the paper's."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from fastdino.augmentation import pillow
from fastdino.data import draw_crops
from fastdino.data.image_dataset import scan_images
from fastdino.data.sampler import EpochPlan
from tests.loaders import (
    HAS_DALI,
    assert_same,
    build_loader,
    levels,
    make_config,
    odd_folder,
    photo,
    run_script,
    undrawn,
)

pytestmark = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")


def test_file_broken_after_the_scan_does_not_crash_dali(tmp_path):
    for n in range(192):
        photo(n, (64, 48)).save(tmp_path / f"{n:03}.jpg")
    code = """
dataset = t.scan_images(sys.argv[1])
config = t.make_config(crops="dali", batch_size_per_gpu=64, num_workers=2)
loader = t.build_loader(config, dataset)
for index in (5, 6, 100, 191):
    t.Path(dataset.paths[index]).write_text("bad")
print(len(list(loader.epoch(0))), len(loader.skipped))
loader.close()
"""
    done = run_script(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "3 4\n"), done.stderr


def test_unusual_formats_give_the_same_images_with_dali(tmp_path, build, monkeypatch):
    odd_folder(tmp_path)
    (tmp_path / "k" / "huge.png").unlink()
    undrawn(monkeypatch)
    dataset = scan_images(tmp_path)
    exact, near = (
        next(iter(build(dataset, crops=crops, batch_size_per_gpu=17).epoch(0)))
        for crops in ("torchvision", "dali")
    )
    order = build(dataset, batch_size_per_gpu=17)._plan.batches(0, 0)[0]
    for b, index in enumerate(order):
        for n in range(4):
            assert levels(exact[n][b], near[n][b]) < 0.5, dataset.paths[index]


def test_dali_crops_equal_those_of_the_loader(photos, build):
    dali = importlib.import_module("fastdino.augmentation.dali")
    batch = next(iter(build(photos, crops="dali").epoch(3)))
    order = EpochPlan(len(photos), 4, 0, 0, 1).batches(3, 0)[0]
    images = [np.asarray(photos.read_rgb(index)) for index in order]
    drawn = draw_crops(make_config(), 3, order, [image.shape[:2] for image in images])
    ours = dali.dali_crops(images, list(zip(drawn, (48, 24), strict=True)))
    assert_same([batch], [[crop for crops in ours for crop in crops.unbind(1)]])


SIZES = {"global_crops_size": 112, "batch_size_per_gpu": 18}


def both(photos, build, crops=("torchvision", "dali")):
    return [next(iter(build(photos, crops=name, **SIZES).epoch(0))) for name in crops]


@pytest.fixture(scope="module")
def plain(photos):
    """Crops by DALI of boxes that are only resized."""
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        loader = build_loader(make_config(crops="dali", **SIZES), photos)
        (crops,) = loader.epoch(0)
        loader.close()
    return crops


@pytest.mark.parametrize(
    ("kept", "bound"),
    [
        ({}, 0.3),
        ({"flip": None}, 0.3),
        ({"jitter_factor": (0,)}, 0.8),
        ({"jitter_factor": (1,)}, 0.8),
        ({"jitter_factor": (2,)}, 0.8),
        ({"jitter_factor": (0, 1, 2)}, 2.5),
        ({"gray": 1}, 0.5),
        ({"blur_radius": None}, 0.8),
        ({"blur_radius": 2.0}, 1.6),
    ],
    ids=str,
)
def test_dali_is_close_to_pillow(photos, build, plain, monkeypatch, kept, bound):
    undrawn(monkeypatch, **kept)
    # Pillow's hue shift by 0 goes through HSV and is lossy; another test compares the hue.
    monkeypatch.setattr(pillow, "_JITTER", (*pillow._JITTER[:3], lambda image, _: image))
    by_pillow, by_dali = both(photos, build)
    for exact, near in zip(by_pillow, by_dali, strict=True):
        assert levels(exact, near) < bound
    if kept:  # The operation has a larger effect than the bound.
        assert levels(plain[0], by_dali[0]) > 2 * bound


def test_dali_solarizes_the_second_global_crop_as_pillow(photos, build, plain, monkeypatch):
    undrawn(monkeypatch, solarize=1)
    exact, near = both(photos, build)
    # A few levels fall on the other side of the threshold and jump.
    assert levels(exact[1], near[1]) < 0.8
    assert levels(plain[1], near[1]) > 20


def test_dali_shifts_hue_in_the_direction_of_pillow(photos, build, monkeypatch):
    undrawn(monkeypatch, jitter_factor=(3,))
    exact, near = both(photos, build)
    shift = pillow._JITTER[3]
    monkeypatch.setattr(pillow, "_JITTER", (*pillow._JITTER[:3], lambda i, x: shift(i, -x)))
    opposite = both(photos, build, ["torchvision"])[0]
    assert levels(exact[0], near[0]) < 0.7 * levels(opposite[0], near[0])

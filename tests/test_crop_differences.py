"""benchmarks.crop_differences: what it compares, and the tables that it writes."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from benchmarks import crop_differences
from benchmarks.crop_differences import (
    BEGIN,
    END,
    HUE,
    HUE_ALONE,
    IN_DALIS_ORDER,
    PLAIN,
    STAGES,
    Pieces,
    Row,
    by_pil,
    draw,
    whole_crops,
)
from benchmarks.crop_pictures import PHOTO, VIVIDNESS, pictures, scene
from fastdino.augmentation.backends import Difference, levels
from fastdino.data.image_files import decode_rgb

CPU = torch.device("cpu")
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(2)]
    sizes = [(40, 30), (36, 44)]
    return [
        np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        for pixels, size in zip(coarse, sizes, strict=True)
    ]


@pytest.fixture
def config(tiny):
    return tiny(global_crops_size=24, local_crops_size=12)


@pytest.fixture
def pieces(images, config):
    return Pieces.of(images, *draw(images, config)[0])


def stage(what):
    return next(one for one in STAGES if one.what.startswith(what))


def alone(pieces, one):
    """Levels [M, H, W, 3] of what PIL makes of the pieces."""
    return levels(pieces.by_pil(one))[:, 0].permute(0, 2, 3, 1).numpy()


def test_pieces_are_the_boxes_as_pil_resizes_them(images, config, pieces):
    params, size = draw(images, config)[0]
    for m, pixels in enumerate(pieces.pixels):
        crop = params.of_sample(m // 2)[m % 2]
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        expected = Image.fromarray(images[m // 2]).crop(box).resize((size, size), 3)
        assert np.array_equal(pixels, expected)
    assert np.array_equal(alone(pieces, PLAIN), pieces.pixels)


@pytest.mark.parametrize(
    ("what", "operation"),
    [
        ("flip", lambda image, factors: F.hflip(image)),
        ("brightness", lambda image, factors: F.adjust_brightness(image, factors[0])),
        ("contrast", lambda image, factors: F.adjust_contrast(image, factors[1])),
        ("saturation", lambda image, factors: F.adjust_saturation(image, factors[2])),
        ("hue", lambda image, factors: F.adjust_hue(image, factors[3])),
        ("gray", lambda image, factors: F.to_grayscale(image, 3)),
    ],
)
def test_a_stage_is_one_operation_of_pil_on_every_piece(what, operation, pieces):
    for m, made in enumerate(alone(pieces, stage(what))):
        factors = pieces.params.jitter_factor[m, 0].tolist()
        assert np.array_equal(made, operation(Image.fromarray(pieces.pixels[m]), factors))


def test_every_piece_is_blurred_by_radii_from_the_least_to_the_largest(pieces):
    params = stage("blur").params(pieces.params)
    assert params.blur_radius[:, 0].tolist() == pytest.approx([0.1, 0.1 + 1.9 / 3, 2 - 1.9 / 3, 2])


def test_orders_are_what_they_are_called():
    drawn = [3, 1, 0, 2]
    assert IN_DALIS_ORDER.pils_order(drawn) == [0, 1, 2, 3]
    assert stage("all four; PIL in the drawn order").pils_order(drawn) == drawn
    assert stage("these but hue").pils_order(drawn) == [0, 1, 2]
    assert HUE_ALONE.pils_order(drawn) == [HUE]
    assert crop_differences.without_hue(drawn) == [1, 0, 2]


def test_without_hue_the_other_factors_stay(images, config):
    drawn = draw(images, config)
    for params, _ in drawn:
        unturned = crop_differences.unturned(params).jitter_factor
        assert torch.equal(unturned[..., :HUE], params.jitter_factor[..., :HUE])
        assert (unturned[..., HUE] == 0).all()
        assert (params.jitter_factor[..., HUE] != 0).all()


def test_whole_crops_are_0_for_the_exact_executors_and_not_for_a_changed_chain(
    images, config, monkeypatch
):
    monkeypatch.setattr(crop_differences, "multi_crop_impl", lambda device: "torch")
    drawn = draw(images, config)
    rows = {row.what: row for row in whole_crops(images, drawn, CPU)}
    for name in ("`fused`", "`multi_crop`, PyTorch"):
        assert rows[name].gaps == [Difference(0, 0.0, exact=True)] * 2
        assert rows[name].note == "bit for bit"
    oracle = by_pil(images, *drawn[0])
    unturned = by_pil(images, *drawn[0], crop_differences.without_hue)
    gap = (levels(oracle).int() - levels(unturned).int()).abs()
    found = rows["PIL with no hue"].gaps[0]
    assert (found.largest, found.mean) == (int(gap.max()), pytest.approx(gap.double().mean()))
    assert rows["PIL with no hue"].note == ""
    assert ("`dali`" in rows) == bool(HAS_DALI)


def test_triton_takes_the_first_pictures(images, config, monkeypatch):
    made = []

    def make(name, images, pairs, device, *, impl=None):
        made.append((name, len(images), impl))
        return [by_pil(images, *pair) for pair in pairs]

    monkeypatch.setattr(crop_differences, "make_crops", make)
    monkeypatch.setattr(crop_differences, "multi_crop_impl", lambda device: "triton")
    monkeypatch.setattr(crop_differences, "INTERPRETED", 1)
    rows = whole_crops(images, draw(images, config), CPU)
    assert made[:3] == [("fused", 2, None), ("multi_crop", 2, "torch"), ("multi_crop", 1, None)]
    assert rows[2].what == "`multi_crop`, Triton, 4 crops"


@needs_dali
def test_dalis_decoder_is_pillows(images):
    row = crop_differences.decoding(images)
    assert row.gaps == [Difference(0, 0.0, exact=True)]


@needs_dali
def test_kinds_of_pictures_have_the_draws_of_their_place(images, config):
    drawn = draw(images, config)[0]
    cells = crop_differences.by_colour({"one": images[:1], "other": images[1:]}, drawn, CPU)
    assert [row[0] for row in cells] == ["one", "other"]
    pieces = Pieces.of(images, *drawn)
    gap = levels(pieces.by_pil(HUE_ALONE)).int() - levels(pieces.by_pil(PLAIN)).int()
    for row, gaps in zip(cells, gap.abs().double().split(2), strict=True):
        assert row[5] == f"{gaps.mean():.1f}"
        assert all(float(number) > 0.1 for number in row[1:5])
    assert cells[0][1:] != cells[1][1:]


@needs_dali
def test_dalis_operators_are_measured_alone(images, config, monkeypatch):
    kept = [one for one in STAGES if one.what in ("flip", "brightness", "hue")]
    monkeypatch.setattr(crop_differences, "STAGES", kept)
    drawn = draw(images, config)[:1]
    rows = {row.what: row for row in crop_differences.operators(images, drawn, CPU)}
    assert list(rows) == [
        "crop, bicubic resize", "flip", "brightness", "hue", "(hue left out)", "normalise"
    ]  # fmt: skip
    largest = {what: row.gaps[0].largest for what, row in rows.items()}
    assert (largest["flip"], largest["brightness"], largest["normalise"]) == (0, 1, 0)
    assert rows["hue"].gaps[0].mean > 1
    assert float(rows["normalise"].note.split()[2]) < 2e-6


def test_tables_show_numbers_as_measured():
    zero, some = Difference(0, 0.0, exact=True), Difference(12, 0.004, exact=False)
    assert crop_differences.cells_of(Row("a", [zero, some], "why")) == [
        "a", "0", "0", "12", "0.00", "why"
    ]  # fmt: skip
    assert crop_differences.cells_of(Row("b", [some])) == ["b", "12", "0.00", "", "", ""]
    table = crop_differences.markdown(["x", "y"], [["1", "2"], ["3", "4"]])
    assert table == "| x | y |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


def test_the_report_goes_between_the_marks_and_nowhere_else(tmp_path):
    path = tmp_path / "crops.md"
    path.write_text(f"# Crops\n\n{BEGIN}\nold\n{END}\n\nMore.\n")
    crop_differences.write("new", path)
    crop_differences.write("newest", path)
    assert path.read_text() == f"# Crops\n\n{BEGIN}\n\nnewest\n\n{END}\n\nMore.\n"
    path.write_text(f"{END} {BEGIN}")
    with pytest.raises(SystemExit, match="expected the lines"):
        crop_differences.write("new", path)
    assert path.read_text() == f"{END} {BEGIN}"


def test_pictures_are_of_every_kind_and_the_same_each_time():
    found = pictures(5)
    numbers = [len(files) for files in found.values()]
    assert dict(zip(found, numbers, strict=True)) == dict.fromkeys(VIVIDNESS, 1) | {PHOTO: 1} | {
        "drawn, vivid": 2
    }
    assert found == pictures(5)
    assert len({data for files in found.values() for data in files}) == 5
    saturation = [
        np.asarray(decode_rgb(files[0]).convert("HSV"))[..., 1].mean() for files in found.values()
    ]
    assert saturation[0] > saturation[1] > saturation[2]
    assert decode_rgb(found["drawn, pale"][0]).size == (500, 375)


def test_scenes_keep_their_gray_as_they_pale():
    vivid, gray = scene(0, 1.0).astype(float), scene(0, 0.0).astype(float)
    assert np.ptp(vivid, axis=2).mean() > 30
    assert np.abs((vivid - gray) @ [0.299, 0.587, 0.114]).mean() < 2


def test_pictures_of_a_folder_are_spread_over_it(tmp_path):
    for i in range(5):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    found = pictures(3, str(tmp_path))
    reds = [decode_rgb(data).getpixel((0, 0))[0] for data in found[tmp_path.name]]
    assert reds == [0, 100, 200]
    assert len(pictures(9, str(tmp_path))[tmp_path.name]) == 5

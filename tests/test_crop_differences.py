"""benchmarks.crop_differences: its measurements and tables."""

from __future__ import annotations

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
    HUE_ONLY,
    IN_DALI_ORDER,
    PLAIN,
    STAGES,
    Pieces,
    Row,
    draw,
    whole_crops,
)
from benchmarks.crop_pictures import PHOTO, VIVIDNESS, pictures, scene
from fastdino.augmentation.backends import Difference, levels, pillow_crops
from fastdino.data.image_files import AS_STORED
from tests.loaders import HAS_DALI, needs_dali

CPU = torch.device("cpu")


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


def stage(label):
    return next(one for one in STAGES if one.label.startswith(label))


def pillow_levels(pieces, one):
    """Apply a stage to the pieces with Pillow: levels [M, H, W, 3]."""
    return levels(pieces.by_pillow(one))[:, 0].permute(0, 2, 3, 1).numpy()


def test_pieces_are_the_boxes_as_pillow_resizes_them(images, config, pieces):
    params, size = draw(images, config)[0]
    for m, pixels in enumerate(pieces.pixels):
        crop = params.of_sample(m // 2)[m % 2]
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        expected = Image.fromarray(images[m // 2]).crop(box).resize((size, size), 3)
        assert np.array_equal(pixels, expected)
    assert np.array_equal(pillow_levels(pieces, PLAIN), pieces.pixels)


@pytest.mark.parametrize(
    ("label", "operation"),
    [
        ("flip", lambda image, factors: F.hflip(image)),
        ("brightness", lambda image, factors: F.adjust_brightness(image, factors[0])),
        ("contrast", lambda image, factors: F.adjust_contrast(image, factors[1])),
        ("saturation", lambda image, factors: F.adjust_saturation(image, factors[2])),
        ("hue", lambda image, factors: F.adjust_hue(image, factors[3])),
        ("gray", lambda image, factors: F.to_grayscale(image, 3)),
    ],
)
def test_stage_applies_one_operation_to_every_piece(label, operation, pieces):
    for m, made in enumerate(pillow_levels(pieces, stage(label))):
        factors = pieces.params.jitter_factor[m, 0].tolist()
        assert np.array_equal(made, operation(Image.fromarray(pieces.pixels[m]), factors))


def test_blur_radii_cover_the_papers_range(pieces):
    params = stage("blur").params(pieces.params)
    assert params.blur_radius[:, 0].tolist() == pytest.approx([0.1, 0.1 + 1.9 / 3, 2 - 1.9 / 3, 2])


def test_orders_of_the_color_operations():
    drawn = [3, 1, 0, 2]
    assert IN_DALI_ORDER.pillow_order(drawn) == [0, 1, 2, 3]
    assert stage("all four; Pillow in the drawn order").pillow_order(drawn) == drawn
    assert stage("all but hue").pillow_order(drawn) == [0, 1, 2]
    assert HUE_ONLY.pillow_order(drawn) == [HUE]
    assert crop_differences.without_hue(drawn) == [1, 0, 2]


def test_neutral_hue_keeps_the_other_factors(images, config):
    drawn = draw(images, config)
    for params, _ in drawn:
        factors = crop_differences.with_neutral_hue(params).jitter_factor
        assert torch.equal(factors[..., :HUE], params.jitter_factor[..., :HUE])
        assert (factors[..., HUE] == 0).all()
        assert (params.jitter_factor[..., HUE] != 0).all()


def test_exact_backends_have_no_difference_and_a_changed_chain_has(images, config, monkeypatch):
    monkeypatch.setattr(crop_differences, "multi_crop_impl", lambda device: "torch")
    drawn = draw(images, config)
    rows = {row.label: row for row in whole_crops(images, drawn, CPU)}
    for name in ("`fused`", "`multi_crop`, PyTorch"):
        assert rows[name].gaps == [Difference(0, 0.0, exact=True)] * 2
        assert rows[name].note == "bit for bit"
    reference = pillow_crops(images, *drawn[0])
    changed = pillow_crops(images, *drawn[0], crop_differences.without_hue)
    gap = (levels(reference).int() - levels(changed).int()).abs()
    row = rows["Pillow without hue"]
    assert row.gaps[0].largest == gap.max()
    assert row.gaps[0].mean == pytest.approx(gap.double().mean())
    assert row.note == ""
    assert ("`dali`" in rows) == bool(HAS_DALI)


def test_interpreted_triton_gets_only_the_first_images(images, config, monkeypatch):
    made = []

    def make(name, images, pairs, device, *, impl=None):
        made.append((name, len(images), impl))
        return [pillow_crops(images, *pair) for pair in pairs]

    monkeypatch.setattr(crop_differences, "make_crops", make)
    monkeypatch.setattr(crop_differences, "multi_crop_impl", lambda device: "triton")
    monkeypatch.setattr(crop_differences, "INTERPRETED", 1)
    rows = whole_crops(images, draw(images, config), CPU)
    assert made[:3] == [("fused", 2, None), ("multi_crop", 2, "torch"), ("multi_crop", 1, None)]
    assert rows[2].label == "`multi_crop`, Triton, 4 crops"


@needs_dali
def test_dali_decodes_the_pixels_of_pillow(images):
    row = crop_differences.decoding(images)
    assert row.gaps == [Difference(0, 0.0, exact=True)]


@needs_dali
def test_each_kind_of_image_has_its_own_draws(images, config):
    drawn = draw(images, config)[0]
    cells = crop_differences.by_color({"one": images[:1], "other": images[1:]}, drawn, CPU)
    assert [row[0] for row in cells] == ["one", "other"]
    pieces = Pieces.of(images, *drawn)
    gap = levels(pieces.by_pillow(HUE_ONLY)).int() - levels(pieces.by_pillow(PLAIN)).int()
    for row, gaps in zip(cells, gap.abs().double().split(2), strict=True):
        assert row[5] == f"{gaps.mean():.1f}"
        assert all(float(number) > 0.1 for number in row[1:5])
    assert cells[0][1:] != cells[1][1:]


@needs_dali
def test_operators_of_dali_are_measured_one_by_one(images, config, monkeypatch):
    kept = [one for one in STAGES if one.label in ("flip", "brightness", "hue")]
    monkeypatch.setattr(crop_differences, "STAGES", kept)
    drawn = draw(images, config)[:1]
    rows = {row.label: row for row in crop_differences.operators(images, drawn, CPU)}
    assert list(rows) == [
        "crop, bicubic resize", "flip", "brightness", "hue", "(hue skipped)", "normalize"
    ]  # fmt: skip
    largest = {label: row.gaps[0].largest for label, row in rows.items()}
    assert (largest["flip"], largest["brightness"], largest["normalize"]) == (0, 1, 0)
    assert rows["hue"].gaps[0].mean > 1
    assert float(rows["normalize"].note.split()[2]) < 2e-6


def test_table_format():
    zero, some = Difference(0, 0.0, exact=True), Difference(12, 0.004, exact=False)
    assert crop_differences.cells_of(Row("a", [zero, some], "why")) == [
        "a", "0", "0", "12", "0.00", "why"
    ]  # fmt: skip
    assert crop_differences.cells_of(Row("b", [some])) == ["b", "12", "0.00", "", "", ""]
    table = crop_differences.markdown(["x", "y"], [["1", "2"], ["3", "4"]])
    assert table == "| x | y |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


def test_report_replaces_only_the_text_between_the_marks(tmp_path):
    path = tmp_path / "crops.md"
    path.write_text(f"# Crops\n\n{BEGIN}\nold\n{END}\n\nMore.\n")
    crop_differences.write("new", path)
    crop_differences.write("newest", path)
    assert path.read_text() == f"# Crops\n\n{BEGIN}\n\nnewest\n\n{END}\n\nMore.\n"
    path.write_text(f"{END} {BEGIN}")
    with pytest.raises(SystemExit, match="expected the lines"):
        crop_differences.write("new", path)
    assert path.read_text() == f"{END} {BEGIN}"


def test_images_of_every_kind_are_reproducible():
    files = pictures(5)
    assert {kind: len(some) for kind, some in files.items()} == {
        **dict.fromkeys(VIVIDNESS, 1), PHOTO: 1, "drawn, vivid": 2
    }  # fmt: skip
    assert files == pictures(5)
    assert len({data for some in files.values() for data in some}) == 5
    saturation = [
        np.asarray(AS_STORED.decode(some[0]).convert("HSV"))[..., 1].mean()
        for some in files.values()
    ]
    assert saturation[0] > saturation[1] > saturation[2]
    assert AS_STORED.decode(files["drawn, pale"][0]).size == (500, 375)


def test_vividness_does_not_change_the_luma():
    vivid, gray = scene(0, 1.0).astype(float), scene(0, 0.0).astype(float)
    assert np.ptp(vivid, axis=2).mean() > 30
    assert np.abs((vivid - gray) @ [0.299, 0.587, 0.114]).mean() < 2


def test_images_of_a_folder_are_evenly_spaced(tmp_path):
    for i in range(5):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (files,) = pictures(3, str(tmp_path)).values()
    reds = [AS_STORED.decode(data).getpixel((0, 0))[0] for data in files]
    assert reds == [0, 100, 200]
    assert len(pictures(9, str(tmp_path))[tmp_path.name]) == 5

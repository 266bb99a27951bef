"""`fastdino crops`: crops by backend, their differences, and the figure of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fastdino import cli, crop_comparison
from fastdino.augmentation.backends import Difference
from fastdino.augmentation.pillow import STD, make_crop
from fastdino.crop_comparison import compare_crops, comparison_figure, save_figure
from fastdino.data import draw_crops

FLAGS = {"global_crops_size": 12, "local_crops_size": 6, "local_crops_number": 1}
SMALL = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def photo():
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def config(tiny):
    return tiny(patch_size=1, **FLAGS)


@pytest.fixture
def altered(monkeypatch):
    """Change one channel of one pixel of crop 1 of `fused` by 3 levels."""
    make_crops = crop_comparison.make_crops

    def make(name, *args):
        crops = make_crops(name, *args)
        if name == "fused":
            crops[0][0, 1, 2, 5, 7] += (3 if crops[0][0, 1, 2, 5, 7] < 0 else -3) / 255 / STD[2]
        return crops

    monkeypatch.setattr(crop_comparison, "make_crops", make)


def run(capsys, *words):
    """Run the command; return exit status, stdout and stderr."""
    status = cli.main(["crops", *map(str, words)])
    return status, *capsys.readouterr()


def test_reference_crops_are_the_papers_chain(photo, config):
    comparison = compare_crops(photo, config, epoch=2, backends=[])
    assert list(comparison.crops) == ["torchvision"]
    assert comparison.differences == comparison.overall == {}
    drawn = draw_crops(config, 2, [0], [(40, 50)])
    assert comparison.drawn == drawn[0].of_sample(0) + drawn[1].of_sample(0)
    crops = zip(comparison.crops["torchvision"], comparison.drawn, (12, 12, 6), strict=True)
    for pixels, crop, size in crops:
        expected = crop_comparison.levels(make_crop(photo, crop, size)).permute(1, 2, 0)
        assert np.array_equal(pixels, expected)


def test_wrong_crop_is_detected(photo, config, altered):
    comparison = compare_crops(photo, config, backends=["fused"])
    first, second, local = comparison.differences["fused"]
    assert first == local == Difference(0, 0.0, exact=True)
    assert second == Difference(3, 3 / (12 * 12 * 3), exact=False)
    pixels = 2 * 12 * 12 * 3 + 6 * 6 * 3
    assert comparison.overall["fused"] == Difference(3, 3 / pixels, exact=False)


def test_figure_shows_boxes_crops_and_differences(photo, config, altered):
    comparison = compare_crops(photo, config, backends=["fused"])
    figure = comparison_figure(comparison, words="some words", amplify=5)
    top, bottom = figure.subfigs
    boxes = [patch for patch in top.axes[0].patches if patch.get_edgecolor() != (1, 1, 1, 1)]
    assert [(box.get_y(), box.get_x(), box.get_height(), box.get_width()) for box in boxes] == [
        (crop.top, crop.left, crop.height, crop.width) for crop in comparison.drawn
    ]
    assert [text.get_text() for text in top.axes[1].texts] == ["some words"]
    shown = [axis.get_images()[0].get_array() for axis in bottom.axes]
    crops = comparison.crops["torchvision"] + comparison.crops["fused"]
    for array, pixels in zip(shown[:6], crops, strict=True):
        assert np.array_equal(array, pixels)
    gaps = shown[6:]
    assert len(gaps) == 3
    assert gaps[0].max() == gaps[2].max() == 0
    assert gaps[1][5, 7].tolist() == [0, 0, 15]
    assert gaps[1].sum() == 15
    titles = [axis.get_title() for axis in bottom.axes]
    assert titles[0].startswith("0: global, 12 px\n")
    assert titles[2].startswith("2: local, 6 px\n")
    assert titles[6:] == ["0", "max 3, mean 0.01", "0"]
    labels = [bottom.axes[row].texts[0].get_text() for row in (0, 3, 6)]
    assert labels == ["torchvision\n(reference)", "fused", "|fused -\ntorchvision|\nx 5"]


def test_texts_do_not_overlap(photo, tiny):
    """The paper's ten crops, with as many words as possible."""
    comparison = compare_crops(photo, tiny(local_crops_number=8), backends=["fused"])
    everything = {"flip": True, "jitter": True, "gray": True, "blur_radius": 2, "solarize": True}
    crop = comparison.drawn[0]._replace(jitter_factor=[1, 1, 1, -0.1], **everything)
    comparison.drawn[:] = [crop._replace(top=n, left=n) for n in range(10)]
    words = crop_comparison.summary(comparison, torch.device("cpu"))
    figure = comparison_figure(comparison, words=words)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [
        text
        for half in figure.subfigs
        for axis in half.axes
        for text in [axis.title, *axis.texts]
        if text.get_text() and axis is not figure.subfigs[0].axes[0]
    ]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert len(boxes) == 1 + 10 + 10 + 3
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_box_numbers_use_different_corners(photo, config):
    crop = compare_crops(photo, config, backends=[]).drawn[0]
    same = crop._replace(top=0, left=0, height=30, width=40)
    places = crop_comparison._number_places([same] * 4)
    assert sorted(places) == [(0, 0), (0, 30), (40, 0), (40, 30)]


@pytest.mark.parametrize("palette", [False, True])
def test_saved_figure_is_a_png_of_its_size(palette, photo, config, tmp_path):
    figure = comparison_figure(compare_crops(photo, config, backends=[]))
    save_figure(figure, tmp_path / "a.png", palette=palette)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode) == ("PNG", "P" if palette else "RGB")
        expected = [crop_comparison.DPI * inches for inches in figure.get_size_inches()]
        assert np.abs(np.subtract(image.size, expected)).max() < 1
        colors = len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))
        assert 100 < colors <= (256 if palette else 1 << 24)


def test_command_writes_the_figure_and_prints_the_differences(photo, tmp_path, capsys, altered):
    photo.save(tmp_path / "photo.png")
    output = tmp_path / "new/crops.png"
    words = ["--image", tmp_path / "photo.png", "--output", output, "--executors", "fused"]
    status, out, err = run(capsys, *words, "--seed", 1, "--epoch", 4, *SMALL)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{output}: 3 crops of photo.png (50 x 40), seed 1, epoch 4"
    assert lines[1].startswith("Differences from torchvision (torchvision ")
    assert lines[-1].startswith("  fused: max 3, mean 0.00 (Numba ")
    with Image.open(output) as image:
        assert image.format == "PNG"


def test_any_file_name_can_be_drawn_and_printed(photo, tmp_path, capsys):
    """Between two $ Matplotlib expects mathematics, and a line break would forge a line."""
    name = "$\\frac{$ <b>|`c`\n\x1b[2J\u202e.png"
    photo.save(tmp_path / name)
    words = ["--image", tmp_path / name, "--output", tmp_path / "crops.png", "--executors", "fused"]
    status, out, err = run(capsys, *words, *SMALL)
    assert (status, err) == (0, "")
    assert all(line.isprintable() for line in out.split("\n"))
    assert "3 crops of $\\frac{$ <b>|`c`\\n\\x1b[2J\\u202e.png" in out.splitlines()[0]


@pytest.mark.parametrize("image_range", ["clip", "scale"])
def test_a_deep_image_is_scaled_or_warned_of(photo, tmp_path, capsys, monkeypatch, image_range):
    levels = np.asarray(photo.convert("L"))
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    seen = []

    def stop(picture, config, **options):
        seen.append(np.asarray(picture))
        raise crop_comparison.ConfigError("seen")

    monkeypatch.setattr(crop_comparison, "compare_crops", stop)
    words = ["crops", "--image", str(tmp_path / "deep.png"), "--image_range", image_range]
    assert cli.main([*words, *SMALL]) == 2
    assert np.array_equal(seen[0][..., 0], levels) == (image_range == "scale")
    warned = "1 of 1 images have 16-bit" in capsys.readouterr().err
    assert warned == (image_range == "clip")


def test_flags_of_train_determine_the_crops(monkeypatch):
    seen = []

    def stop(picture, config, **options):
        seen.append((config, options["epoch"], options["backends"]))
        raise crop_comparison.ConfigError("seen")

    monkeypatch.setattr(crop_comparison, "compare_crops", stop)
    scales = ["--global_crops_scale", ".2", ".3", "--local_crops_scale", ".1", ".2"]
    words = [*SMALL, *scales, "--seed", "3", "--epoch", "6", "--executors", "fused", "dali"]
    assert cli.main(["crops", *words]) == 2
    config, epoch, names = seen[0]
    assert (config.global_crops_scale, config.local_crops_scale) == ((0.2, 0.3), (0.1, 0.2))
    assert (config.seed, epoch, names) == (3, 6, ["fused", "dali"])
    assert (config.global_crops_size, config.local_crops_size, config.ncrops) == (12, 6, 3)


def test_unavailable_backend_is_reported(config, tmp_path, capsys, monkeypatch):
    reason = "DALI is not installed: pip install it"
    monkeypatch.setattr(crop_comparison, "problem", lambda name: reason if name == "dali" else None)
    words = ["--output", tmp_path / "crops.png", "--executors", "dali", *SMALL]
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert out.splitlines()[-1] == f"  dali is left out: {reason}"
    comparison = compare_crops(crop_comparison.default_picture(), config, backends=["dali"])
    assert (list(comparison.crops), comparison.unavailable) == (["torchvision"], {"dali": reason})


def test_default_image_is_always_the_same():
    picture = crop_comparison.default_picture()
    assert (picture.size, picture.mode) == ((480, 480), "RGB")
    assert picture.tobytes() == crop_comparison.default_picture().tobytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "missing.jpg"], "--image missing.jpg cannot be read: No such file"),
        (["--image", "text.jpg"], "--image text.jpg is not an image"),
        (["--image", "cut.jpg"], "--image cut.jpg cannot be decoded"),
        (["--image", "."], "--image . cannot be read: not a regular file"),
        (["--executors", "fused", "kornia"], "--executors must be some of torchvision, fused, "),
        (["--global_crops_size", "0"], "--global_crops_size must be a finite number of at least 1"),
        (["--local_crops_size", "5000"], "--local_crops_size must be at most 4096 for a figure"),
        (["--local_crops_number", "63"], "--local_crops_number must be at most 62"),
        (["--local_crops_scale", "1", "2"], "--local_crops_scale must be 0 < smallest"),
        (["--epoch", "-1"], "--epoch must be from 0 to 2^32 - 1, got -1"),
        (["--amplify", "0"], "--amplify must be at least 1, got 0"),
        (["--output", "crops.jpg"], "--output must end in .png, got 'crops.jpg'"),
        (["--output", "text.jpg/a.png"], "--output text.jpg/a.png cannot be written: "),
    ],
)
def test_invalid_arguments_give_one_line(words, message, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    photo.save("whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    status, out, err = run(capsys, *SMALL, "--executors", "torchvision", *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"fastdino crops: error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))

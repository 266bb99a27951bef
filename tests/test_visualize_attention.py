"""`fastdino attention --image_path`: the pictures, attention.json, and error messages."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.evals import visualize_attention
from fastdino.evals.attention_figures import map_picture, mask_picture, overlay_picture
from fastdino.evals.attention_maps import attention_maps, fit_to_patches, head_statistics, keep_mass
from fastdino.evals.transforms import to_input
from tests.commands import assert_images_scale, break_pixels


@pytest.fixture
def run(run_nano, tmp_path):
    """A function that runs the command on images of 16 px."""
    common = ("attention", "--image_size", 16, 16, "--output_dir", tmp_path / "out")
    return lambda *words: run_nano(*common, *words)


def report_of(folder):
    return json.loads((folder / "attention.json").read_text())


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_image_gives_the_papers_files_and_statistics(
    run, photo, tmp_path, nano_model, nano_settings
):
    out = tmp_path / "new/folder"
    words = ["--image_path", photo, "--image_size", 33, 50, "--threshold", 0.6]
    printed = f"{out}: pictures of 1 image(s), and attention.json\n"
    assert run(*words, "--output_dir", out) == (0, printed, "")
    with Image.open(photo) as image:
        picture = fit_to_patches(image.convert("RGB"), [33, 50], 8)
    maps = attention_maps(nano_model, to_input(picture)[None])[0]
    assert maps.shape == (3, 4, 6)
    pixels, mean = np.asarray(picture), maps.mean(0)
    drawings = {
        "img": pixels,
        "attn-mean": map_picture(mean, (32, 48)),
        "overlay": overlay_picture(pixels, mean),
    }
    for j in range(3):
        drawings[f"attn-head{j}"] = map_picture(maps[j], (32, 48))
        drawings[f"mask_th0.6_head{j}"] = mask_picture(pixels, keep_mass(maps[j], 0.6), 1 + j)
    expected = {f"{name}.png" for name in (*drawings, "heads")}
    assert {path.name for path in out.iterdir()} == expected | {"attention.json"}
    for name, drawing in drawings.items():
        with Image.open(out / f"{name}.png") as image:
            assert np.array_equal(np.asarray(image), drawing)

    result = report_of(out)
    (image,) = result.pop("images")
    assert result == {
        "settings": nano_settings | {"image_size": [33, 50], "threshold": 0.6},
        "skipped": {},
    }
    assert set(image.pop("files")) == expected
    assert image == {
        "image": str(photo),
        "size": [32, 48],
        "grid": [4, 6],
        "heads": head_statistics(maps, 0.6),
    }


def test_folder_gives_a_folder_per_image_and_reports_broken_ones(run, tmp_path, picture):
    root, out = tmp_path / "set", tmp_path / "out"
    for name in ("cats/a.jpg", "cats/a.png", "dogs/a.jpg", "dogs/broken.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        form = "PNG" if name.endswith("png") else "JPEG"
        (root / name).write_bytes(picture(form=form) if "broken" not in name else b"no")
    printed = f"{out}: pictures of 3 image(s), and attention.json\n"
    skipped = f"skipped: {root}/dogs/broken.jpg is not an image\n"
    assert run("--image_path", root) == (0, printed, skipped)
    for name in ("cats/a.jpg", "cats/a.png", "dogs/a"):
        assert (out / name / "heads.png").is_file()
    result = report_of(out)
    assert result["skipped"] == {f"{root}/dogs/broken.jpg": "is not an image"}
    assert len(result["images"]) == 3
    for image in result["images"]:
        assert all((out / name).is_file() for name in image["files"])


@pytest.mark.parametrize("failure", ["broken pixels", "file in the way"])
def test_an_image_that_cannot_be_drawn_leaves_the_others(run, tmp_path, picture, failure):
    root, out = tmp_path / "set", tmp_path / "out"
    root.mkdir()
    for name in "abc":
        (root / f"{name}.png").write_bytes(picture(form="PNG"))
    if failure == "broken pixels":
        break_pixels(root / "b.png")
        reason = "cannot be decoded"
    else:
        out.mkdir()
        (out / "b").write_text("in the way")
        reason = f"cannot be drawn: cannot write {out / 'b'}"
    status, _, err = run("--image_path", root)
    assert status == 0
    assert err.startswith(f"skipped: {root / 'b.png'} {reason}")
    report = report_of(out)
    assert [image["image"] for image in report["images"]] == [f"{root}/{n}.png" for n in "ac"]
    assert report["skipped"][f"{root}/b.png"].startswith(reason)


def test_a_full_disk_ends_the_command_and_keeps_the_list(run, tmp_path, picture, monkeypatch):
    root, out = tmp_path / "set", tmp_path / "out"
    root.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (root / name).write_bytes(picture())
    draw = visualize_attention.draw_image

    def fail(*args, **options):
        if (out / "a").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return draw(*args, **options)

    monkeypatch.setattr(visualize_attention, "draw_image", fail)
    assert "the disk is full" in run("--image_path", root)[2]
    assert [image["image"] for image in report_of(out)["images"]] == [str(root / "a.jpg")]


def test_seed_determines_untrained_weights(run, photo, tmp_path):
    maps = []
    for seed in (0, 0, 1):
        assert run("--image_path", photo, "--pretrained_weights", "", "--seed", seed)[0] == 0
        maps.append((tmp_path / "out/attn-head0.png").read_bytes())
    assert maps[0] == maps[1] != maps[2]


IMAGE = ["--image_path", "photo.png"]
MASKED = ["--data_path", "empty"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--image_path", "missing.jpg"], "--image_path missing.jpg: no such file or folder"),
        (["--image_path", "text.jpg"], "--image_path: no image can be read: text.jpg is not an im"),
        (["--image_path", "empty"], "no images in empty"),
        ([*IMAGE, "--image_size", "7", "9"], "an image of 7 x 9 px is smaller"),
        ([*IMAGE, "--image_size", "0", "9"], "--image_size must be a height"),
        ([*IMAGE, "--image_size", "8", "8", "3"], "--image_size must be a height"),
        ([*IMAGE, "--threshold", "1.1"], "--threshold must be above 0 and at most 1"),
        ([*IMAGE, "--threshold", "nan"], "--threshold must be above 0 and at most 1"),
        ([*IMAGE, "--patch_size", "0"], "--patch_size must be at least 1"),
        ([*IMAGE, "--output_dir", "text.jpg/a"], "cannot write text.jpg/a"),
        ([*IMAGE, "--arch", "vit_tiny"], "nano.pth, a ViT, for --arch vit_tiny --patch_size 8: "),
        (MASKED, "--data_path empty has neither JPEGImages/ (PASCAL VOC)"),
        ([*MASKED, "--num_workers", "-1"], "--num_workers must be at least 0"),
        ([*MASKED, "--batch_size_per_gpu", "0"], "--batch_size_per_gpu must be at least 1"),
    ],
)
def test_error_is_one_line_and_writes_nothing(run, photo, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    assert part in run(*words)[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--image_path", "a", "--data_path", "b"]])
def test_either_images_or_a_dataset_is_required(run, words):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2


def test_image_size_need_not_match_the_patch_size_or_the_position_embedding(run, photo, tmp_path):
    words = ["--patch_size", 14, "--pretrained_weights", "", "--image_path", photo]
    assert run(*words, "--image_size", 101)[0] == 0
    (image,) = report_of(tmp_path / "out")["images"]
    assert (image["size"], image["grid"]) == ([98, 126], [7, 9])  # of 101 x 136 px
    assert not list((tmp_path / "out").glob("mask*"))
    assert all("kept_patches" not in head for head in image["heads"])
    assert torch.tensor([head["patch_mass"] for head in image["heads"]]).gt(0.9).all()


@pytest.mark.parametrize("folder", [True, False])
def test_deep_images_are_scaled_on_request(photo, nano_weights, tmp_path, capsys, folder):
    path = photo
    if folder:
        (tmp_path / "set").mkdir()
        path = photo.rename(tmp_path / "set" / "photo.png")
    words = ["attention", "--image_path", tmp_path / "set" if folder else path, "--image_size", 16]
    words += ["--output_dir", tmp_path / "out", "--device", "cpu"]
    words += ["--pretrained_weights", nano_weights]

    def result():
        return report_of(tmp_path / "out")["images"]

    def run(*more):
        return cli.main([*map(str, (*words, *more))])

    assert_images_scale(capsys, [path], run, result)


@pytest.mark.parametrize("recorded", ["clip", "scale", None])
@pytest.mark.parametrize("flag", [None, "clip", "scale"])
def test_images_are_scaled_as_in_training(run, photo, nano_weights, tmp_path, recorded, flag):
    state = torch.load(nano_weights, weights_only=True)
    args = {"arch": "vit_nano", "patch_size": 8} | ({"image_range": recorded} if recorded else {})
    weights = tmp_path / "weights.pth"
    torch.save({"teacher": state.get("teacher", state), "args": args}, weights)
    words = ["--image_path", photo, "--pretrained_weights", weights]
    assert run(*words, *(["--image_range", flag] if flag else []))[0] == 0
    used = report_of(tmp_path / "out")["settings"]["image_range"]
    assert used == (flag or recorded or "clip")


@pytest.mark.parametrize("trained_with", [False, True])
@pytest.mark.parametrize("flag", [None, "true", "false"])
def test_images_are_rotated_as_in_training(run, photo, nano_weights, tmp_path, trained_with, flag):
    """The default is the setting of the checkpoint's training."""
    rotated = tmp_path / "rotated.jpg"
    with Image.open(photo) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # quarter turn
        image.save(rotated, exif=exif)
    state = torch.load(nano_weights, weights_only=True)
    args = {"arch": "vit_nano", "patch_size": 8, "exif_orientation": trained_with}
    weights = tmp_path / "weights.pth"
    torch.save({"teacher": state.get("teacher", state), "args": args}, weights)
    words = ["--image_path", rotated, "--image_size", 24, "--pretrained_weights", weights]
    words += ["--exif_orientation", flag] if flag else []
    assert run(*words)[0] == 0
    report = report_of(tmp_path / "out")
    applied = trained_with if flag is None else flag == "true"
    assert report["settings"]["exif_orientation"] is applied
    height, width = report["images"][0]["size"]
    assert (height > width) is applied  # stored 61 wide, 45 high

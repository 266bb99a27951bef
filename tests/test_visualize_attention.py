"""`fastdino attention` on images: which pictures, which figures, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.evals.attention_figures import map_picture, mask_picture
from fastdino.evals.attention_maps import (
    attention_maps,
    fit,
    head_statistics,
    keep_mass,
)
from fastdino.evals.options import (
    weights_digest,
)
from fastdino.evals.transforms import (
    to_input,
)
from fastdino.models.weights import load_backbone

NANO = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu"]


@pytest.fixture
def run(nano_weights, capsys):
    """The status, and what was printed on stdout and stderr, of a command line."""

    def command(*words):
        model = [*NANO, "--pretrained_weights", nano_weights]
        status = cli.main(["attention", *map(str, [*model, *words])])
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_one_image_gives_the_papers_files_and_their_figures(run, photo, tmp_path, nano_weights):
    out = tmp_path / "new/folder"
    words = ["--image_path", photo, "--image_size", 33, 50, "--threshold", 0.6]
    status, printed, err = run(*words, "--output_dir", out)
    assert (status, err) == (0, "")
    assert printed == f"{out}: pictures of 1 image(s), and attention.json\n"
    heads = range(3)
    expected = {"img.png", "attn-mean.png", "overlay.png", "heads.png"}
    expected |= {f"attn-head{j}.png" for j in heads} | {f"mask_th0.6_head{j}.png" for j in heads}
    assert {path.name for path in out.iterdir()} == expected | {"attention.json"}

    model = load_backbone(
        str(nano_weights), checkpoint_key="teacher", arch="vit_nano", patch_size=8
    ).module
    with Image.open(photo) as image:
        picture = fit(image.convert("RGB"), [33, 50], 8)
    maps = attention_maps(model, to_input(picture)[None])[0]
    assert maps.shape == (3, 4, 6)
    pixels = np.asarray(picture)
    assert np.array_equal(pixels_of(out / "img.png"), pixels)
    assert np.array_equal(pixels_of(out / "attn-mean.png"), map_picture(maps.mean(0), (32, 48)))
    for j in heads:
        drawn = pixels_of(out / f"attn-head{j}.png")
        assert np.array_equal(drawn, map_picture(maps[j], (32, 48)))
        drawn = pixels_of(out / f"mask_th0.6_head{j}.png")
        assert np.array_equal(drawn, mask_picture(pixels, keep_mass(maps[j], 0.6), 1 + j))

    result = json.loads((out / "attention.json").read_text())
    (image,) = result.pop("images")
    assert result == {
        "settings": {
            "pretrained_weights": str(nano_weights),
            "checkpoint_key": "teacher",
            "weights": weights_digest(model),
            "image_size": [33, 50],
            "threshold": 0.6,
            "arch": "vit_nano",
            "patch_size": 8,
        },
        "skipped": {},
    }
    assert set(image.pop("files")) == expected
    assert image == {
        "image": str(photo),
        "size": [32, 48],
        "grid": [4, 6],
        "heads": head_statistics(maps, 0.6),
    }


def test_without_a_threshold_there_are_no_masks(run, photo, tmp_path):
    out = tmp_path / "out"
    assert run("--image_path", photo, "--image_size", 40, "--output_dir", out)[0] == 0
    assert not list(out.glob("mask*"))
    (image,) = json.loads((out / "attention.json").read_text())["images"]
    assert image["size"] == [40, 48]  # the shorter side, the other cut from 54
    assert all("kept_patches" not in head for head in image["heads"])


def test_a_folder_has_a_folder_an_image_and_names_what_is_broken(run, tmp_path, picture):
    root, out = tmp_path / "set", tmp_path / "out"
    for name in ("cats/a.jpg", "cats/a.png", "dogs/a.jpg", "dogs/broken.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        form = "PNG" if name.endswith("png") else "JPEG"
        (root / name).write_bytes(picture(form=form) if "broken" not in name else b"no")
    words = ["--image_path", root, "--image_size", 16, 16, "--output_dir", out]
    status, printed, err = run(*words)
    assert status == 0
    assert printed == f"{out}: pictures of 3 image(s), and attention.json\n"
    assert err == f"left out: {root}/dogs/broken.jpg is not an image\n"
    for name in ("cats/a.jpg", "cats/a.png", "dogs/a"):
        assert (out / name / "heads.png").is_file()
    result = json.loads((out / "attention.json").read_text())
    assert result["skipped"] == {f"{root}/dogs/broken.jpg": "is not an image"}
    assert len(result["images"]) == 3
    for image in result["images"]:
        assert all((out / name).is_file() for name in image["files"])


def test_untrained_weights_are_those_of_the_seed(photo, tmp_path):
    maps = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["--image_path", photo, "--image_size", 16, 16, "--seed", seed]
        words += ["--output_dir", tmp_path / name, *NANO]
        assert cli.main(["attention", *map(str, words)]) == 0
        maps.append((tmp_path / name / "attn-head0.png").read_bytes())
    assert maps[0] == maps[1] != maps[2]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--image_path", "missing.jpg"], "--image_path: there is no file or folder missing.jpg"),
        (["--image_path", "text.jpg"], "--image_path: no image can be read: text.jpg is not an im"),
        (["--image_path", "empty"], "no images in empty: "),
        (
            ["--image_path", "photo.png", "--image_size", "7", "9"],
            "an image of 7 x 9 px is smaller",
        ),
        (["--image_path", "photo.png", "--image_size", "0", "9"], "--image_size must be a height"),
        (["--image_path", "photo.png", "--image_size", "8", "8", "3"], "--image_size must be a he"),
        (["--image_path", "photo.png", "--threshold", "1.1"], "--threshold must be above 0 and at"),
        (["--image_path", "photo.png", "--threshold", "nan"], "--threshold must be above 0 and at"),
        (["--image_path", "photo.png", "--patch_size", "0"], "--patch_size must be at least 1"),
        (["--image_path", "photo.png", "--output_dir", "text.jpg/a"], "cannot write text.jpg/a"),
        (["--image_path", "photo.png", "--arch", "vit_tiny"], ": the weights are of another netw"),
        (["--data_path", "empty"], "--data_path empty has neither JPEGImages/ (PASCAL VOC's"),
        (["--data_path", "empty", "--num_workers", "-1"], "--num_workers must be at least 0"),
        (["--data_path", "empty", "--batch_size_per_gpu", "0"], "--batch_size_per_gpu must be at "),
    ],
)
def test_a_mistake_is_one_line(run, photo, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    status, printed, err = run("--output_dir", "out", *words)
    assert (status, printed) == (2, "")
    assert err.startswith("fastdino attention: error: ")
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--image_path", "a", "--data_path", "b"]])
def test_either_images_or_a_set_with_masks(run, words):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2


def test_the_attention_of_a_paper_sized_image_is_drawn_at_any_patch_size(photo, tmp_path):
    """Sides that are no multiple of the patch, more patches than the position embedding's."""
    words = ["--arch", "vit_nano", "--patch_size", 14, "--image_path", photo]
    words += ["--image_size", 100, 150, "--output_dir", tmp_path / "out", "--device", "cpu"]
    assert cli.main(["attention", *map(str, words)]) == 0
    (image,) = json.loads((tmp_path / "out/attention.json").read_text())["images"]
    assert (image["size"], image["grid"]) == ([98, 140], [7, 10])
    assert torch.tensor([head["patch_mass"] for head in image["heads"]]).gt(0.9).all()

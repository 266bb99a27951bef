"""`fastdino pca`: pictures and videos, saved components, and error messages."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fastdino import cli
from fastdino.evals.attention_figures import DIMMED, OVERLAY, mask_picture
from fastdino.evals.attention_maps import fit_to_patches
from fastdino.evals.masks import blend
from fastdino.evals.pca import PANELS, draw_panels
from fastdino.evals.principal_components import PatchPCA, fit
from fastdino.evals.transforms import to_input
from fastdino.evals.video_io import CLOCK, open_frames, video_writer
from tests.commands import assert_images_scale, break_pixels


@pytest.fixture
def run(run_nano, tmp_path):
    """A function that runs the command on images of 32 px."""
    return lambda *words: run_nano(
        "pca", "--image_size", 32, "--output_dir", tmp_path / "out", *words
    )


@pytest.fixture
def folder(tmp_path):
    """Three images of smooth colors, 50 x 40."""
    path = tmp_path / "set"
    path.mkdir()
    for number, coarse in enumerate(np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), "u1")):
        smooth = Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC)
        smooth.save(path / f"{number}.png")
    return path


@pytest.fixture
def video(tmp_path):
    """Five frames at uneven times."""
    path = tmp_path / "clip.mkv"
    with video_writer(path, 10, CLOCK) as write:
        for number, coarse in enumerate(
            np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), "u1")
        ):
            frame = Image.fromarray(coarse).resize((60, 40), Image.Resampling.BICUBIC)
            write(np.asarray(frame), 0.1 * number + 0.05 * (number > 2))
    return path


def picture_and_features(path, model, size=(32,)):
    with Image.open(path) as image:
        picture = fit_to_patches(image.convert("RGB"), list(size), 8)
    with torch.no_grad():
        tokens = model.get_intermediate_layers(to_input(picture)[None], 1)[0][0, 1:]
    return picture, tokens.unflatten(0, (picture.height // 8, picture.width // 8))


def border_of(features):
    border = torch.ones(features.shape[:2], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def report_of(folder):
    return json.loads((folder / "pca.json").read_text())


def test_folder_gives_the_pictures_of_components_fitted_to_it(
    run, folder, tmp_path, nano_model, nano_settings
):
    out = tmp_path / "out"
    printed = (
        "fitted to 60 patches of 3 image(s) or frame(s) of --input_path: {:.1f} % are foreground\n"
        f"{out}: pictures of 3 image(s) and 0 video(s), and pca.json\n"
    )
    status, text, err = run("--input_path", folder, "--show", *PANELS)
    inputs = [picture_and_features(folder / f"{i}.png", nano_model) for i in range(3)]
    features = torch.cat([tokens.flatten(0, 1) for _, tokens in inputs])
    pca = fit(features, torch.cat([border_of(tokens) for _, tokens in inputs]))
    assert (status, text, err) == (0, printed.format(100 * pca.about["foreground_share"]), "")
    report = report_of(out)
    for i, (picture, tokens) in enumerate(inputs):
        assert np.array_equal(
            pixels_of(out / f"{i}-pca.png"), draw_panels(picture, tokens, pca, PANELS)
        )
        assert report["images"][i] == {
            "image": str(folder / f"{i}.png"),
            "file": f"{i}-pca.png",
            "size": [32, 40],
            "grid": [4, 5],
            "foreground_share": pytest.approx(pca.foreground(tokens).mean()),
        }
    fitted = {"image_size": [32], "seed": 0}
    drawn = {"fit_on": None, "load_pca": None, "show": list(PANELS)}
    assert report["settings"] == nano_settings | fitted | drawn
    assert report["pca"] == pca.about | {"settings": nano_settings | fitted}
    assert (report["videos"], report["skipped"]) == ([], {})


def test_panels_are_image_colors_overlay_and_mask(folder, nano_model):
    picture, tokens = picture_and_features(folder / "0.png", nano_model)
    pca = fit(tokens.flatten(0, 1), border_of(tokens))
    mask = pca.foreground(tokens)
    assert 0 < mask.sum() < mask.size
    inside = np.kron(mask, np.ones((8, 8))).astype(bool)[..., None]
    colors = (255 * pca.colors(tokens)).round().astype(np.uint8)
    colors = np.stack([np.kron(colors[..., c], np.ones((8, 8), np.uint8)) for c in range(3)], -1)
    pixels = np.asarray(picture)
    gray = (DIMMED * pixels.mean(2, keepdims=True)).round().astype(np.uint8)
    expected = {
        "image": pixels,
        "pca": np.where(inside, colors, 0),
        "overlay": np.where(inside, blend(pixels, colors, OVERLAY), gray),
        "foreground": mask_picture(pixels, torch.from_numpy(mask)),
    }
    assert tuple(expected) == PANELS
    for panels in (PANELS, ["pca", "image"]):
        drawn = draw_panels(picture, tokens, pca, panels)
        assert np.array_equal(drawn, np.concatenate([expected[p] for p in panels], axis=1))


def test_saved_components_give_the_pictures_of_the_fit(run, folder, tmp_path):
    saved = tmp_path / "pca.npz"
    assert run("--input_path", folder, "--save_pca", saved)[0] == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    data = saved.read_bytes()
    assert run("--input_path", folder, "--save_pca", saved)[0] == 0
    assert saved.read_bytes() == data
    other = ["--input_path", folder / "1.png", "--output_dir", tmp_path / "b"]
    assert run(*other, "--load_pca", saved)[2] == ""
    assert (tmp_path / "b/1-pca.png").read_bytes() == first["1-pca.png"]
    assert run(*other, "--fit_on", folder)[2] == ""
    assert (tmp_path / "b/1-pca.png").read_bytes() == first["1-pca.png"]
    assert run(*other)[2] == ""
    assert (tmp_path / "b/1-pca.png").read_bytes() != first["1-pca.png"], "fitted to itself"


def test_the_seed_selects_the_patches_of_a_smaller_fit(run, folder, tmp_path):
    saved = []
    for seed in (0, 0, 1):
        words = ["--fit_patches", 25, "--seed", seed, "--save_pca", tmp_path / "pca.npz"]
        status, out, _ = run("--input_path", folder, *words)
        assert status == 0
        assert out.startswith("fitted to 25 patches of 3 image(s)")
        saved.append(PatchPCA.load(tmp_path / "pca.npz"))
    assert np.array_equal(saved[0].axes, saved[1].axes)
    assert not np.array_equal(saved[0].axes, saved[2].axes)


def test_foreground_and_threshold_reach_the_fit(run, folder, tmp_path):
    sides = {}
    for words in (["positive"], ["negative"], ["none"], ["positive", "--threshold", 1]):
        saved = tmp_path / "pca.npz"
        assert run("--input_path", folder, "--save_pca", saved, "--foreground", *words)[0] == 0
        pca = PatchPCA.load(saved)
        sides[" ".join(map(str, words))] = (float(pca.side), pca.about["foreground_share"])
    assert [side for side, _ in sides.values()] == [1, -1, 0, 1]
    assert sides["positive"][1] + sides["negative"][1] == 1
    assert sides["none"][1] == 1
    assert sides["positive --threshold 1"][1] != sides["positive"][1]


def test_a_video_gives_a_video_with_its_times(run, video, tmp_path):
    status, out, err = run("--input_path", video, "--image_size", 24, "--batch_size_per_gpu", 2)
    assert (status, err) == (0, "")
    assert "fitted to 60 patches of 5 image(s) or frame(s)" in out
    written = open_frames(str(tmp_path / "out/clip-pca.mp4"))
    assert written.size == (24, 2 * 32)  # 24 x 36 px, cut to whole patches
    times = [seconds for _, seconds in written.timed()]
    assert times == pytest.approx([0, 0.1, 0.2, 0.35, 0.45], abs=1e-4)
    (entry,) = report_of(tmp_path / "out")["videos"]
    assert 0 < entry.pop("foreground_share") < 1
    assert entry == {
        "video": str(video),
        "file": "clip-pca.mp4",
        "frames": 5,
        "size": [24, 32],
        "grid": [3, 4],
        "left_out": [],
    }


def test_the_frames_of_a_video_are_those_of_its_pictures(run, video, tmp_path, nano_model):
    """The fit and the drawing see the same features."""
    saved = tmp_path / "pca.npz"
    words = ["--image_size", 40, "--save_pca", saved, "--show", "pca", "--video_format", "mkv"]
    assert run("--input_path", video, *words)[0] == 0
    pca, frames = PatchPCA.load(saved), list(open_frames(str(video)))
    for drawn, frame in zip(open_frames(str(tmp_path / "out/clip-pca.mkv")), frames, strict=True):
        frame.save(tmp_path / "frame.png")
        picture, tokens = picture_and_features(tmp_path / "frame.png", nano_model, (40,))
        expected = draw_panels(picture, tokens, pca, ["pca"]).astype(int)
        assert np.abs(np.asarray(drawn) - expected).mean() < 20, "more than lossy compression"


def test_images_folders_and_videos_mix_and_keep_their_names_apart(run, folder, video, tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("0.png", "0.jpg", "clip.png"):
        with Image.open(folder / "0.png") as image:
            image.save(tmp_path / "more" / name)
    words = [folder / "0.png", tmp_path / "more/0.png", tmp_path / "more", video]
    status, out, err = run("--input_path", *words, tmp_path / "more/clip.png")
    assert (status, err) == (0, "")
    assert out.endswith("pictures of 6 image(s) and 1 video(s), and pca.json\n")
    names = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert names == {
        "0-pca.png", "0-2-pca.png", "more/0.png-pca.png", "more/0.jpg-pca.png",
        "more/clip-pca.png", "clip-pca.mp4", "clip-2-pca.png", "pca.json",
    }  # fmt: skip


def test_pictures_of_the_folder_above_stay_in_the_output(run, folder, tmp_path, monkeypatch):
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert run("--input_path", "..", folder / "0.png")[0] == 0
    assert (tmp_path / "out/set/0-pca.png").exists()


@pytest.mark.parametrize("size", [[33], [33, 50], [39]])
def test_sizes_off_the_patch_grid_are_cut_at_the_right_and_bottom(run, folder, tmp_path, size):
    assert run("--input_path", folder, "--image_size", *size)[0] == 0
    for image in report_of(tmp_path / "out")["images"]:
        assert image["size"] == [8 * side for side in image["grid"]]
        assert image["grid"] == {33: [4, 5], 39: [4, 6]}[size[0]] or size == [33, 50]
    expected = pixels_of(tmp_path / "out/0-pca.png")
    assert expected.shape[0] == 32


def test_a_timm_vit_is_drawn(folder, tmp_path, capsys):
    module = timm.create_model("test_vit", num_classes=0)
    torch.save(module.state_dict(), tmp_path / "timm.pth")
    words = ["pca", "--arch", "test_vit", "--pretrained_weights", tmp_path / "timm.pth"]
    words += ["--input_path", folder, "--image_size", 128, "--output_dir", tmp_path / "out"]
    assert cli.main([*map(str, words), "--device", "cpu"]) == 0
    assert report_of(tmp_path / "out")["images"][0]["grid"] == [8, 10]


def test_unreadable_images_are_skipped_and_reported(run, folder, tmp_path):
    (folder / "3.png").write_bytes(b"no")
    break_pixels(folder / "1.png")
    status, out, err = run("--input_path", folder)
    assert status == 0
    assert "pictures of 2 image(s)" in out
    lines = err.splitlines()
    assert lines[0] == f"skipped: {folder}/3.png is not an image"
    assert lines[1].startswith(f"skipped: {folder}/1.png cannot be d")
    assert len(lines) == 2
    assert set(report_of(tmp_path / "out")["skipped"]) == {f"{folder}/{i}.png" for i in (1, 3)}


def test_a_name_that_is_too_long_for_the_picture_is_skipped(run, folder, tmp_path):
    name = "x" * 250 + ".png"
    (folder / "0.png").rename(folder / name)
    status, out, err = run("--input_path", folder)
    assert status == 0
    assert "pictures of 2 image(s)" in out
    assert err.startswith(f"skipped: {folder}/{name} cannot be drawn: cannot write ")
    assert err.count("\n") == 1


def test_components_of_other_weights_are_a_warning(run, folder, tmp_path):
    saved = tmp_path / "pca.npz"
    assert run("--input_path", folder, "--save_pca", saved)[0] == 0
    words = ["--input_path", folder, "--load_pca", saved, "--pretrained_weights", ""]
    status, _, err = run(*words)
    assert status == 0
    assert err == (
        f"warning: --load_pca {saved} was fitted to features of other weights: colors and "
        "foreground mean nothing here\n"
    )


def test_deep_images_are_scaled_on_request(run, folder, tmp_path, capsys, nano_weights):
    words = ["pca", "--arch", "vit_nano", "--patch_size", 8, "--device", "cpu"]
    words += ["--pretrained_weights", nano_weights, "--input_path", folder, "--image_size", 32]

    def result():
        return report_of(tmp_path / "out")["images"]

    def command(*more):
        return cli.main([*map(str, words), "--output_dir", str(tmp_path / "out"), *more])

    assert_images_scale(capsys, sorted(folder.glob("*.png")), command, result)


IMAGE = ["--input_path", "photo.png"]
LOAD = [*IMAGE, "--load_pca", "pca.npz"]
BAD = {
    "missing": (["--input_path", "no.png"], "--input_path no.png: no such file or folder"),
    "no fit": ([*IMAGE, "--fit_on", "no"], "--fit_on no: no such file or folder"),
    "empty": (["--input_path", "empty"], "no images in empty"),
    "text": (["--input_path", "text.png"], "--input_path: no image can be read: text.png is not"),
    "fit text": ([*IMAGE, "--fit_on", "text.png"], "--fit_on: no image can be read: text.png is"),
    "text video": (["--input_path", "text.txt"], "text.txt cannot be decoded"),
    "small": ([*IMAGE, "--image_size", "7", "9"], "an image of 7 x 9 px is smaller than a patch"),
    "one patch": ([*IMAGE, "--image_size", "8", "9"], "1 patch(es) are too few for 3 components"),
    "few": ([*IMAGE, "--image_size", "8", "24"], "3 patch(es) are too few for 3 components"),
    "size": ([*IMAGE, "--image_size", "0"], "--image_size must be a height and a width"),
    "sizes": ([*IMAGE, "--image_size", "8", "8", "8"], "--image_size must be a height"),
    "threshold": ([*IMAGE, "--threshold", "nan"], "--threshold must be a finite number"),
    "nothing": ([*IMAGE, "--threshold", "99"], "all 20 patches are on one side of the threshold"),
    "none": (
        [*IMAGE, "--threshold", "99", "--foreground", "positive"],
        "0 of 20 patches are foreground, too few for 3 components: use another --threshold",
    ),
    "both": ([*IMAGE, "--foreground", "none", "--threshold", "1"], "uses no threshold: remove"),
    "patches": ([*IMAGE, "--fit_patches", "0"], "--fit_patches must be at least 1"),
    "batch": ([*IMAGE, "--batch_size_per_gpu", "0"], "--batch_size_per_gpu must be at least 1"),
    "resnet": (
        [*IMAGE, "--arch", "resnet18", "--pretrained_weights", ""],
        "--arch resnet18 has no patch tokens; expected one of vit_nano, ",
    ),
    "load": ([*IMAGE, "--load_pca", "no.npz"], "there is no file no.npz"),
    "damaged": ([*IMAGE, "--load_pca", "text.txt"], "text.txt is damaged, or was not written by"),
    "dimension": (
        [*LOAD, "--arch", "vit_tiny", "--pretrained_weights", ""],
        "has components of 96 channels, but the features of vit_tiny have 192",
    ),
    "load and fit": ([*LOAD, "--fit_on", "a", "--foreground", "none"], "remove --fit_on, --foregr"),
    "load and save": ([*LOAD, "--save_pca", "x.npz"], "has fitted components: remove --save_pca"),
    "save": (
        [*IMAGE, "--save_pca", "x.pth"],
        "--save_pca x.pth: expected a file that ends in .npz",
    ),
    "unwritable": ([*IMAGE, "--output_dir", "text.txt/a"], "cannot write text.txt/a"),
    "a file": ([*IMAGE, "--output_dir", "text.txt"], "cannot write text.txt"),
    "unwritable pca": ([*IMAGE, "--save_pca", "text.txt/a.npz"], "cannot write text.txt/a.npz"),
}


@pytest.fixture(scope="session")
def some_pca():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 96, generator=generator)
    return fit(features, torch.zeros(50, dtype=torch.bool))


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_line_and_writes_nothing(
    run_nano, folder, tmp_path, monkeypatch, some_pca, case
):
    monkeypatch.chdir(tmp_path)
    (folder / "0.png").rename("photo.png")
    for name in ("text.txt", "text.png"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    some_pca.save(tmp_path / "pca.npz")
    before = sorted(tmp_path.rglob("*"))
    words, message = BAD[case]
    words = words if "--image_size" in words else [*words, "--image_size", "32"]
    assert message in run_nano("pca", *words)[2]
    assert sorted(tmp_path.rglob("*")) == before


def test_constant_features_are_an_error(run, folder, nano_weights, tmp_path):
    state = torch.load(nano_weights, weights_only=True)
    state["norm.weight"] = torch.zeros_like(state["norm.weight"])
    torch.save(state, tmp_path / "constant.pth")
    words = ["--input_path", folder, "--pretrained_weights", tmp_path / "constant.pth"]
    status, _, err = run(*words)
    assert status == 2
    assert "the features of all 60 patches are equal: there are no components" in err


def test_fewer_than_three_components_are_an_error(run, folder, nano_weights, tmp_path):
    state = torch.load(nano_weights, weights_only=True)
    state["norm.weight"][2:] = 0
    torch.save(state, tmp_path / "two.pth")
    words = ["--input_path", folder, "--pretrained_weights", tmp_path / "two.pth"]
    status, _, err = run(*words)
    assert status == 2
    assert "have 2 principal component(s), expected at least 3" in err

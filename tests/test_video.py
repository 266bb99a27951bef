"""`fastdino video`: the video and its JSON file, and error messages."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.data.image_files import Conversion
from fastdino.evals import video
from fastdino.evals.attention_figures import (
    heads_picture,
    map_picture,
    mask_picture,
    overlay_picture,
)
from fastdino.evals.attention_maps import attention_maps, fit_to_patches, head_statistics, keep_mass
from fastdino.evals.transforms import to_input
from fastdino.evals.video import AVERAGED, PANELS, draw_frame, output_file
from fastdino.evals.video_io import CLOCK, open_frames, video_writer
from tests.commands import assert_images_scale, break_pixels, error_of


@pytest.fixture
def run(run_nano):
    return lambda *words: run_nano("video", *words)


@pytest.fixture
def folder(tmp_path):
    """Seven frames of smooth colors, 33 x 50."""
    path = tmp_path / "frames"
    path.mkdir()
    for number, coarse in enumerate(np.random.default_rng(0).integers(0, 256, (7, 3, 4, 3), "u1")):
        smooth = Image.fromarray(coarse).resize((50, 33), Image.Resampling.BICUBIC)
        smooth.save(path / f"{number}.png")
    return path


def test_folder_becomes_a_video_of_attention(run, folder, tmp_path, nano_model, nano_settings):
    out = tmp_path / "new/run"
    words = ["--input_path", folder, "--output_path", out, "--show", *PANELS]
    printed = f"{out}/video.mp4: 7 frames, 5 a second\n"
    assert run(*words, "--fps", 5, "--batch_size_per_gpu", 3) == (0, printed, "")
    written = open_frames(str(out / "video.mp4"))
    assert (written.size, written.fps, written.count) == ((32, 5 * 48), 5, 7)

    statistics = []
    for drawn, frame in zip(written, open_frames(str(folder)), strict=True):
        picture = fit_to_patches(frame, None, 8)
        maps = attention_maps(nano_model, to_input(picture)[None])[0]
        expected = draw_frame(picture, maps, PANELS, 0.6).astype(int)
        assert np.abs(np.asarray(drawn) - expected).mean() < 12, "more than lossy compression"
        heads = head_statistics(maps, 0.6)
        statistics.append([[head[name] for name in AVERAGED] for head in heads])
    result = json.loads((out / "video.json").read_text())
    heads = result.pop("heads")
    assert [head.pop("head") for head in heads] == [0, 1, 2]
    for head, means in zip(heads, np.mean(statistics, axis=0), strict=True):
        assert head == pytest.approx(dict(zip(AVERAGED, means, strict=True)), rel=1e-5)
    assert result == {
        "settings": {
            "input_path": str(folder),
            "resize": None,
            "threshold": 0.6,
            "show": list(PANELS),
            **nano_settings,
        },
        "output_path": str(out / "video.mp4"),
        "frames": 7,
        "frames_announced": 7,
        "fps": 5,
        "size": [32, 48],
        "grid": [4, 6],
        "left_out": [],
    }


def test_panels_are_side_by_side_in_the_given_order():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    maps = torch.rand(3, 2, 3)
    pixels, mean = np.asarray(picture), maps.mean(0)
    expected = {
        "frame": pixels,
        "mean": map_picture(mean, (16, 24)),
        "overlay": overlay_picture(pixels, mean),
        "mask": mask_picture(pixels, keep_mass(mean, 0.3)),
        "heads": heads_picture(maps, (16, 24)),
    }
    assert list(expected) == list(PANELS)
    for panels in (PANELS, ["mask", "frame"]):
        drawn = draw_frame(picture, maps, panels, 0.3)
        assert np.array_equal(drawn, np.concatenate([expected[p] for p in panels], axis=1))


def test_video_keeps_its_frame_rate_and_is_resized(run, tmp_path):
    source = tmp_path / "in.mkv"
    with video_writer(source, 12.5) as write:
        for number in range(3):
            write(np.full((40, 80, 3), 60 * number, np.uint8), number / 12.5)
    out = tmp_path / "out.webm"
    assert run("--input_path", source, "--output_path", out, "--resize", 20)[::2] == (0, "")
    written = open_frames(str(out))
    assert (written.size, written.fps) == ((16, 3 * 40), 12.5)
    assert json.loads((tmp_path / "out.json").read_text())["frames"] == 3


@pytest.mark.parametrize("source", ["in.mkv", "in.webm"])
@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.webm", "out.avi"])
def test_a_varying_frame_rate_is_kept(run, tmp_path, source, target):
    times = np.cumsum(np.random.default_rng(0).choice([0, 0.033, 0.066, 0.1], 20))
    times = np.unique(times - times[0])
    with video_writer(tmp_path / source, 20, CLOCK) as write:
        for number, seconds in enumerate(times):
            write(np.full((32, 48, 3), 9 * number, np.uint8), seconds)
    if source.endswith("webm"):  # as a browser's MediaRecorder, which states no rate
        data = (tmp_path / source).read_bytes()
        at = data.index(b"\x23\xe3\x83")  # DefaultDuration
        length = 4 + (data[at + 3] & 127)
        void = b"\xec" + bytes([128 | length - 2]) + bytes(length - 2)
        (tmp_path / source).write_bytes(data[:at] + void + data[at + length :])
    out = tmp_path / target
    assert run("--input_path", tmp_path / source, "--output_path", out)[::2] == (0, "")
    written = [seconds for _, seconds in open_frames(str(out)).timed()]
    if target.endswith("avi"):  # has one rate only
        assert written[-1] == pytest.approx(times[-1], rel=0.2)
    else:
        assert written == pytest.approx(times.tolist(), abs=2e-3)
    rate = (len(times) - 1) / times[-1]
    assert json.loads(out.with_suffix(".json").read_text())["fps"] == pytest.approx(rate, rel=0.1)


def test_video_only_encodes_images_without_a_network(folder, tmp_path, capsys):
    words = ["--input_path", folder, "--output_path", tmp_path / "out", "--fps", 12, "--video_only"]
    assert cli.main(["video", *map(str, words)]) == 0
    path = tmp_path / "out/video.mp4"
    assert capsys.readouterr().out == f"{path}: 7 frames, 12 a second\n"
    written = open_frames(str(path))
    assert (written.size, written.fps, written.count) == ((34, 50), 12, 7)
    for number, frame in enumerate(written):
        original = np.asarray(Image.open(folder / f"{number}.png")).astype(int)
        difference = np.abs(np.asarray(frame)[:33] - original)
        assert difference.mean() < 12, "more than lossy compression"
    assert json.loads((tmp_path / "out/video.json").read_text()) == {
        "settings": {"input_path": str(folder)},
        "output_path": str(path),
        "frames": 7,
        "fps": 12,
        "size": [33, 50],
        "left_out": [],
    }


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--pretrained_weights a --arch vit_tiny", "remove --pretrained_weights, --arch\n"),
        ("--resize 20", "without a network: remove --resize\n"),
        ("--threshold 0.5 --show mean", "remove --threshold, --show\n"),
        ("--input_path empty", "no frames in empty: no file ends in "),
        ("--input_path none", "--input_path none: no such file or folder"),
        ("--input_path a.mp4", "--input_path a.mp4: --video_only needs a folder of images"),
    ],
)
def test_error_of_video_only_is_one_line(folder, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").write_text("")
    line = ["video", "--video_only", "--input_path", str(folder), "--output_path", "out.mp4"]
    assert cli.main([*line, *words.split()]) == 2
    assert part in error_of(capsys)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("only", [True, False])
def test_deep_frames_are_scaled_on_request(
    folder, nano_weights, tmp_path, capsys, monkeypatch, only
):
    out, written = tmp_path / "out.mkv", []
    write = lambda pixels, _: written.append(pixels.tolist())  # noqa: E731
    monkeypatch.setattr(video, "video_writer", lambda *_: contextlib.nullcontext(write))
    words = ["video", "--input_path", folder, "--output_path", out]
    words += ["--video_only"] if only else ["--pretrained_weights", nano_weights, "--show", "frame"]

    def result():
        frames = written[:]
        written.clear()
        return frames

    def run(*more):
        return cli.main([*map(str, (*words, *more))])

    assert_images_scale(capsys, sorted(folder.iterdir()), run, result)


def test_at_most_a_batch_of_frames_is_in_memory(run, folder, tmp_path, monkeypatch):
    events = []
    read, draw = Conversion.read, video.draw_frame
    monkeypatch.setattr(Conversion, "read", lambda *args: events.append(1) or read(*args))
    monkeypatch.setattr(video, "draw_frame", lambda *args: events.append(-1) or draw(*args))
    words = ["--input_path", folder, "--output_path", tmp_path / "a.mp4"]
    assert run(*words, "--batch_size_per_gpu", 2)[0] == 0
    assert events == 3 * [1, 1, -1, -1] + [1, -1]


def test_output_path_is_a_file_with_a_known_suffix_or_a_folder(tmp_path):
    assert output_file(".", "mkv").name == "video.mkv"
    assert output_file(str(tmp_path / "a.MP4"), "mkv") == tmp_path / "a.MP4"
    assert output_file(str(tmp_path / "v1.2"), "mp4") == tmp_path / "v1.2/video.mp4"
    (tmp_path / "b.mp4").mkdir()
    assert output_file(str(tmp_path / "b.mp4"), "mp4") == tmp_path / "b.mp4/video.mp4"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--input_path", "missing.mp4"], "--input_path missing.mp4: no such file or folder"),
        (
            ["--input_path", "text.mp4"],
            "; expected a complete video that FFmpeg can read, or a fol",
        ),
        (["--output_path", "out.gif"], "out.gif: expected a folder, or a file that ends in .mp4"),
        (["--resize", "7"], "an image of 7 x 10 px is smaller than a patch of 8 px"),
        (["--resize", "0"], "--resize must be a height and a width"),
        (["--threshold", "0"], "--threshold must be above 0"),
        (["--fps", "0"], "--fps must be from 0.1 to 1000, got 0.0"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu must be at least 1"),
        (["--arch", "resnet18", "--pretrained_weights", ""], "--arch resnet18 has no attention"),
        (["--output_path", "text.mp4/a.mp4"], "cannot write text.mp4/a.mp4"),
        (["--input_path", "text.mp4", "--output_path", "text.mp4"], "text.mp4 is also the input"),
    ],
)
def test_error_is_one_line_and_writes_nothing(run, folder, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    assert part in run("--input_path", folder, "--output_path", "out.mp4", *words)[2]
    assert not (tmp_path / "out.mp4").exists()


def test_broken_frames_are_left_out_and_the_others_keep_their_times(run, folder, tmp_path):
    break_pixels(folder / "4.png")
    (folder / "5.png").write_text("no image")
    out = tmp_path / "out.mp4"
    status, _, err = run("--input_path", folder, "--output_path", out)
    assert status == 0
    assert err.startswith(f"{folder}: frames left out: {folder}/4.png cannot be decoded")
    assert err.endswith("; and 1 more\n")
    times = [seconds for _, seconds in open_frames(str(out)).timed()]
    assert times == pytest.approx([n / 30 for n in (0, 1, 2, 3, 6)], abs=1e-3)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["frames"] == 5
    assert [reason.split()[0] for reason in report["left_out"]] == [
        f"{folder}/{n}.png" for n in (4, 5)
    ]


@pytest.mark.parametrize("pixels", [True, False])
def test_a_folder_without_a_usable_frame_leaves_no_video(run, folder, tmp_path, pixels):
    for path in folder.iterdir():
        break_pixels(path) if pixels else path.write_text("no image")
    _, _, err = run("--input_path", folder, "--output_path", tmp_path / "out.mp4")
    assert f"error: no frame of {folder} can be used: {folder}/0.png " in err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("trained_with", [False, True])
@pytest.mark.parametrize("flag", [None, "true", "false"])
def test_frames_of_a_folder_are_rotated_as_in_training(
    run, folder, nano_weights, tmp_path, trained_with, flag
):
    for path in folder.iterdir():
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6  # quarter turn
            image.save(path, exif=exif)
    state = torch.load(nano_weights, weights_only=True)
    args = {"arch": "vit_nano", "patch_size": 8, "exif_orientation": trained_with}
    torch.save({"teacher": state.get("teacher", state), "args": args}, tmp_path / "weights.pth")
    words = ["--input_path", folder, "--output_path", tmp_path / "out.mp4", "--show", "frame"]
    words += ["--pretrained_weights", tmp_path / "weights.pth"]
    assert run(*words, *(["--exif_orientation", flag] if flag else []))[0] == 0
    report = json.loads((tmp_path / "out.json").read_text())
    applied = trained_with if flag is None else flag == "true"
    assert report["settings"]["exif_orientation"] is applied
    assert report["size"] == ([48, 32] if applied else [32, 48])

"""`fastdino video`: a video of attention, frame by frame, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.evals import video
from fastdino.evals.attention_figures import (
    heads_picture,
    map_picture,
    mask_picture,
    overlay_picture,
)
from fastdino.evals.attention_maps import attention_maps, fit, head_statistics, keep_mass
from fastdino.evals.options import (
    weights_digest,
)
from fastdino.evals.transforms import (
    to_input,
)
from fastdino.evals.video import AVERAGED, VIEWS, draw_frame, output_file
from fastdino.evals.video_io import open_frames, video_writer
from fastdino.models.weights import load_backbone
from tests.commands import error_of

NANO = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu"]


@pytest.fixture
def run(nano_weights, capsys):
    """The status, and what was printed on stdout and stderr, of a command line."""

    def command(*words):
        model = [*NANO, "--pretrained_weights", nano_weights]
        status = cli.main(["video", *map(str, [*model, *words])])
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def folder(tmp_path):
    """Seven frames of smooth colours, 33 x 50."""
    path = tmp_path / "frames"
    path.mkdir()
    rng = np.random.default_rng(0)
    for number in range(7):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((50, 33), Image.Resampling.BICUBIC).save(path / f"{number}.png")
    return path


def test_a_folder_becomes_a_video_of_what_each_frame_attends_to(
    run, folder, tmp_path, nano_weights
):
    out = tmp_path / "new/run"
    words = ["--input_path", folder, "--output_path", out, "--show", *VIEWS]
    status, printed, err = run(*words, "--fps", 5, "--batch_size_per_gpu", 3)
    assert (status, err) == (0, "")
    assert printed == f"{out}/video.mp4: 7 frames, 5 a second\n"
    video = open_frames(str(out / "video.mp4"))
    assert (video.size, video.fps, video.count) == ((32, 5 * 48), 5, 7)

    model = load_backbone(
        str(nano_weights), checkpoint_key="teacher", arch="vit_nano", patch_size=8
    ).module
    figures = []
    for drawn, frame in zip(video, open_frames(str(folder)), strict=True):
        picture = fit(frame, None, 8)
        maps = attention_maps(model, to_input(picture)[None])[0]
        expected = draw_frame(picture, maps, VIEWS, 0.6).astype(int)
        assert np.abs(np.asarray(drawn) - expected).mean() < 12, "lossy"
        statistics = head_statistics(maps, 0.6)
        figures.append([[head[name] for name in AVERAGED] for head in statistics])
    result = json.loads((out / "video.json").read_text())
    means = np.mean(figures, axis=0)
    for head, found in enumerate(result["heads"]):
        assert found.pop("head") == head
        assert found == pytest.approx(dict(zip(AVERAGED, means[head], strict=True)), rel=1e-5)
    assert len(result.pop("heads")) == 3
    assert result == {
        "settings": {
            "input_path": str(folder),
            "pretrained_weights": str(nano_weights),
            "checkpoint_key": "teacher",
            "weights": weights_digest(model),
            "resize": None,
            "threshold": 0.6,
            "show": list(VIEWS),
            "arch": "vit_nano",
            "patch_size": 8,
        },
        "output_path": str(out / "video.mp4"),
        "frames": 7,
        "frames_announced": 7,
        "fps": 5,
        "size": [32, 48],
        "grid": [4, 6],
    }


def test_the_views_of_a_frame_stand_side_by_side_in_the_order_asked_for():
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
    assert list(expected) == list(VIEWS)
    for views in (VIEWS, ["mask", "frame"]):
        drawn = draw_frame(picture, maps, views, 0.3)
        assert np.array_equal(drawn, np.concatenate([expected[v] for v in views], axis=1))


def test_a_video_keeps_its_rate_and_is_resized(run, tmp_path):
    source = tmp_path / "in.mkv"
    with video_writer(source, 12.5) as write:
        for number in range(3):
            write(np.full((40, 80, 3), 60 * number, np.uint8))
    out = tmp_path / "out.webm"
    status, _, err = run("--input_path", source, "--output_path", out, "--resize", 20)
    assert (status, err) == (0, "")
    video = open_frames(str(out))
    assert (video.size, video.fps) == ((16, 3 * 40), 12.5)
    assert json.loads((tmp_path / "out.json").read_text())["frames"] == 3


def test_pictures_become_a_video_without_a_network(folder, tmp_path, capsys):
    words = ["--input_path", folder, "--output_path", tmp_path / "out", "--fps", 12, "--video_only"]
    assert cli.main(["video", *map(str, words)]) == 0
    path = tmp_path / "out/video.mp4"
    assert capsys.readouterr().out == f"{path}: 7 frames, 12 a second\n"
    video = open_frames(str(path))
    assert (video.size, video.fps, video.count) == ((34, 50), 12, 7)
    for number, frame in enumerate(video):
        original = np.asarray(Image.open(folder / f"{number}.png")).astype(int)
        assert np.abs(np.asarray(frame)[:33] - original).mean() < 12, "lossy"
    assert json.loads((tmp_path / "out/video.json").read_text()) == {
        "settings": {"input_path": str(folder)},
        "output_path": str(path),
        "frames": 7,
        "fps": 12,
        "size": [33, 50],
    }


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ["--pretrained_weights", "a.pth", "--arch", "vit_tiny"],
            "leave out --pretrained_weights, --arch",
        ),
        (["--resize", "20"], "without a network: leave out --resize\n"),
        (["--threshold", "0.5", "--show", "mean"], "leave out --threshold, --show\n"),
        (["--input_path", "empty"], "no frames in empty: no file there ends in "),
        (["--input_path", "none"], "--input_path: there is no file or folder none"),
        (["--input_path", "a.mp4"], "--input_path a.mp4 is a file: name a folder"),
    ],
)
def test_a_mistake_with_video_only_is_one_line(folder, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").write_text("")
    asked = ["--video_only", "--input_path", str(folder), "--output_path", "out.mp4", *words]
    assert cli.main(["video", *asked]) == 2
    assert part in error_of(capsys)
    assert not (tmp_path / "out.mp4").exists()


def test_no_more_than_a_batch_of_frames_is_held(run, folder, tmp_path, monkeypatch):
    ahead, most = 0, 0

    def counted(frames, size):
        nonlocal ahead, most
        for batch in batches(frames, size):
            ahead += len(batch)
            most = max(most, ahead)
            yield batch

    def drawn(*args):
        nonlocal ahead
        ahead -= 1
        return draw_frame(*args)

    batches = video._batches
    monkeypatch.setattr(video, "_batches", counted)
    monkeypatch.setattr(video, "draw_frame", drawn)
    words = ["--input_path", folder, "--output_path", tmp_path / "a.mp4"]
    assert run(*words, "--batch_size_per_gpu", 2)[0] == 0
    assert (ahead, most) == (0, 2)
    assert [len(b) for b in batches(iter(range(5)), 2)] == [2, 2, 1]


def test_a_file_is_its_name_and_a_folder_holds_video(tmp_path):
    assert output_file(".", "mkv").name == "video.mkv"
    assert output_file(str(tmp_path / "a.MP4"), "mkv") == tmp_path / "a.MP4"
    assert output_file(str(tmp_path / "v1.2"), "mp4") == tmp_path / "v1.2/video.mp4"
    (tmp_path / "b.mp4").mkdir()
    assert output_file(str(tmp_path / "b.mp4"), "mp4") == tmp_path / "b.mp4/video.mp4"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--input_path", "missing.mp4"], "--input_path: there is no file or folder missing.mp4"),
        (
            ["--input_path", "text.mp4"],
            "found when processing input; expected a whole video that FFmpeg reads, or a folder",
        ),
        (["--output_path", "out.gif"], "out.gif: expected a folder, or a file that ends in .mp4"),
        (
            ["--input_path", "unequal"],
            "the frames in unequal are of unequal size: 0.png is 10 x 20",
        ),
        (["--resize", "7"], "an image of 7 x 10 px is smaller than a patch of 8 px"),
        (["--resize", "0"], "--resize must be a height and a width"),
        (["--threshold", "0"], "--threshold must be above 0"),
        (["--fps", "0"], "--fps must be from 0.1 to 1000, got 0.0"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu must be at least 1"),
        (["--arch", "resnet18", "--pretrained_weights", ""], "--arch resnet18 has no attention"),
        (["--output_path", "text.mp4/a.mp4"], "cannot write text.mp4/a.mp4"),
        (["--input_path", "text.mp4", "--output_path", "text.mp4"], "text.mp4 is the input"),
    ],
)
def test_a_mistake_is_one_line(run, folder, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "unequal").mkdir()
    for name, size in (("0.png", (20, 10)), ("1.png", (20, 12))):
        Image.new("RGB", size).save(tmp_path / "unequal" / name)
    status, printed, err = run("--input_path", folder, "--output_path", "out.mp4", *words)
    assert (status, printed) == (2, "")
    assert err.startswith("fastdino video: error: ")
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.mp4").exists()


def test_a_frame_that_breaks_half_way_leaves_no_video(run, folder, tmp_path, monkeypatch):
    """The header of the frame is good, its pixels are not."""
    data = (folder / "5.png").read_bytes()
    place = data.index(b"IDAT") + 20
    (folder / "5.png").write_bytes(data[:place] + b"\0" * 40 + data[place + 40 :])
    status, _, err = run("--input_path", folder, "--output_path", tmp_path / "out.mp4")
    assert status == 2
    assert f"error: {folder}/5.png cannot be" in err
    assert not list(tmp_path.glob("out*"))

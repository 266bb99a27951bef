"""Reading frames of videos and folders, and writing videos."""

from __future__ import annotations

import os
import struct
import weakref
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fastdino.errors import DataError
from fastdino.evals import video_io
from fastdino.evals.video_io import CLOCK, FORMATS, open_frames, video_writer


def frame(number, size=(32, 48)):
    """Return a frame with a red left half, and a green bar that moves down on the right."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : size[1] // 2] = (200, 30, 30)
    pixels[4 * number : 4 * number + 4, size[1] // 2 :] = (10, 200, 10)
    return pixels


def write_video(path, count=7, size=(32, 48), fps=12.5):
    with video_writer(path, fps) as write:
        for number in range(count):
            write(frame(number, size), number / fps)
    return path


@pytest.mark.parametrize("ending", FORMATS)
def test_written_video_is_read_back(tmp_path, ending):
    path = write_video(tmp_path / f"video{ending}")
    frames = open_frames(str(path))
    count = None if ending in (".mkv", ".webm") else 7  # Matroska states no count
    assert (frames.size, frames.fps, frames.count) == ((32, 48), 12.5, count)
    for _ in range(2):  # frames can be iterated twice
        decoded = list(frames)
        assert len(decoded) == 7
        for number, picture in enumerate(decoded):
            assert picture.mode == "RGB"
            difference = np.abs(np.asarray(picture).astype(int) - frame(number))
            assert difference.mean() < 8, "more than lossy compression with subsampled colors"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_odd_sides_are_padded_and_fractional_frame_rates_are_exact(tmp_path):
    path = write_video(tmp_path / "odd.mp4", count=2, size=(31, 45), fps=30000 / 1001)
    frames = open_frames(str(path))
    assert Fraction(frames.fps).limit_denominator(1001) == Fraction(30000, 1001)
    assert frames.size == (32, 46)
    picture = np.asarray(next(iter(frames))).astype(int)
    assert np.abs(picture[31] - picture[30]).mean() < 8


def test_rotation_of_a_phones_video_is_applied(tmp_path):
    # The matrix in the track header rotates by 90 degrees clockwise: left becomes top.
    path = write_video(tmp_path / "phone.mp4", count=1)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") - 4 + 48
    assert struct.unpack_from(">9i", data, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames = open_frames(str(path))
    assert frames.size == (48, 32)
    picture = np.asarray(next(iter(frames))).astype(int)
    assert picture[4:20, 4:-4, 0].min() > 150
    assert picture[28:, 4:-4, 0].max() < 100


def test_frames_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", count=7)
    references, counts = [], []
    make = Image.fromarray

    def counted(array):
        picture = make(array)
        references.append(weakref.ref(picture))
        counts.append(sum(reference() is not None for reference in references))
        return picture

    monkeypatch.setattr(video_io.Image, "fromarray", counted)
    for _ in open_frames(str(path)):
        pass
    assert len(counts) >= 7
    assert max(counts) <= 3


def test_frames_of_a_folder_are_in_numeric_order(tmp_path):
    for number in (10, 2, 1):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    frames = open_frames(str(tmp_path))
    assert (frames.size, frames.fps, frames.count) == ((10, 20), 30.0, 3)
    assert [picture.getpixel((0, 0))[0] for picture in frames] == [1, 2, 10]


def test_frames_of_different_sizes_are_rejected(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    frames = open_frames(str(tmp_path))
    Image.new("RGB", (20, 12)).save(tmp_path / "b.png")
    for _ in range(2):
        assert len(list(frames)) == 1
        assert frames.left_out == ["frame 1 is 12 x 20 px, and the first 10 x 20 px"]
    with pytest.raises(DataError, match=r"b.png is 12 x 20 px, but .*a.png is 10 x 20 px: resize"):
        open_frames(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("text.mp4", "text.mp4 cannot be decoded.*: Invalid data"),
        ("empty.mp4", "empty.mp4 cannot be decoded"),
        ("cut.mp4", "cut.mp4 cannot be decoded"),
        ("sound.mkv", "sound.mkv cannot be decoded: it has no video stream"),
        ("broken", r"broken.1.png (is|cannot)"),
    ],
)
def test_undecodable_input_is_reported(tmp_path, name, part):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with video_io.av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = video_io.av.AudioFrame(format="s16", layout="stereo", samples=80)
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=part) as raised:
        open_frames(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".avi"])
def test_a_damaged_part_of_a_video_leaves_the_rest(tmp_path, ending):
    path = tmp_path / f"video{ending}"
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (32, 48, 3), np.uint8) for _ in range(40)]
    with video_writer(path, 10) as write:
        for number, pixels in enumerate(noise):
            write(pixels, number / 10)
    with video_io.av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    for packet in packets[15:18]:
        assert packet in data
        data = data.replace(packet, bytes(len(packet)))
    path.write_bytes(data)
    frames = open_frames(str(path))
    read = list(frames.timed())
    assert len(frames.left_out) >= 1
    assert "Invalid data" in frames.left_out[0]
    assert 30 <= len(read) <= 39
    assert read[-1][1] == pytest.approx(3.9, abs=0.11)


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(DataError, match=r"x\.mp4: expected a regular file or a folder"):
        open_frames(str(tmp_path / "x.mp4"))


@pytest.mark.parametrize("longest", [3000, 4])
def test_avi_repeats_frames_to_keep_their_times(tmp_path, monkeypatch, longest):
    monkeypatch.setattr(video_io, "LONGEST_GAP", longest)
    path, levels = tmp_path / "out.avi", (0, 80, 160, 240)
    with video_writer(path, 10, CLOCK) as write:
        for level, seconds in zip(levels, (0, 0.02, 0.5, 2.0), strict=True):
            write(np.full((32, 48, 3), level, np.uint8), seconds)
    read = list(open_frames(str(path)).timed())
    shown = np.repeat(levels, (1, 4, 15, 1) if longest == 3000 else (1, 4, 4, 1))
    means = [float(np.asarray(frame).mean()) for frame, _ in read]
    assert means == pytest.approx(shown.tolist(), abs=3)
    times = np.arange(len(shown)) / 10
    assert [seconds for _, seconds in read] == pytest.approx(times.tolist())

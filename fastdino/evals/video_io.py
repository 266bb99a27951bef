"""Frames in and out: of a video file or a folder, one after the other; a video, written whole.

The only module that imports PyAV, which decodes and encodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.image_files import EXTENSIONS, Header, quiet_pillow, read_header, read_rgb
from fastdino.errors import DataError
from fastdino.files import atomic_write, explain_write_errors

# Ending of a file -> the container's name, and codecs: the first that is there is taken.
_H264 = ("libx264", "libopenh264", "mpeg4")
FORMATS = {
    ".mp4": ("mp4", _H264),
    ".mov": ("mov", _H264),
    ".mkv": ("matroska", _H264),
    ".avi": ("avi", _H264),
    ".webm": ("webm", ("libvpx-vp9", "libvpx")),
}
OTHER_FORMATS = (".gif", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".jpg", ".png")
EXPECTED = "expected a whole video that FFmpeg reads, or a folder of frames: convert it"
FOLDER_FPS = 30.0  # frames in a folder say nothing; the paper's video_generation.py takes this
QUALITY = "18"  # x264's and VP9's constant rate factor: blocks of patches keep their edges


@dataclass(frozen=True)
class Frames:
    """Frames of one size that are read one at a time, RGB, each time anew.

    size: height and width in pixels, as shown. fps: frames a second. count: how many there are,
    or what the file says of it; None: it says nothing.
    """

    path: str
    size: tuple[int, int]
    fps: float
    count: int | None
    read: Callable[[], Iterator[Image.Image]]

    def __iter__(self) -> Iterator[Image.Image]:
        """The frames; raises DataError where one cannot be decoded or has another size."""
        for number, frame in enumerate(self.read()):
            if (frame.height, frame.width) != self.size:
                raise DataError(
                    f"{self.path}: frame {number} is {frame.height} x {frame.width} px, those "
                    f"before it {self.size[0]} x {self.size[1]}: expected frames of one size"
                )
            yield frame


def open_frames(path: str) -> Frames:
    """A video file, or a folder of images in the order of their names (2.png before 10.png).

    Raises: DataError: there is nothing, it cannot be decoded, its frames are of different sizes.
    """
    if os.path.isdir(path):
        return _open_folder(Path(path))
    if not os.path.exists(path):
        raise DataError(f"--input_path: there is no file or folder {path}")
    return _open_video(path)


def _open_folder(folder: Path) -> Frames:
    files = [p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS]
    files.sort(key=lambda file: _natural(file.name))
    if not files:
        raise DataError(f"no frames in {folder}: no file there ends in {', '.join(EXTENSIONS)}")
    sizes = []
    for file in files:
        with quiet_pillow():
            header = read_header(str(file))
        if not isinstance(header, Header):
            raise DataError(f"{file} {header.reason}")
        sizes.append((header.height, header.width))
        if sizes[-1] != sizes[0]:
            raise DataError(
                f"the frames in {folder} are of unequal size: {files[0].name} is "
                f"{sizes[0][0]} x {sizes[0][1]} px, {file.name} {sizes[-1][0]} x {sizes[-1][1]}; "
                "expected one size: resize them first"
            )

    def read() -> Iterator[Image.Image]:
        for file in files:
            with quiet_pillow():
                frame = read_rgb(file)
            yield frame

    return Frames(str(folder), sizes[0], FOLDER_FPS, len(files), read)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _open_video(path: str) -> Frames:
    first = next(_decode(path), None)
    if first is None:
        raise DataError(f"{path} cannot be decoded: it holds no frame; {EXPECTED}")
    with _decoding(path), av.open(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
        count = stream.frames
        if not count and container.duration:
            count = round(container.duration / av.time_base * rate)
    return Frames(path, (first.height, first.width), rate, count or None, lambda: _decode(path))


def _decode(path: str) -> Iterator[Image.Image]:
    """The frames of the file's first video stream, turned as its metadata says."""
    number = 0
    with _decoding(path, lambda: f" at frame {number}"), av.open(path) as container:
        if not container.streams.video:
            raise DataError(f"{path} cannot be decoded: it has no video in it; {EXPECTED}")
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            # Phones film with the sensor as it lies, and note the turn, counterclockwise.
            turns = round(frame.rotation / 90) % 4
            yield Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            number += 1


@contextmanager
def _decoding(path: str, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns PyAV's errors into one that names the file."""
    try:
        yield
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{path} cannot be decoded{where()}: {reason}; {EXPECTED}") from error


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A function that adds a frame, uint8 [height, width, 3]; all must be of one size.

    The file is there when the block ends well, and not at all if it does not. Odd sides are made
    even by repeating the last row or column, as most players want it.

    Args:
        path: ends in one of FORMATS.
        fps: frames a second.

    Raises: CheckpointError: it cannot be written.
    """
    name, codecs = FORMATS[path.suffix.lower()]
    rate = Fraction(fps).limit_denominator(1001)
    with (
        explain_write_errors(path),
        atomic_write(path) as file,
        av.open(file, "w", format=name) as container,
    ):
        stream: Any = container.add_stream(_first_codec(codecs), rate=rate)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": QUALITY, "b": "0"} if name == "webm" else {"crf": QUALITY}
        began = False

        def write(pixels: NDArray[np.uint8]) -> None:
            nonlocal began
            height, width = pixels.shape[:2]
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not began:
                stream.height, stream.width = pixels.shape[:2]
                began = True
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))

        yield write
        if began:
            container.mux(stream.encode())


def _first_codec(names: tuple[str, ...]) -> str:
    for name in names[:-1]:
        if name in av.codecs_available:
            return name
    return names[-1]

"""Video input and output: frames of a video file or folder, and a video writer.

This is the only module that imports PyAV, which decodes and encodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.image_files import (
    AS_STORED,
    Conversion,
    Header,
    Unusable,
    quiet_pillow,
    read_headers,
)
from fastdino.data.image_names import EXTENSIONS, image_files
from fastdino.environment import cpu_count
from fastdino.errors import DataError
from fastdino.evals.frames import common_size
from fastdino.files import atomic_write, explain_write_errors
from fastdino.terminal import print_err

# Suffix -> container, and codecs in order of preference.
_H264 = ("libx264", "libopenh264", "mpeg4")
FORMATS = {
    ".mp4": ("mp4", _H264),
    ".mov": ("mov", _H264),
    ".mkv": ("matroska", _H264),
    ".avi": ("avi", _H264),
    ".webm": ("webm", ("libvpx-vp9", "libvpx")),
}
OTHER_FORMATS = (".gif", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".jpg", ".png")
EXPECTED = "expected a complete video that FFmpeg can read, or a folder of frames: convert it"
FOLDER_FPS = 30.0  # for folders of frames, as in the paper's video_generation.py
# A higher rate is that of a clock, as in recordings of browsers, and not one of frames.
HIGHEST_FPS = 240.0
# Seconds; a multiple of it lies between frames at 23.976, 24, 25, 29.97, 30, 50 and 60 fps. MPEG-4
# Part 2 has only 16 bits for it.
CLOCK, COARSE_CLOCK = Fraction(1, 720000), Fraction(1, 60000)
# AVI has a constant rate, and loses gaps between frames: they are filled by repeating a frame, but
# not for longer than this number of frames, whatever times a file states.
LONGEST_GAP = 3000
QUALITY = "18"  # constant rate factor of x264 and VP9, high enough to keep the edges of patches


@dataclass(frozen=True)
class Frames:
    """RGB frames of one size, decoded one at a time; each iteration starts from the first frame.

    Frames that cannot be used are left out. The others keep their times.

    Attributes:
        size: height and width in pixels, as displayed.
        fps: frames per second, on average if the rate is not constant.
        count: number of frames according to the header; None if it has no count.
        decode: starts decoding; yields each frame with its time in seconds from the first, and
            appends to a list why frames are left out.
        time_base: seconds that all times are multiples of.
        headers: of the image files in a folder.
        left_out: why frames were left out, in the iteration so far.
    """

    path: str
    size: tuple[int, int]
    fps: float
    count: int | None
    decode: Callable[[list[str]], Iterator[tuple[Image.Image, float]]]
    time_base: Fraction
    headers: list[Header | Unusable] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Image.Image]:
        """Decode the frames; raise DataError if none can be used."""
        return (frame for frame, _ in self.timed())

    def timed(self) -> Iterator[tuple[Image.Image, float]]:
        """Decode the frames with their times in seconds; raise DataError as iteration does."""
        self.left_out.clear()
        used = False
        for number, (frame, seconds) in enumerate(self.decode(self.left_out)):
            if (frame.height, frame.width) != self.size:
                self.left_out.append(
                    f"frame {number} is {frame.height} x {frame.width} px, and the first "
                    f"{self.size[0]} x {self.size[1]} px"
                )
                continue
            used = True
            yield frame, seconds
        if not used:
            raise DataError(f"no frame of {self.path} can be used: {self.left_out[0]}")


def open_frames(path: str, conversion: Conversion = AS_STORED) -> Frames:
    """Open a video file, or a folder of images in numeric order (2.png before 10.png).

    Args:
        conversion: how image files become RGB. A video file's own rotation always applies.

    Raises: DataError: the path does not exist, cannot be decoded, or frames differ in size.
    """
    if os.path.isdir(path):
        return _open_folder(Path(path), conversion)
    if not os.path.exists(path):
        raise DataError(f"--input_path {path}: no such file or folder")
    if not os.path.isfile(path):  # reading a pipe could block
        raise DataError(f"--input_path {path}: expected a regular file or a folder")
    return _open_video(path)


def _open_folder(folder: Path, conversion: Conversion) -> Frames:
    files = image_files(folder)
    if not files:
        raise DataError(f"no frames in {folder}: no file ends in {', '.join(EXTENSIONS)}")

    def decode(left_out: list[str]) -> Iterator[tuple[Image.Image, float]]:
        for number, file in enumerate(files):
            try:
                with quiet_pillow():
                    frame = conversion.read(file)
            except DataError as error:
                left_out.append(str(error))
                continue
            yield frame, number / FOLDER_FPS

    headers = read_headers(files, cpu_count())
    good = {path: one for path, one in zip(files, headers, strict=True) if isinstance(one, Header)}
    if not good:
        raise DataError(f"no frame of {folder} can be used: {files[0]} {headers[0][0]}")
    size, time_base = common_size(good, conversion), frame_time(FOLDER_FPS)
    return Frames(str(folder), size, FOLDER_FPS, len(files), decode, time_base, headers)


def frame_time(fps: float) -> Fraction:
    """Return the seconds between frames at a constant rate."""
    return 1 / Fraction(fps).limit_denominator(1001)


def _open_video(path: str) -> Frames:
    left_out: list[str] = []
    first, _ = next(_decode(path, left_out), (None, 0.0))
    if first is None:
        reason = left_out[0] if left_out else "it has no frames"
        raise DataError(f"{path} cannot be decoded: {reason}; {EXPECTED}")
    with av.open(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
        count = stream.frames
        seconds = (container.duration or 0) / av.time_base
    if rate > HIGHEST_FPS:
        rate = count / seconds if count and seconds else FOLDER_FPS
    size = (first.height, first.width)
    return Frames(path, size, rate, count or None, partial(_decode, path), CLOCK)


def _decode(path: str, left_out: list[str]) -> Iterator[tuple[Image.Image, float]]:
    """Decode the first video stream of a file, rotated for display, with the frames' times.

    left_out: gets the reasons why parts of the stream cannot be decoded.
    """
    number, start, seconds = 0, 0.0, 0.0
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DataError(f"{path} cannot be decoded: it has no video stream; {EXPECTED}")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            step = 1 / float(stream.average_rate or FOLDER_FPS)
            # AVI states no times: FFmpeg returns those of decoding, which is in another order.
            timeless = container.format.name == "avi"
            for frame in _decoded_packets(container, stream, left_out):
                if frame is None:
                    seconds += step
                    continue
                # Phones store frames in the sensor's orientation, with a counterclockwise rotation.
                turns = round(frame.rotation / 90) % 4
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), turns)
                known = frame.time is not None and not timeless
                seconds = frame.time if known else seconds + step
                start = start if number else seconds
                yield Image.fromarray(pixels), seconds - start
                number += 1
    except av.FFmpegError as error:
        reason = f"cannot be decoded from frame {number} on: {_reason(error)}"
        if not number:
            raise DataError(f"{path} cannot be decoded: {_reason(error)}; {EXPECTED}") from error
        left_out.append(reason)


def _decoded_packets(container: Any, stream: Any, left_out: list[str]) -> Iterator[Any]:
    """Yield the frames of a stream, and None for each packet that cannot be decoded."""
    number = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            left_out.append(f"after frame {number}: {_reason(error)}")
            frames = [None]
        for frame in frames:
            yield frame
            number += frame is not None


def _reason(error: Any) -> str:
    return error.strerror or type(error).__name__


def warn_of_missing(frames: Frames, count: int) -> None:
    """Warn of frames that were left out, or are missing."""
    warning = ""
    if frames.left_out:
        more = f"; and {len(frames.left_out) - 1} more" if len(frames.left_out) > 1 else ""
        warning = f"frames left out: {frames.left_out[0]}{more}"
    elif frames.count not in (None, count):
        warning = f"the header announces {frames.count} frames, but {count} were decoded"
    if warning:
        print_err(f"{frames.path}: {warning}")


@contextmanager
def video_writer(
    path: Path, fps: float, time_base: Fraction | None = None
) -> Iterator[Callable[[NDArray[np.uint8], float], None]]:
    """Provide a function that appends a frame to a new video.

    It takes the pixels, uint8 [height, width, 3], and the time in seconds from the first frame.

    All frames must have one size. Odd sides are padded with the last row or column, because most
    players need even sides. The file appears only if the block ends without an error; missing
    parent folders are created.

    Args:
        path: ends in one of FORMATS.
        fps: frames per second, on average.
        time_base: unit of the times in seconds; default: 1 / fps. AVI has no other, and repeats
            frames to keep the times.

    Raises: CheckpointError: the file cannot be written.
    """
    name, codecs = FORMATS[path.suffix.lower()]
    codec = next((codec for codec in codecs if codec in av.codecs_available), codecs[-1])
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file, av.open(file, "w", format=name) as container:
            stream: Any = container.add_stream(codec, rate=1 / frame_time(fps))
            if time_base is None or name == "avi":
                time_base = frame_time(fps)
            if codec == "mpeg4":
                time_base = max(time_base, COARSE_CLOCK)
            stream.codec_context.time_base = time_base
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": QUALITY, "b": "0"} if name == "webm" else {"crf": QUALITY}
            last, before = -1, None

            def write(pixels: NDArray[np.uint8], seconds: float) -> None:
                nonlocal last, before
                height, width = pixels.shape[:2]
                pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if before is None:
                    stream.height, stream.width = pixels.shape[:2]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                place = max(last + 1, round(seconds / time_base))
                if name == "avi" and before is not None:
                    place = min(place, last + LONGEST_GAP)
                    for number in range(last + 1, place):
                        before.pts = number
                        container.mux(stream.encode(before))
                frame.pts, frame.time_base = place, time_base
                container.mux(stream.encode(frame))
                last, before = place, frame

            yield write
            if before is not None:
                container.mux(stream.encode())

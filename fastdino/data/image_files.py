"""Bytes and headers of images, in files and parts of files; read again where a network fails.

What cannot be used is told in a few words: reason_of gives them.
"""

from __future__ import annotations

import errno
import io
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from PIL import Image, UnidentifiedImageError

from fastdino.errors import DataError

T = TypeVar("T")

# File names of images, as in torchvision.datasets.ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What a network file system says while it recovers; other errors last, and are told at once.
TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EIO",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
}  # fmt: skip
# Seconds before each further try.
PAUSES = (0.1, 0.5, 2.0)

# The last bytes of a whole file, for the formats whose header says nothing about its length.
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

# Modes whose pixels are numbers: a palette's, gray of 8 bits, of 1, of 32, of 16.
NUMBERS = ("P", "L", "1", "I", "I;16")

_ORIENTATION = 0x0112
# EXIF orientation -> what turns the picture upright; those from 5 on swap height and width.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableImageError(Exception):
    """An image that is not whole; the message goes after its name."""


class Header(NamedTuple):
    """Height and width in pixels as stored, and whether EXIF orientation would swap the two."""

    height: int
    width: int
    swapped: bool


class Unusable(NamedTuple):
    """Why an image cannot be used. `passing`: reading failed, and may not the next time."""

    reason: str
    passing: bool


class Part(NamedTuple):
    """Where an image lies in a file, in bytes; `inflated`: its own length where it is deflated."""

    offset: int
    length: int
    inflated: int = 0


class Window(io.RawIOBase):
    """`length` bytes from `offset` on of the open file `descriptor`, as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._place = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._length - self._place))
        data = os.pread(self._descriptor, wanted, self._offset + self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def retrying(read: Callable[[], T]) -> T:
    """What `read` returns, tried again after each of PAUSES where its OSError may pass."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(pause)
    try:
        return read()
    except OSError as error:
        if error.errno in TRANSIENT:
            error.strerror = f"{error.strerror}, {len(PAUSES) + 1} times"
        raise


def read_file(path: str) -> bytes:
    """All of a file; raises OSError when reading keeps failing."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    return retrying(read)


def read_part(path: str, part: Part) -> bytes:
    """The image in a part of a file.

    Raises: OSError: as read_file. UnusableImageError: the file ends early, or is not deflated as
        its part says.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(part.offset)
            return file.read(part.length)

    data = retrying(read)
    if len(data) < part.length:
        raise UnusableImageError(f"is cut off: {os.path.basename(path)} ends within it")
    return _inflate(data, part.inflated) if part.inflated else data


def _inflate(data: bytes, length: int) -> bytes:
    """The `length` bytes that were deflated, without a header, as zips hold them."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, length)
    except zlib.error as error:
        raise UnusableImageError(f"cannot be inflated: {error}") from error
    if len(inflated) < length:
        raise UnusableImageError(f"is cut off: {len(inflated)} of {length} bytes")
    return inflated


def read_header(path: str, part: Part | None = None) -> Header | Unusable:
    """The header of an image that is a file, or that is a part of one.

    A JPEG or PNG whose end marker is missing is decoded, to see whether it is whole.
    """

    def read() -> Header:
        if part is not None and part.inflated:
            return _header(io.BytesIO(read_part(path, part)))
        with open(path, "rb") as file:
            if part is None:
                return _header(file)
            with io.BufferedReader(Window(file.fileno(), part.offset, part.length)) as window:
                return _header(window)

    try:
        return retrying(read)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds on broken headers.
        return Unusable(reason_of(error), isinstance(error, OSError) and bool(error.errno))


def _header(file: BinaryIO) -> Header:
    if file.seek(0, os.SEEK_END) == 0:
        raise UnusableImageError("is empty (0 bytes)")
    file.seek(0)
    with Image.open(file) as image:
        width, height = image.size
        if not _ends_well(file, image.format):
            image.load()
        return Header(height, width, orientation(image) >= 5)


def _ends_well(file: BinaryIO, image_format: str | None) -> bool:
    marker = _END_MARKERS.get(image_format or "", b"")
    place = file.tell()
    file.seek(-min(len(marker), file.seek(0, os.SEEK_END)), os.SEEK_END)
    ends_well = file.read() == marker
    file.seek(place)
    return ends_well


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that is valid, or Pillow applies it."""
    data = image.info.get("exif")
    if not data or image.format == "TIFF":
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # Broken metadata of a good picture: all kinds.
        return 1
    return value if value in _TURNS else 1


def decode_rgb(data: bytes, *, exif: bool = False) -> Image.Image:
    """The decoded image as torchvision's pil_loader gives it: RGB, no EXIF rotation.

    exif: apply it.
    """
    with Image.open(io.BytesIO(data)) as image:
        return upright(image) if exif else image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says."""
    rgb = image.convert("RGB")  # First: what follows the pixels is read with them.
    turn = _TURNS.get(orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def reason_of(error: BaseException) -> str:
    """A short reason for a report, from what reading or decoding a file raised."""
    if isinstance(error, UnusableImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "is not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be decoded: {error or type(error).__name__}"


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """silence_pillow() for a while. It reaches all threads: enter it in one of them alone."""
    with warnings.catch_warnings():
        silence_pillow()
        yield


def silence_pillow() -> None:
    """Silences Pillow's warnings (large images, odd metadata), in all threads."""
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


@contextmanager
def explained_reading(path: str | Path) -> Iterator[None]:
    """Turns what reading or decoding a file raises into a DataError: its name, and why."""
    try:
        yield
    except (MemoryError, DataError):
        raise
    except Exception as error:  # Pillow's plugins raise all kinds on broken files.
        raise DataError(f"{path} {reason_of(error)}") from error


def read_rgb(path: str | Path) -> Image.Image:
    """The picture of a file as decode_rgb gives it; raises DataError where it cannot be read."""
    with explained_reading(path):
        return decode_rgb(read_file(str(path)))

"""Reading the bytes, headers and pixels of image files and of byte ranges in archives.

Reads are repeated after errors that network file systems raise while they recover.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import IO, NamedTuple, ParamSpec, TypeVar

from PIL import Image, UnidentifiedImageError
from PIL.ContainerIO import ContainerIO

from fastdino.data.rgb_conversion import has_pages, is_deep, to_rgb
from fastdino.errors import DataError
from fastdino.waiting import DaemonExecutor

P = ParamSpec("P")
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
T = TypeVar("T")

# Errors of a network file system that may disappear; any other error is raised at once.
_NETWORK_ERRORS = (
    "EAGAIN EBUSY ECONNABORTED ECONNRESET EHOSTDOWN EHOSTUNREACH EIO ENETDOWN ENETRESET "
    "ENETUNREACH ENOTCONN EREMOTEIO ESTALE ETIMEDOUT"
)
TRANSIENT = {getattr(errno, n) for n in _NETWORK_ERRORS.split() if hasattr(errno, n)}
# Seconds before each retry.
PAUSES = (0.1, 0.5, 2.0)

# Last bytes of a complete file, for formats whose header does not give the file's length.
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

# Bytes of the largest encoded image that is read: a gigapixel camera's file. A file or member that
# claims more is broken, or made to fill the memory.
LARGEST_IMAGE = 1 << 29

# Modes with one number per pixel: palette, 8-bit gray, 1-bit, 32-bit, 16-bit.
NUMBERS = ("P", "L", "1", "I", "I;16")

_ORIENTATION = 0x0112
# EXIF orientation -> transpose that makes the image upright; 5 to 8 swap height and width.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Traits of an image: its EXIF orientation swaps height and width; it has one channel of more than 8
# bits; it has further pages or frames, which are not used.
SWAPPED, DEEP, PAGED = 1, 2, 4


class UnusableImageError(Exception):
    """An incomplete or damaged image; the message continues a sentence after its name."""


class Header(NamedTuple):
    """Height and width in pixels as stored, and the sum of SWAPPED, DEEP and PAGED that apply."""

    height: int
    width: int
    traits: int = 0


class Unusable(NamedTuple):
    """A reason why an image cannot be used; transient if reading it may succeed later."""

    reason: str
    transient: bool


class Part(NamedTuple):
    """The byte range of an image in a file; `inflated` is its length before Deflate, if used."""

    offset: int
    length: int
    inflated: int = 0


def retrying(read: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to be called again after each of PAUSES on a transient OSError."""

    @wraps(read)
    def call(*args: P.args, **options: P.kwargs) -> T:
        for pause in (*PAUSES, None):
            try:
                return read(*args, **options)
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                if pause is None:
                    error.strerror = f"{error.strerror}, {len(PAUSES) + 1} times"
                    raise
                time.sleep(pause)
        raise AssertionError

    return call


def open_file(path: str) -> IO[bytes]:
    """Open a regular file for reading; anything else could block or never end.

    Raises: OSError: it cannot be opened, or is a pipe, socket or device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return open(path, "rb")


@retrying
def read_file(
    path: str, offset: int = 0, length: int = -1, *, largest: int = LARGEST_IMAGE
) -> bytes:
    """Read a file, or `length` bytes from an offset.

    Raises: OSError: reading keeps failing, or a whole file has more than `largest` bytes.
    """
    with open_file(path) as file:
        if length < 0 and os.fstat(file.fileno()).st_size > largest:
            raise OSError(errno.EFBIG, f"larger than {largest / 1e6:,.0f} MB", path)
        file.seek(offset)
        return file.read(length)


def read_part(path: str, part: Part) -> bytes:
    """Read the image in a part of a file.

    Raises: OSError: reading keeps failing. UnusableImageError: the file ends early, or the part is
        not Deflate data of the expected length.
    """
    data = read_file(path, part.offset, part.length)
    if len(data) < part.length:
        raise UnusableImageError(f"is cut off: {os.path.basename(path)} ends within it")
    if not part.inflated:
        return data
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, part.inflated)
    except zlib.error as error:
        raise UnusableImageError(f"cannot be inflated: {error}") from error
    if len(inflated) < part.inflated:
        raise UnusableImageError(f"is cut off: {len(inflated)} of {part.inflated} bytes")
    return inflated


def read_header(path: str, part: Part | None = None) -> Header | Unusable:
    """Read the header of an image file, or of the image in a part of a file.

    A JPEG or PNG without its end marker is decoded, to check whether it is complete.
    """
    try:
        return _read_header(path, part)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise many types on broken headers
        return Unusable(reason_of(error), isinstance(error, OSError) and bool(error.errno))


@retrying
def _read_header(path: str, part: Part | None) -> Header:
    if part is not None:
        check_size(max(part.length, part.inflated))
    if part is not None and part.inflated:
        return _parse_header(io.BytesIO(read_part(path, part)))
    with open_file(path) as file:
        return _parse_header(ContainerIO(file, part.offset, part.length) if part else file)


def read_headers(paths: Sequence[Path], workers: int) -> list[Header | Unusable]:
    """Read the headers of image files in threads."""
    with DaemonExecutor(workers) as pool, quiet_pillow():
        return list(pool.map(read_header, map(str, paths)))


def count_deep(headers: Iterable[Header | Unusable]) -> int:
    """Count the images with one channel of more than 8 bits."""
    return sum(isinstance(header, Header) and bool(header.traits & DEEP) for header in headers)


def check_size(size: int) -> None:
    """Raise UnusableImageError unless this can be the number of bytes of an encoded image."""
    if size == 0:
        raise UnusableImageError("is empty (0 bytes)")
    if size > LARGEST_IMAGE:
        raise UnusableImageError(
            f"has {size / 1e6:,.0f} MB, more than {LARGEST_IMAGE / 1e6:,.0f} MB of an image"
        )


def _parse_header(file: IO[bytes]) -> Header:
    file.seek(0, os.SEEK_END)
    check_size(file.tell())
    file.seek(0)
    with Image.open(file) as image:
        width, height = image.size
        position, marker = file.tell(), _END_MARKERS.get(image.format or "", b"")
        file.seek(-len(marker), os.SEEK_END)
        if file.read() != marker:
            file.seek(position)
            image.load()
        traits = SWAPPED * (orientation(image) >= 5) | DEEP * is_deep(image)
        return Header(height, width, traits | PAGED * has_pages(image))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or invalid, or Pillow applies it."""
    data = image.info.get("exif")
    if not data or image.format == "TIFF":
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # broken metadata of a good image: of any type
        return 1
    return value if value in _TRANSPOSES else 1


class Conversion(NamedTuple):
    """How an opened image becomes the RGB picture of a network.

    The default is that of torchvision's pil_loader.

    exif: rotate it according to its EXIF orientation.
    image_range: "clip" or "scale" (rgb_conversion.to_rgb).
    """

    exif: bool = False
    image_range: str = "clip"

    def apply(self, image: Image.Image, box: Box | None = None) -> Image.Image:
        """Convert an image to RGB, cut out a box of the stored pixels, and rotate it."""
        rgb = to_rgb(image, self.image_range)  # first: decoding reads metadata after the pixels
        rgb = rgb if box is None else rgb.crop(box)
        transpose = _TRANSPOSES.get(orientation(image)) if self.exif else None
        return rgb if transpose is None else rgb.transpose(transpose)

    def decode(self, data: bytes, box: Box | None = None) -> Image.Image:
        """Decode an image, and convert it as `apply` does."""
        with Image.open(io.BytesIO(data)) as image:
            return self.apply(image, box)

    def read(self, path: str | Path, box: Box | None = None) -> Image.Image:
        """Read an image file, and convert it as `apply` does; raise DataError if that fails."""
        with explained_reading(path):
            return self.decode(read_file(str(path)), box)

    def size_of(self, header: Header) -> tuple[int, int]:
        """Return the height and width of an image after its rotation."""
        height, width = header[:2]
        return (width, height) if self.exif and header.traits & SWAPPED else (height, width)


AS_STORED = Conversion()


def reason_of(error: BaseException) -> str:
    """Return a short reason for an exception from reading or decoding a file."""
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
    """Silence Pillow's warnings during the block, in all threads; enter it in one thread only."""
    with warnings.catch_warnings():
        silence_pillow()
        yield


def silence_pillow() -> None:
    """Silence Pillow's warnings about large images and odd metadata, in all threads."""
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


@contextmanager
def explained_reading(path: str | Path) -> Iterator[None]:
    """Turn an exception from reading or decoding a file into a DataError with its path."""
    try:
        yield
    except (MemoryError, DataError):
        raise
    except Exception as error:  # Pillow's plugins raise many types on broken files
        raise DataError(f"{path} {reason_of(error)}") from error

"""Tests of fastdino.data.image_files: bytes, headers, retries, EXIF orientation."""

from __future__ import annotations

import errno
import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastdino.data import image_files
from fastdino.data.image_files import (
    SWAPPED,
    Conversion,
    Header,
    Part,
    UnusableImageError,
    orientation,
    read_file,
    read_header,
    read_part,
    reason_of,
)


@pytest.fixture
def failing(monkeypatch):
    """A function that makes open() fail `times` times; returns the list of pauses that follow."""

    def fail(number, times):
        pauses, remaining = [], [times]
        monkeypatch.setattr(image_files.time, "sleep", pauses.append)

        def fails(path):
            if remaining[0] > 0:
                remaining[0] -= 1
                raise OSError(number, os.strerror(number), path)
            return open(path, "rb")

        monkeypatch.setattr(image_files, "open_file", fails)
        return pauses

    return fail


@pytest.fixture
def file(tmp_path, picture):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture())
    return path


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ENOTCONN"])
@pytest.mark.parametrize("times", [1, 3])
def test_transient_errors_are_retried(file, failing, name, times):
    data = file.read_bytes()
    whole = Part(0, len(data))
    for read, expected in (
        (read_file, data),
        (lambda path: read_part(path, whole), data),
        (read_header, Header(10, 20, False)),
    ):
        pauses = failing(getattr(errno, name), times)
        assert read(str(file)) == expected
        assert pauses == list(image_files.PAUSES[:times])


def test_persistent_failure_reports_file_and_number_of_tries(file, failing):
    pauses = failing(errno.EIO, 99)
    with pytest.raises(OSError, match="Input/output error, 4 times.*a.jpg") as error:
        read_file(str(file))
    assert pauses == list(image_files.PAUSES)
    assert reason_of(error.value) == "cannot be read: Input/output error, 4 times"
    assert read_header(str(file)) == ("cannot be read: Input/output error, 4 times", True)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_other_errors_are_raised_at_once(file, failing, number):
    pauses = failing(number, 1)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_file(str(file))
    assert pauses == []


def test_part_is_read_and_inflated_to_its_length(file):
    data, path = file.read_bytes(), str(file)
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = deflater.compress(data) + deflater.flush()
    file.write_bytes(b"x" * 9 + deflated + data)
    part = Part(9, len(deflated), len(data))
    plain = Part(9 + len(deflated), len(data))
    assert read_part(path, part) == read_part(path, plain) == data
    assert read_header(path, part) == Header(10, 20, False)
    for wrong, message in (
        (plain._replace(length=len(data) + 1), f"{file.name} ends within it"),
        (part._replace(inflated=len(data) + 1), f"is cut off: {len(data)} of {len(data) + 1}"),
        (part._replace(offset=0), "cannot be inflated"),
    ):
        with pytest.raises(UnusableImageError, match=message):
            read_part(path, wrong)


def test_header_is_read_from_the_part(tmp_path, picture):
    first, second = picture(size=(30, 40)), picture(form="PNG", size=(7, 9))
    path = tmp_path / "two"
    path.write_bytes(b"x" * 100 + first + second + b"y" * 100)
    assert read_header(str(path), Part(100, len(first))) == Header(40, 30)
    assert read_header(str(path), Part(100 + len(first), len(second))) == Header(9, 7)
    cut, transient = read_header(str(path), Part(100, len(first) - 300))
    assert "truncated" in cut
    assert not transient
    assert read_header(str(path), Part(100, 0)) == ("is empty (0 bytes)", False)
    assert read_header(str(path), Part(0, 50)) == ("is not an image", False)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied_on_request(tmp_path, picture, form, value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = picture(1, (20, 10), form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        as_stored, rotated = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(Conversion().decode(data), as_stored)
    assert np.array_equal(Conversion(exif=True).decode(data), rotated)
    path = tmp_path / "a"
    path.write_bytes(data)
    height, width, traits = read_header(str(path))
    assert (height, width) == (as_stored.height, as_stored.width)
    assert traits == SWAPPED * (rotated.size != as_stored.size)


@pytest.mark.parametrize("value", range(1, 9))
def test_a_box_is_in_pixels_as_stored(picture, value):
    """It is cut out before the image is rotated."""
    exif = Image.Exif()
    exif[0x0112] = value
    data, box = picture(1, (20, 10), exif=exif), (3, 1, 15, 6)
    with Image.open(io.BytesIO(data)) as image:
        piece = image.convert("RGB").crop(box)
    assert np.array_equal(Conversion().decode(data, box), piece)
    piece.getexif()[0x0112] = value
    rotated = ImageOps.exif_transpose(piece)
    assert rotated.size == ((5, 12) if value >= 5 else (12, 5))
    assert np.array_equal(Conversion(exif=True).decode(data, box), rotated)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_only_files_without_their_end_are_decoded_by_a_scan(tmp_path, picture, monkeypatch, form):
    decoded, load = [], ImageFile.ImageFile.load

    def counted(image):
        decoded.append(image.format)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    path = tmp_path / "a"
    path.write_bytes(picture(1, (20, 10), form))
    assert read_header(str(path)) == Header(10, 20)
    assert decoded == []
    path.write_bytes(path.read_bytes() + b"and more")
    assert read_header(str(path)) == Header(10, 20)
    assert decoded == [form]


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0no metadata", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", 9]
)
def test_broken_metadata_does_not_rotate(exif):
    image = Image.new("RGB", (2, 1))
    if isinstance(exif, int):
        metadata = Image.Exif()
        metadata[0x0112] = exif
        exif = metadata.tobytes()
    image.info["exif"] = exif
    assert orientation(image) == 1


def test_a_whole_file_has_a_largest_size(tmp_path):
    path = str(tmp_path / "x")
    with open(path, "wb") as file:
        file.truncate(101)  # sparse: a crafted file claims its size without using the disk
    with pytest.raises(OSError, match="larger than 0 MB"):
        read_file(path, largest=100)
    assert len(read_file(path, largest=101)) == 101
    assert len(read_file(path, 100, 1, largest=100)) == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000"])
def test_headers_of_too_many_pixels_are_unusable(tmp_path, monkeypatch, form):
    Image.new("RGB", (64, 64)).save(tmp_path / "x", form)
    assert isinstance(read_header(str(tmp_path / "x")), Header)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    header = read_header(str(tmp_path / "x"))
    assert "has too many pixels" in header.reason
    assert not header.transient


def test_text_of_a_png_cannot_fill_the_memory(tmp_path):
    text = PngInfo()
    for i in range(10):
        text.add_text(f"key{i}", "x" * 10_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=text)
    assert "cannot be decoded" in read_header(str(tmp_path / "x.png")).reason

"""Tests of fastdino.data.image_files: bytes, headers, retries, EXIF orientation."""

from __future__ import annotations

import errno
import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastdino.data import image_files
from fastdino.data.image_files import (
    Header,
    Part,
    UnusableImageError,
    Window,
    decode_rgb,
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

        def fails(path, *args, **options):
            if remaining[0] > 0:
                remaining[0] -= 1
                raise OSError(number, os.strerror(number), path)
            return open(path, *args, **options)

        monkeypatch.setattr(image_files, "open", fails, raising=False)
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
    for read in (read_file, lambda path: read_part(path, Part(0, file.stat().st_size))):
        pauses = failing(getattr(errno, name), times)
        assert read(str(file)) == file.read_bytes()
        assert pauses == list(image_files.PAUSES[:times])
    failing(getattr(errno, name), times)
    assert read_header(str(file)) == Header(10, 20, False)


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


def test_part_beyond_the_end_is_cut_off(file):
    size = file.stat().st_size
    assert read_part(str(file), Part(10, size - 10)) == file.read_bytes()[10:]
    with pytest.raises(UnusableImageError, match=f"{file.name} ends within it"):
        read_part(str(file), Part(10, size))


def test_deflated_part_is_inflated_to_its_length(tmp_path, picture):
    data = picture(size=(30, 40))
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = deflater.compress(data) + deflater.flush()
    path = tmp_path / "part"
    path.write_bytes(b"x" * 9 + deflated + b"y" * 9)
    part = Part(9, len(deflated), len(data))
    assert read_part(str(path), part) == data
    assert read_header(str(path), part) == Header(40, 30, False)
    with pytest.raises(UnusableImageError, match=f"is cut off: {len(data)} of {len(data) + 1}"):
        read_part(str(path), part._replace(inflated=len(data) + 1))
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UnusableImageError, match="cannot be inflated"):
        read_part(str(path), part)


def test_header_is_read_from_the_part(tmp_path, picture):
    first, second = picture(size=(30, 40)), picture(form="PNG", size=(7, 9))
    path = tmp_path / "two"
    path.write_bytes(b"x" * 100 + first + second + b"y" * 100)
    assert read_header(str(path), Part(100, len(first))) == Header(40, 30, False)
    assert read_header(str(path), Part(100 + len(first), len(second))) == Header(9, 7, False)
    cut, transient = read_header(str(path), Part(100, len(first) - 300))
    assert "truncated" in cut
    assert not transient
    assert read_header(str(path), Part(100, 0)) == ("is empty (0 bytes)", False)
    assert read_header(str(path), Part(0, 50)) == ("is not an image", False)


def test_window_reads_only_its_range(tmp_path):
    path = tmp_path / "digits"
    path.write_bytes(b"0123456789")
    with open(path, "rb") as file, Window(file.fileno(), 3, 4) as window:
        assert window.read() == b"3456"
        assert window.seek(-3, os.SEEK_END) == 1
        assert window.read(2) == b"45"
        assert window.seek(1, os.SEEK_CUR) == 4
        assert window.read(1) == b""


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied_on_request(tmp_path, picture, form, value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = picture(1, (20, 10), form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        as_stored, rotated = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(decode_rgb(data), as_stored)
    assert np.array_equal(decode_rgb(data, exif=True), rotated)
    path = tmp_path / "a"
    path.write_bytes(data)
    height, width, swapped = read_header(str(path))
    assert (height, width) == (as_stored.height, as_stored.width)
    assert swapped == (rotated.size != as_stored.size)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0no metadata", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_broken_metadata_does_not_rotate(exif):
    image = Image.new("RGB", (2, 1))
    image.info["exif"] = exif
    assert orientation(image) == 1


def test_invalid_orientation_does_not_rotate(picture):
    exif = Image.Exif()
    exif[0x0112] = 9
    data = picture(exif=exif)
    assert np.array_equal(decode_rgb(data, exif=True), decode_rgb(data))

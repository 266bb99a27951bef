"""fastdino.data.image_files: bytes and headers, a network that fails, EXIF orientation."""

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
    """Makes open() fail `times` times with an error of the system; gives the pauses that follow."""

    def fail(number, times):
        pauses, left = [], [times]
        monkeypatch.setattr(image_files.time, "sleep", pauses.append)

        def fails(path, *args, **options):
            if left[0] > 0:
                left[0] -= 1
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
def test_what_may_pass_is_tried_again(file, failing, name, times):
    for read in (read_file, lambda path: read_part(path, Part(0, file.stat().st_size))):
        pauses = failing(getattr(errno, name), times)
        assert read(str(file)) == file.read_bytes()
        assert pauses == list(image_files.PAUSES[:times])
    failing(getattr(errno, name), times)
    assert read_header(str(file)) == Header(10, 20, False)


def test_what_keeps_failing_is_told_with_the_file_and_the_tries(file, failing):
    pauses = failing(errno.EIO, 99)
    with pytest.raises(OSError, match="Input/output error, 4 times.*a.jpg") as error:
        read_file(str(file))
    assert pauses == list(image_files.PAUSES)
    assert reason_of(error.value) == "cannot be read: Input/output error, 4 times"
    assert read_header(str(file)) == ("cannot be read: Input/output error, 4 times", True)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_what_lasts_is_told_at_once(file, failing, number):
    pauses = failing(number, 1)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_file(str(file))
    assert pauses == []


def test_a_part_beyond_the_end_is_cut_off(file):
    size = file.stat().st_size
    assert read_part(str(file), Part(10, size - 10)) == file.read_bytes()[10:]
    with pytest.raises(UnusableImageError, match=f"{file.name} ends within it"):
        read_part(str(file), Part(10, size))


def test_a_part_that_is_deflated_is_inflated_to_the_length_it_had(tmp_path, picture):
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


def test_a_header_is_that_of_the_part(tmp_path, picture):
    first, second = picture(size=(30, 40)), picture(form="PNG", size=(7, 9))
    path = tmp_path / "two"
    path.write_bytes(b"x" * 100 + first + second + b"y" * 100)
    assert read_header(str(path), Part(100, len(first))) == Header(40, 30, False)
    assert read_header(str(path), Part(100 + len(first), len(second))) == Header(9, 7, False)
    cut, passing = read_header(str(path), Part(100, len(first) - 300))
    assert "truncated" in cut
    assert not passing
    assert read_header(str(path), Part(100, 0)) == ("is empty (0 bytes)", False)
    assert read_header(str(path), Part(0, 50)) == ("is not an image", False)


def test_a_window_is_a_file_of_its_own(tmp_path):
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
def test_orientation_is_applied_where_it_is_asked_for(tmp_path, picture, form, value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = picture(1, (20, 10), form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        as_stored, turned = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(decode_rgb(data), as_stored)
    assert np.array_equal(decode_rgb(data, exif=True), turned)
    path = tmp_path / "a"
    path.write_bytes(data)
    height, width, swapped = read_header(str(path))
    assert (height, width) == (as_stored.height, as_stored.width)
    assert swapped == (turned.size != as_stored.size)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0no metadata", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_broken_metadata_turns_nothing(exif):
    image = Image.new("RGB", (2, 1))
    image.info["exif"] = exif
    assert orientation(image) == 1


def test_an_orientation_that_there_is_not_turns_nothing(picture):
    exif = Image.Exif()
    exif[0x0112] = 9
    data = picture(exif=exif)
    assert np.array_equal(decode_rgb(data, exif=True), decode_rgb(data))

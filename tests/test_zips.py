"""Tests of fastdino.data.datasets.zips."""

from __future__ import annotations

import struct
import zipfile

import pytest

from fastdino.data.datasets.zips import index_zip, is_zip
from fastdino.data.image_dataset import scan_images
from fastdino.data.image_files import Part, UnusableImageError, read_part
from fastdino.errors import DataError


def index(path):
    return index_zip(str(path))


def read(path, part):
    return read_part(str(path), Part(*part.tolist()))


@pytest.fixture
def make_zip(tmp_path):
    """A function that writes a zip of named members: bytes, or (bytes, method)."""

    def make(name, members):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                data, method = content if isinstance(content, tuple) else (content, 0)
                archive.writestr(member, data, compress_type=method)
        return path

    return make


@pytest.fixture
def members(picture):
    return {
        "data/images/a b.jpg": picture(1),
        "é/deep/x.PNG": (picture(2, form="BMP") + bytes(999), zipfile.ZIP_DEFLATED),
        "c.jpeg": (picture(3), zipfile.ZIP_DEFLATED),
    }


def assert_readable(path, members):
    images = index(path)
    data = {name: one[0] if isinstance(one, tuple) else one for name, one in members.items()}
    assert images.members == list(data)
    assert (images.reasons, images.notes) == ({}, {})
    assert [read(path, part) for part in images.parts] == list(data.values())


def test_stored_and_deflated_images_are_read_in_place(make_zip, members):
    others = {"folder/": b"", "notes.txt": b"x", "._c.jpeg": b"macOS", "__MACOSX/c.jpg": b"too"}
    path = make_zip("t.zip", {**others, **members})
    assert_readable(path, members)
    deflated = [(length, inflated) for _, length, inflated in index(path).parts if inflated]
    assert len(deflated) == 2
    assert deflated[0][0] < deflated[0][1]


def test_zip64_and_self_extracting_zips_are_supported(make_zip, members, monkeypatch):
    path = make_zip("t.zip", members)
    path.write_bytes(b"#!/bin/sh of a self-extracting zip" + path.read_bytes())
    assert_readable(path, members)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    path = make_zip("large.zip", members)
    assert b"PK\6\6" in path.read_bytes(), "the record of a ZIP64"
    assert_readable(path, members)


def test_labels_are_those_of_the_same_key(make_zip, picture):
    members = {
        "1.jpg": picture(1),
        "1.cls": b"4",
        "2.jpg": picture(2),
        "2.json": (b'{"cls": "dog"}', zipfile.ZIP_DEFLATED),
        "2.mask.png": picture(3),
    }
    images = index(make_zip("t.zip", members))
    assert (images.members, images.labels) == (["1.jpg", "2.jpg"], ["4", "dog"])


def set_flag(path, bit):
    """Set a flag bit of all members in the central directory."""
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        flags = struct.unpack_from("<H", data, place + 8)[0]
        struct.pack_into("<H", data, place + 8, flags | bit)
        place = data.find(b"PK\1\2", place + 4)
    path.write_bytes(data)


def test_encrypted_members_and_other_compression_have_reasons(make_zip, picture):
    path = make_zip("t.zip", {"a.jpg": picture(), "a.cls": b"1"})
    set_flag(path, 1)
    images = index(path)
    assert (images.reasons, images.labels) == ({0: "is encrypted"}, [""])
    path = make_zip(
        "u.zip", {"a.jpg": (picture(), zipfile.ZIP_BZIP2), "b.jpg": (picture(), zipfile.ZIP_LZMA)}
    )
    reasons = index(path).reasons
    assert "compressed with bzip2" in reasons[0]
    assert "compressed with LZMA" in reasons[1]


def test_truncated_zip_is_error(make_zip, members):
    path = make_zip("t.zip", members)
    whole = path.read_bytes()
    for length in (len(whole) - 30, len(whole) // 2, 10):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"t.zip is not a complete zip .*Copy it again"):
            index(path)
    path.write_bytes(b"")
    assert index(path).notes == {0: "is empty (0 bytes)"}
    assert index(make_zip("u.zip", {"notes.txt": b"x"})).notes == {0: "contains no images"}


def test_members_at_wrong_offsets_have_reasons(make_zip, picture):
    path = make_zip("t.zip", {"a.jpg": picture(1), "b.jpg": picture(2)})
    data = bytearray(path.read_bytes())
    data[:4] = b"gone"
    path.write_bytes(data)
    assert "not at the offset in the zip's directory" in index(path).reasons[0]
    path.write_bytes(data[data.rfind(b"PK\3\4") :])
    images = index(path)
    assert list(images.reasons) == [0], "the first is missing, the second has moved"
    assert read(path, images.parts[1]) == picture(2)


def test_damaged_and_empty_members_are_broken_images(make_zip, picture):
    members = {f"{i}.jpg": (picture(i), zipfile.ZIP_DEFLATED) for i in range(3)}
    members |= {"3.jpg": (b"", zipfile.ZIP_DEFLATED), "4.jpg": b""}
    path = make_zip("t.zip", members)
    data, part = bytearray(path.read_bytes()), index(path).parts[1]
    data[part[0] : part[0] + 40] = b"\xff" * 40
    path.write_bytes(data)
    dataset = scan_images(path, max_bad_share=0.9)
    assert (len(dataset), dataset.broken) == (2, 3)
    assert "cannot be inflated" in dataset.skipped[f"{path}/1.jpg"]
    assert dataset.skipped[f"{path}/3.jpg"] == dataset.skipped[f"{path}/4.jpg"]
    assert dataset.skipped[f"{path}/4.jpg"] == "is empty (0 bytes)"
    with pytest.raises(UnusableImageError):
        read(path, part)


def test_zips_in_a_folder_a_pattern_or_one_file_have_classes(make_zip, picture, tmp_path):
    for name in ("cat", "dog"):
        make_zip(f"z/{name}.zip", {f"{i}.jpg": picture(i) for i in range(2)})
    for path in (tmp_path / "z", tmp_path / "z" / "*.zip"):
        dataset = scan_images(path)
        assert (dataset.classes, dataset.labels.tolist()) == (["cat", "dog"], [0, 0, 1, 1])
        assert dataset.kind == "class zips: 2 zip(s)"
        assert [dataset.read_bytes(i) for i in (0, 3)] == [picture(0), picture(1)]
    single = make_zip("all.zip", {"cat/1.jpg": picture(1), "dog/2.jpg": picture(2)})
    assert scan_images(single).classes == ["cat", "dog"]


def test_tars_and_zips_in_one_folder_are_ambiguous(make_zip, make_tar, picture, tmp_path):
    make_zip("z/a.zip", {"1.jpg": picture()})
    make_tar(tmp_path / "z" / "b.tar", {"1.jpg": picture()})
    with pytest.raises(DataError, match="contains both tars and zips: move those away"):
        scan_images(tmp_path / "z")


def test_zip_is_recognized_by_its_first_bytes(make_zip, tmp_path):
    assert is_zip(str(make_zip("images", {"a.jpg": b"x"})))
    assert is_zip(str(make_zip("nothing", {})))
    (tmp_path / "list.txt").write_text("a.jpg")
    assert not is_zip(str(tmp_path / "list.txt"))

"""Tests of fastdino.data.datasets.zips."""

from __future__ import annotations

import struct
import zipfile

import pytest

from fastdino.data.datasets.zips import index_zip, is_zip
from fastdino.data.image_dataset import scan_images
from fastdino.data.image_files import EXTENSIONS, UnusableImageError, read_part
from fastdino.errors import DataError


def index(path):
    return index_zip(str(path), EXTENSIONS)


@pytest.fixture
def make_zip(tmp_path):
    """Writes a zip of named members: bytes, or (bytes, method)."""

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
def images(picture):
    return {
        "data/images/a b.jpg": picture(1),
        "é/deep/x.PNG": (picture(2, form="BMP") + bytes(999), zipfile.ZIP_DEFLATED),
        "c.jpeg": (picture(3), zipfile.ZIP_DEFLATED),
    }


def assert_read(path, images):
    found = index(path)
    data = {name: content[0] if isinstance(content, tuple) else content for name, content in images}
    assert found.members == list(data)
    assert (found.reasons, found.note) == ({}, "")
    for name, part in zip(found.members, found.parts, strict=True):
        assert read_part(str(path), part) == data[name]


def test_each_image_is_read_where_the_index_says(make_zip, images):
    others = {"folder/": b"", "notes.txt": b"x", "._c.jpeg": b"a Mac's", "__MACOSX/c.jpg": b"too"}
    path = make_zip("t.zip", {**others, **images})
    assert_read(path, images.items())
    deflated = [part for part in index(path).parts if part.inflated]
    assert len(deflated) == 2
    assert deflated[0].length < deflated[0].inflated


def test_zip64_and_what_precedes_a_zip_move_nothing(make_zip, images, monkeypatch):
    path = make_zip("t.zip", images)
    path.write_bytes(b"#!/bin/sh of a self-extracting one" + path.read_bytes())
    assert_read(path, images.items())
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    path = make_zip("large.zip", images)
    data = path.read_bytes()
    assert b"PK\6\6" in data, "the record of a ZIP64"
    assert_read(path, images.items())


def test_labels_lie_beside_images(make_zip, picture):
    path = make_zip(
        "t.zip",
        {
            "1.jpg": picture(1),
            "1.cls": b"4",
            "2.jpg": picture(2),
            "2.json": (b'{"cls": "dog"}', zipfile.ZIP_DEFLATED),
            "2.mask.png": picture(3),
        },
    )
    found = index(path)
    assert (found.members, found.labels) == (["1.jpg", "2.jpg"], ["4", "dog"])


def with_flag(path, bit):
    """Sets a bit of the flags of all members, in the list at the end."""
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        flags = struct.unpack_from("<H", data, place + 8)[0]
        struct.pack_into("<H", data, place + 8, flags | bit)
        place = data.find(b"PK\1\2", place + 4)
    path.write_bytes(data)


def test_encrypted_members_and_other_methods_are_refused_with_a_reason(make_zip, picture):
    path = make_zip("t.zip", {"a.jpg": picture(), "a.cls": b"1"})
    with_flag(path, 1)
    found = index(path)
    assert (found.reasons, found.labels) == ({0: "is encrypted"}, [""])
    path = make_zip(
        "u.zip", {"a.jpg": (picture(), zipfile.ZIP_BZIP2), "b.jpg": (picture(), zipfile.ZIP_LZMA)}
    )
    reasons = index(path).reasons
    assert "compressed by bzip2" in reasons[0]
    assert "compressed by LZMA" in reasons[1]


def test_a_zip_without_its_end_is_an_error_that_says_what_to_do(make_zip, images, tmp_path):
    path = make_zip("t.zip", images)
    whole = path.read_bytes()
    for length in (len(whole) - 30, len(whole) // 2, 10):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"t.zip is no zip, or not all of one .*Copy it again"):
            index(path)
    path.write_bytes(b"")
    assert index(path).note == "is empty (0 bytes)"
    assert index(make_zip("u.zip", {"notes.txt": b"x"})).note == "holds no images"


def test_members_that_are_not_where_the_list_says_are_named(make_zip, picture):
    path = make_zip("t.zip", {"a.jpg": picture(1), "b.jpg": picture(2)})
    data = bytearray(path.read_bytes())
    data[:4] = b"gone"
    path.write_bytes(data)
    assert "not where the zip's list says" in index(path).reasons[0]
    path.write_bytes(data[data.rfind(b"PK\3\4") :])
    found = index(path)
    assert list(found.reasons) == [0], "the first is missing, the second has moved"
    assert read_part(str(path), found.parts[1]) == picture(2)


def test_a_deflated_image_that_is_damaged_is_broken_not_the_run(make_zip, picture):
    members = {f"{i}.jpg": (picture(i), zipfile.ZIP_DEFLATED) for i in range(3)}
    path = make_zip("t.zip", members)
    data, part = bytearray(path.read_bytes()), index(path).parts[1]
    data[part.offset : part.offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = scan_images(path, max_bad_share=0.5)
    assert (len(source), source.broken) == (2, 1)
    assert "cannot be inflated" in source.skipped[f"{path}/1.jpg"]
    with pytest.raises(UnusableImageError):
        read_part(str(path), part)


def test_an_empty_member_is_an_empty_image(make_zip, picture):
    members = {"a.jpg": picture(), "b.jpg": (b"", zipfile.ZIP_DEFLATED), "c.jpg": b""}
    source = scan_images(make_zip("t.zip", members), max_bad_share=0.9)
    assert sorted(source.skipped.values()) == ["is empty (0 bytes)"] * 2


def test_zips_by_folder_pattern_and_name_have_classes_as_tars_have(make_zip, picture, tmp_path):
    for name in ("cat", "dog"):
        make_zip(f"z/{name}.zip", {f"{i}.jpg": picture(i) for i in range(2)})
    for path in (tmp_path / "z", tmp_path / "z" / "*.zip"):
        source = scan_images(path)
        assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [0, 0, 1, 1])
        assert source.kind == "class zips: 2 zip(s)"
        assert [source.read_bytes(i) for i in (0, 3)] == [picture(0), picture(1)]
    only = make_zip("all.zip", {"cat/1.jpg": picture(1), "dog/2.jpg": picture(2)})
    assert scan_images(only).classes == ["cat", "dog"]


def test_tars_and_zips_in_one_folder_are_ambiguous(make_zip, make_tar, picture, tmp_path):
    make_zip("z/a.zip", {"1.jpg": picture()})
    make_tar(tmp_path / "z" / "b.tar", {"1.jpg": picture()})
    with pytest.raises(DataError, match="holds tars and zips: which are meant"):
        scan_images(tmp_path / "z")


def test_a_zip_is_known_by_its_first_bytes_too(make_zip, tmp_path):
    assert is_zip(str(make_zip("images", {"a.jpg": b"x"})))
    assert is_zip(str(make_zip("nothing", {})))
    (tmp_path / "list.txt").write_text("a.jpg")
    assert not is_zip(str(tmp_path / "list.txt"))

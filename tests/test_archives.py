"""Tests of fastdino.data.datasets.archives, tars, zips and webdataset."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tarfile
import zipfile

import pytest

from fastdino.data.datasets import tars
from fastdino.data.datasets.archives import (
    INDEX,
    archive_kind,
    are_numbered,
    class_names,
    expand_range,
)
from fastdino.data.datasets.registry import find_dataset
from fastdino.data.image_dataset import scan_images
from fastdino.data.image_files import Part, UnusableImageError, read_part
from fastdino.data.manifest import concatenate, unread_manifest
from fastdino.errors import DataError

SHARDS = [f"s-00{n}.tar" for n in range(3)]
DEFLATE = zipfile.ZIP_DEFLATED


@pytest.fixture
def make(tmp_path, make_tar):
    """A function that writes a tar or zip of named members: bytes, or (bytes, method)."""

    def write(name, members, **options):
        path = tmp_path / name
        if name.endswith(".zip"):
            path.parent.mkdir(exist_ok=True)
            with zipfile.ZipFile(path, "w") as archive:
                for member, content in members.items():
                    data, method = content if isinstance(content, tuple) else (content, 0)
                    archive.writestr(member, data, compress_type=method)
            return path
        return make_tar(path, members, **options)

    return write


def index(path):
    return INDEX[path.suffix[1:]](str(path))


def contents(path, images):
    """Return the bytes of each image."""
    parts = [Part(*part) for part in images.parts.tolist()]
    return {n: read_part(str(path), part) for n, part in zip(images.members, parts, strict=True)}


def reasons(images):
    return {images.members[i]: reason for i, reason in images.reasons.items()}


@pytest.mark.parametrize(
    ("names", "numbered"),
    [
        (["train-000.tar", "train-001.tar", "train-002.tar"], True),
        (["d/7.tar", "d/8.tar"], True),
        (["d/7.zip", "d/8.zip"], True),
        (["n01440764.tar", "n01443537.tar"], False),
        (["cat.tar", "dog.tar"], False),
        (["a-0.tar", "b-1.tar"], False),
        (["a-0.tar"], False),
    ],
)
def test_shards_have_consecutive_numbers(names, numbered):
    assert are_numbered(names) is numbered


@pytest.mark.parametrize(
    ("archives", "classes"),
    [
        ({"x/b.tar": ["1", "z/2"], "a.tar": ["3"]}, ["b", "b", "a"]),
        ({"x/b.zip": ["1"], "a.zip": ["2"]}, ["b", "a"]),
        ({"t.tar": ["cat/1", "dog/deep/2"]}, ["cat", "dog"]),
        ({"t.tar": ["train/cat/1", "train/dog/2"]}, ["cat", "dog"]),
        ({"t.tar": ["n01.tar/1", "n02.tar/2"]}, ["n01", "n02"]),
        ({"t.tar": ["cat/1", "cat/2"]}, ["cat", "cat"]),
        ({"t.tar": ["1", "2"]}, ["t", "t"]),
    ],
)
def test_classes_are_archives_or_folders_of_a_single_archive(archives, classes):
    manifests = [
        unread_manifest([path], members, [Part(0, 1)] * len(members))
        for path, members in archives.items()
    ]
    assert class_names(concatenate(manifests)) == classes


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", SHARDS),
        ("s-{000..002}.tar", SHARDS),
        ("s-{001..002}.tar", SHARDS[1:]),
        ("s-*.tar", SHARDS),
        ("s-00[02].tar", SHARDS[::2]),
        ("s-001.tar", SHARDS[1:2]),
    ],
)
def test_archives_of_a_folder_a_pattern_or_a_name(make, tmp_path, path, expected):
    for name in SHARDS:
        make(name, {"a.jpg": b"x"})
    files = find_dataset(str(tmp_path / path))
    assert [os.path.relpath(files.path(file), tmp_path) for file in files.files] == expected
    assert files.labels is None
    assert files.numbered == (len(expected) > 1 and path != "s-00[02].tar")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s-{000..003}.tar", "s-001.tar does not exist"),
        ("t-*.tar", "t-.*no file matches; expected a folder"),
        ("s-{2..1}.tar", "is descending"),
        ("*.t*", "expected only tars or zips, but it matches .*notes.txt"),
        ("", "contains both tars and zips: move those away"),
        ("gz", r"is compressed .*`gunzip .*t.tar.gz`"),
        ("gz/t.tar.gz", r"is compressed .*`gunzip .*t.tar.gz`"),
        ("t.bz2", r"is compressed .*`bunzip2 .*t.bz2`"),
        ("t.xz", r"is compressed .*`unxz .*t.xz`"),
    ],
)
def test_pattern_or_folder_of_other_files_is_error(make, tmp_path, path, message):
    (tmp_path / "notes.txt").write_text("x")
    make("s-000.tar", {"a.jpg": b"x"})
    make("z.zip", {"a.jpg": b"x"})
    for name in ("gz/t.tar.gz", "t.bz2", "t.xz"):
        make(name, {"a.jpg": b"x" * 600}, mode=f"w:{name.rpartition('.')[2]}")
    with pytest.raises(DataError, match=message):
        find_dataset(str(tmp_path / path))


def test_ranges_keep_order_and_leading_zeros():
    assert expand_range("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_range("{0..1}-{2..3}") == ["0-2", "0-3", "1-2", "1-3"]
    assert expand_range("plain") == ["plain"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archive_is_recognized_by_its_first_bytes(make, kind):
    path = make(f"t.{kind}", {"a.jpg": b"x"})
    assert archive_kind(str(path.rename(path.with_suffix("")))) == kind
    path.with_suffix("").write_text("a.jpg")
    assert archive_kind(str(path.with_suffix(""))) == ""


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_labels_are_those_of_the_same_key_and_masks_are_not_images(make, picture, kind):
    image, caption = picture(), b"a caption"
    members = {
        "a/000.cls": b"7\n", "a/000.jpg": image, "._a.jpg": caption, "__MACOSX/c.jpg": caption,
        "a/001.jpg": image, "a/001.json": json.dumps({"url": "x", "label": 3}).encode(),
        "a/002.jpg": image, "a/002.json": b'"dog"',
        "a/003.jpg": image, "a/003.json": b"{broken", "b/000.jpg": image,
        "a/004.left.png": image, "a/004.right.png": image, "a/004.cls": b"cat",
        "a/005.jpg": image, "a/005.mask.png": image, "a/005.txt": caption,
        "a/006.jpg": image, "a/006.cls": b"too large to be a label" * 50_000,
        "a/photo.jpg": image, "a/photo.1.jpg": image,
    }  # fmt: skip
    images = index(make(f"t.{kind}", members))
    assert dict(zip(images.members, images.labels, strict=True)) == {
        "a/000.jpg": "7", "a/001.jpg": "3", "a/002.jpg": "dog", "a/003.jpg": "", "b/000.jpg": "",
        "a/004.left.png": "cat", "a/004.right.png": "cat", "a/005.jpg": "",
        "a/006.jpg": "", "a/photo.jpg": "", "a/photo.1.jpg": "",
    }  # fmt: skip
    assert images.reasons == {}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_without_images_have_notes_or_are_errors(make, tmp_path, kind):
    path = make(f"t.{kind}", {"a.txt": b"x"})
    assert index(path).notes == {0: "contains no images"}
    path.write_bytes(b"")
    assert index(path).notes == {0: "is empty (0 bytes)"}
    make(f"u.{kind}", {"a.txt": b"x"})
    with pytest.raises(DataError, match=rf"t.{kind} is empty .*; .*u.{kind} contains no images"):
        scan_images(tmp_path)
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=rf"t.{kind} is not a .*opy it again, or move it away"):
        index(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_index_gives_the_byte_range_of_each_image(make, picture, form):
    long = f"{'deep/' * 30}{'n' * 60}.JPEG" if form != tarfile.USTAR_FORMAT else "x/n.JPEG"
    expected = {"a.jpg": picture(1), "./b.PNG": picture(2, form="PNG"), long: picture(3)}
    link = tarfile.TarInfo()
    link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
    path = make("t.tar", {**expected, "notes.txt": b"no image", "l.jpg": link}, format=form)
    images = index(path)
    ours = contents(path, images)
    assert "link" in reasons(images)["l.jpg"]
    assert ours.pop("l.jpg") == b""
    assert ours == {name.removeprefix("./"): data for name, data in expected.items()}
    assert (images.labels, images.notes) == ([""] * 4, {})


def test_tars_within_a_tar_are_indexed(make, picture):
    inner = {}
    for n, name in enumerate(("n01.tar", "n02.tar")):
        members = {f"{name}_{i}.JPEG": picture(10 * n + i) for i in range(2)}
        inner[name] = make(name, members).read_bytes()
    inner["n03.tar"] = b"no tar" * 200
    inner["n04.tar"] = inner["n01.tar"][:1000]
    path = make("train.tar", inner)
    images = index(path)
    good = [f"{name}/{name}_{i}.JPEG" for name in ("n01.tar", "n02.tar") for i in range(2)]
    bad = reasons(images)
    data = contents(path, images)
    assert [data[name] for name in good] == [picture(n) for n in (0, 1, 10, 11)]
    assert set(bad) == {"n03.tar", "n04.tar", "n04.tar/n01.tar_0.JPEG"}
    assert "is not a tar" in bad["n03.tar"]
    path.write_bytes(path.read_bytes()[: images.parts[images.members.index(good[3])].sum() - 9])
    assert "cut off" in reasons(index(path))[good[3]], "the tar in it is truncated with it"


def test_truncated_tar_keeps_its_complete_images(make, picture):
    path = make("t.tar", {f"{i}.jpg": picture(i, (64, 48)) for i in range(3)})
    whole, data = index(path), path.read_bytes()
    assert whole.notes == {}
    offset, length, _ = whole.parts[2]
    garbage = data[: offset - 512] + b"\xff" * 112 + data[offset - 400 :]
    for end in (offset + length // 2, offset - 300, offset - 512, offset, None):
        path.write_bytes(garbage if end is None else data[:end])
        images = index(path)
        assert images.parts[:2].tolist() == whole.parts[:2].tolist()
        assert "is truncated or damaged: only the 2 images before" in images.notes[0]
        cut = reasons(images)
        assert all("the tar ends within it" in reason for reason in cut.values())
        assert list(cut) == (["2.jpg"] if end is not None and end >= offset else [])


@pytest.fixture
def members(picture):
    return {
        "data/images/a b.jpg": picture(1),
        "é/deep/x.PNG": (picture(2, form="BMP") + bytes(999), DEFLATE),
        "c.jpeg": (picture(3), DEFLATE),
    }


@pytest.mark.parametrize("kind", ["plain", "self-extracting", "ZIP64"])
def test_stored_and_deflated_images_of_a_zip_are_read_in_place(make, members, monkeypatch, kind):
    if kind == "ZIP64":
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    path = make("t.zip", {"folder/": b"", "notes.txt": b"x", **members})
    assert (b"PK\6\6" in path.read_bytes()) == (kind == "ZIP64")
    if kind == "self-extracting":
        path.write_bytes(b"#!/bin/sh of a self-extracting zip" + path.read_bytes())
    images = index(path)
    data = {name: one[0] if isinstance(one, tuple) else one for name, one in members.items()}
    assert contents(path, images) == data
    assert (images.reasons, images.notes) == ({}, {})
    deflated = [(length, inflated) for _, length, inflated in images.parts if inflated]
    assert len(deflated) == 2
    assert deflated[0][0] < deflated[0][1]


def set_flag(path, bit):
    """Set a flag bit of all members in the central directory."""
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        flags = struct.unpack_from("<H", data, place + 8)[0]
        struct.pack_into("<H", data, place + 8, flags | bit)
        place = data.find(b"PK\1\2", place + 4)
    path.write_bytes(data)


def test_encrypted_members_and_other_compression_have_reasons(make, picture):
    path = make("t.zip", {"a.jpg": picture(), "a.cls": b"1"})
    set_flag(path, 1)
    images = index(path)
    assert (images.reasons, images.labels) == ({0: "is encrypted"}, [""])
    bzip2, lzma = ((picture(), method) for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    images = index(make("u.zip", {"a.jpg": bzip2, "b.jpg": lzma}))
    assert "compressed with bzip2" in images.reasons[0]
    assert "compressed with LZMA" in images.reasons[1]


def test_truncated_zip_is_error(make, members):
    path = make("t.zip", members)
    whole = path.read_bytes()
    for length in (len(whole) - 30, len(whole) // 2, 10):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"t.zip is not a complete zip .*Copy it again"):
            index(path)


def test_members_at_wrong_offsets_have_reasons(make, picture):
    path = make("t.zip", {"a.jpg": picture(1), "b.jpg": picture(2)})
    data = bytearray(path.read_bytes())
    data[:4] = b"gone"
    path.write_bytes(data)
    assert "not at the offset in the zip's directory" in index(path).reasons[0]
    path.write_bytes(data[data.rfind(b"PK\3\4") :])
    images = index(path)
    assert list(images.reasons) == [0], "the first is missing, the second has moved"
    assert contents(path, images)["b.jpg"] == picture(2)


def test_damaged_and_empty_members_are_broken_images(make, picture):
    members = {f"{i}.jpg": (picture(i), DEFLATE) for i in range(3)}
    path = make("t.zip", members | {"3.jpg": (b"", DEFLATE), "4.jpg": b""})
    data, part = bytearray(path.read_bytes()), Part(*index(path).parts[1].tolist())
    data[part.offset : part.offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    dataset = scan_images(path, max_bad_share=0.9)
    skipped = {name.rpartition("/")[2]: reason for name, reason in dataset.skipped.items()}
    assert (len(dataset), dataset.broken, len(skipped)) == (2, 3, 3)
    assert "cannot be inflated" in skipped["1.jpg"]
    assert skipped["3.jpg"] == skipped["4.jpg"] == "is empty (0 bytes)"
    with pytest.raises(UnusableImageError):
        read_part(str(path), part)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_in_a_folder_a_pattern_or_one_file_have_classes(make, picture, tmp_path, kind):
    for name in ("cat", "dog"):
        make(f"z/{name}.{kind}", {f"{i}.jpg": picture(i) for i in range(2)})
    for path in (tmp_path / "z", tmp_path / "z" / f"*.{kind}"):
        dataset = scan_images(path)
        assert (dataset.classes, dataset.labels.tolist()) == (["cat", "dog"], [0, 0, 1, 1])
        assert dataset.kind == f"class {kind}s: 2 {kind}(s)"
        assert [dataset.read_bytes(i) for i in (0, 3)] == [picture(0), picture(1)]
    single = make(f"all.{kind}", {"cat/1.jpg": picture(1), "dog/2.jpg": picture(2)})
    assert scan_images(single).classes == ["cat", "dog"]


def test_overlapping_members_of_a_zip_are_broken(tmp_path, make, picture):
    """Else a small file holds any number of large images, which the scan must inflate."""
    image = picture(0)
    path = make("x.zip", {"a.jpg": (image, DEFLATE), "b.jpg": (image, DEFLATE)})
    content = bytearray(path.read_bytes())
    second = content.rfind(b"PK\1\2")
    struct.pack_into("<I", content, second + 42, 0)  # both entries are at the first member
    path.write_bytes(content)
    assert reasons(index(path)) == {"b.jpg": "overlaps another member: the zip is damaged"}


@pytest.mark.parametrize(
    ("place", "value"),
    [(6, b"\xff\0"), (8, b"\0\x08"), (46, b"\xff\xfe"), (28, b"\0\0"), (28, b"\xff\xff")],
    ids=["version", "UTF-8 flag", "name", "no name", "long name"],
)
def test_crafted_directories_of_zips_are_one_line(make, picture, place, value):
    path = make("x.zip", {"\u00e9.jpg": picture(0)})
    content = bytearray(path.read_bytes())
    start = content.rfind(b"PK\1\2") + place
    content[start : start + len(value)] = value
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        index(path).check(1)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_labels_of_other_compression_are_not_read(make, picture, method):
    path = make("x.zip", {"a.jpg": picture(0), "a.cls": (b"1", method)})
    assert index(path).labels == [""]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"label": ' * 50_000, b"1" * 1001])
def test_labels_that_are_nested_or_long_are_left_out(make, picture, kind, content):
    path = make(f"x.{kind}", {"a.jpg": picture(0), "a.json": content, "b.jpg": picture(0)})
    assert index(path).labels == ["", ""]


def nested_tar(make_tar, path, levels, picture):
    content = picture(0)
    name = "a.jpg"
    for level in range(levels):
        content = make_tar(path / f"{level}.tar", {name: content}).read_bytes()
        name = "t.tar"
    return path / f"{levels - 1}.tar"


def test_tars_within_tars_are_indexed_to_a_depth(tmp_path, make_tar, picture):
    images = index(nested_tar(make_tar, tmp_path, tars.LEVELS + 1, picture))
    assert len(images.members) == 1
    assert not images.reasons
    images = index(nested_tar(make_tar, tmp_path, tars.LEVELS + 2, picture))
    (reason,) = images.reasons.values()
    assert reason == f"is a tar within {tars.LEVELS} tars, which is not supported"


def test_long_headers_of_a_tar_are_bounded(tmp_path, make_tar, picture, monkeypatch):
    path = make_tar(tmp_path / "x.tar", {"a.jpg": picture(0), "b" * 200 + ".jpg": picture(1)})
    assert len(index(path).members) == 2
    monkeypatch.setattr(tars, "_LARGEST_HEADER", 100)
    images = index(path)
    assert list(images.members) == ["a.jpg"]
    assert "is truncated or damaged" in images.notes[0]


def test_headers_that_refer_to_each_other_without_end_are_an_error(tmp_path):
    """Each long name is read by a recursive call of tarfile."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    block = header.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(block * 5000)
    with pytest.raises(DataError, match="is not a tar|no images"):
        scan_images(tmp_path / "x.tar")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["x.tar", "x.jpg.tar"])
def test_compressed_archives_and_lists_are_refused_before_they_are_read(tmp_path, suffix, name):
    starts = {".gz": b"\x1f\x8b", ".bz2": b"BZh9", ".xz": b"\xfd7zXZ\0", ".zst": b"(\xb5/\xfd"}
    (tmp_path / f"{name}{suffix}").write_bytes(starts[suffix] + bytes(100))
    with pytest.raises(DataError, match="is compressed"):
        scan_images(tmp_path / f"{name}{suffix}")

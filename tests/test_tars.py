"""Tests of fastdino.data.datasets.tars."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from fastdino.data.datasets.tars import index_tar, is_tar
from fastdino.errors import DataError


def index(path):
    return index_tar(str(path))


def contents(path, images):
    data = path.read_bytes()
    return {
        name: data[offset : offset + length]
        for name, (offset, length, _) in zip(images.members, images.parts, strict=True)
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_gives_the_byte_range_of_each_image(tmp_path, picture, form):
    long = f"{'deep/' * 30}{'n' * 60}.JPEG" if form != tarfile.USTAR_FORMAT else "x/n.JPEG"
    expected = {"a.jpg": picture(1), "./b.PNG": picture(2, form="PNG"), long: picture(3)}
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form) as tar:
        others = {"notes.txt": b"no image", "._a.jpg": b"macOS metadata"}
        for name, data in {**expected, **others}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    images = index(path)
    assert contents(path, images) == {
        name.removeprefix("./"): data for name, data in expected.items()
    }
    assert (images.labels, images.reasons, images.notes) == ([""] * 3, {}, {})


def test_tars_within_a_tar_are_indexed(tmp_path, picture, make_tar):
    inner = {}
    for n, name in enumerate(("n01.tar", "n02.tar")):
        members = {f"{name}_{i}.JPEG": picture(10 * n + i) for i in range(2)}
        inner[name] = make_tar(tmp_path / name, members).read_bytes()
    inner["n03.tar"] = b"no tar" * 200
    inner["n04.tar"] = inner["n01.tar"][:1000]
    images = index(make_tar(tmp_path / "train.tar", inner))
    data = contents(tmp_path / "train.tar", images)
    good = [f"{name}/{name}_{i}.JPEG" for name in ("n01.tar", "n02.tar") for i in range(2)]
    assert [data[name] for name in good] == [picture(n) for n in (0, 1, 10, 11)]
    reasons = {images.members[i]: reason for i, reason in images.reasons.items()}
    assert set(reasons) == {"n03.tar", "n04.tar", "n04.tar/n01.tar_0.JPEG"}
    assert "is not a tar" in reasons["n03.tar"]


def test_labels_are_those_of_the_same_key_and_masks_are_not_images(tmp_path, picture, make_tar):
    image, link = picture(), tarfile.TarInfo()
    link.type, link.linkname = tarfile.LNKTYPE, "a/photo.jpg"
    members = {
        "a/000.cls": b"7\n", "a/000.jpg": image,
        "a/001.jpg": image, "a/001.json": json.dumps({"url": "x", "label": 3}).encode(),
        "a/002.jpg": image, "a/002.json": b'"dog"',
        "a/003.jpg": image, "a/003.json": b"{broken", "b/000.jpg": image,
        "a/004.left.png": image, "a/004.right.png": image, "a/004.cls": b"cat",
        "a/005.jpg": image, "a/005.mask.png": image, "a/005.txt": b"a caption",
        "a/006.jpg": image, "a/006.cls": b"too large to be a label" * 50_000,
        "a/photo.jpg": image, "a/photo.1.jpg": image, "a/photo.2.jpg": link,
    }  # fmt: skip
    images = index(make_tar(tmp_path / "t.tar", members))
    assert dict(zip(images.members, images.labels, strict=True)) == {
        "a/000.jpg": "7", "a/001.jpg": "3", "a/002.jpg": "dog", "a/003.jpg": "", "b/000.jpg": "",
        "a/004.left.png": "cat", "a/004.right.png": "cat", "a/005.jpg": "",
        "a/006.jpg": "", "a/photo.jpg": "", "a/photo.1.jpg": "", "a/photo.2.jpg": "",
    }  # fmt: skip
    ((bad, reason),) = images.reasons.items()
    assert images.members[bad] == "a/photo.2.jpg"
    assert "link" in reason


def test_truncated_tar_keeps_its_complete_images(tmp_path, picture, make_tar):
    path = make_tar(tmp_path / "t.tar", {f"{i}.jpg": picture(i, (64, 48)) for i in range(3)})
    whole, data = index(path), path.read_bytes()
    assert whole.notes == {}
    offset, length, _ = whole.parts[2]
    for end in (offset + length // 2, offset - 300, offset - 512, offset):
        path.write_bytes(data[:end])
        images = index(path)
        assert images.parts[:2].tolist() == whole.parts[:2].tolist()
        assert "is truncated or damaged: only the 2 images before" in images.notes[0]
        cut = {images.members[i]: reason for i, reason in images.reasons.items()}
        assert all("the tar ends within it" in reason for reason in cut.values())
        assert list(cut) == (["2.jpg"] if end >= offset else [])


def test_garbage_between_members_is_not_the_end_of_the_tar(tmp_path, picture, make_tar):
    path = make_tar(tmp_path / "t.tar", {f"{i}.jpg": picture(i) for i in range(3)})
    offset = index(path).parts[1][0]
    data = bytearray(path.read_bytes())
    data[offset - 512 : offset - 400] = b"\xff" * 112
    path.write_bytes(data)
    images = index(path)
    assert images.members == ["0.jpg"]
    assert "the 1 images before" in images.notes[0]


def test_empty_tars_have_notes(tmp_path, make_tar):
    (tmp_path / "nothing.tar").touch()
    assert index(tmp_path / "nothing.tar").notes == {0: "is empty (0 bytes)"}
    for members in ({}, {"a.txt": b"x"}):
        assert index(make_tar(tmp_path / "t.tar", members)).notes == {0: "contains no images"}


def test_other_file_named_tar_is_error(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"t.tar is not a tar .*copy it again"):
        index(path)


@pytest.mark.parametrize(
    ("mode", "command"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")]
)
def test_compressed_tar_is_error_with_the_command_to_unpack_it(tmp_path, make_tar, mode, command):
    path = make_tar(tmp_path / "t.tar", {"a.jpg": b"x" * 600}, f"w:{mode}")
    with pytest.raises(DataError, match=rf"is compressed .*`{command} .*t.tar`"):
        is_tar(str(path))


def test_tar_is_recognized_by_its_first_header(tmp_path, make_tar):
    assert is_tar(str(make_tar(tmp_path / "images", {"a.jpg": b"x"})))
    (tmp_path / "list.txt").write_text("a.jpg")
    assert not is_tar(str(tmp_path / "list.txt"))

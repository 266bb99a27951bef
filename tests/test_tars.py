"""Tests of fastdino.data.datasets.tars."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from fastdino.data.datasets.archives import class_names
from fastdino.data.datasets.tars import expand, index_tar, is_tar
from fastdino.data.image_files import EXTENSIONS
from fastdino.errors import DataError


def index(path):
    return index_tar(str(path), EXTENSIONS)


def contents(path, found):
    data = path.read_bytes()
    return {
        name: data[offset : offset + length]
        for name, (offset, length, _) in zip(found.members, found.parts, strict=True)
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_image_lies_where_the_index_says(tmp_path, picture, form):
    long = f"{'deep/' * 30}{'n' * 60}.JPEG" if form != tarfile.USTAR_FORMAT else "x/n.JPEG"
    images = {"a.jpg": picture(1), "./b.PNG": picture(2, form="PNG"), long: picture(3)}
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        for name, data in {**images, "notes.txt": b"no image", "._a.jpg": b"a Mac's"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = index(tmp_path / "t.tar")
    expected = {name.removeprefix("./"): data for name, data in images.items()}
    assert contents(tmp_path / "t.tar", found) == expected
    assert (found.labels, found.reasons, found.note) == ([""] * 3, {}, "")


def test_tars_in_a_tar_are_gone_into(tmp_path, picture, make_tar):
    inner = {}
    for n, name in enumerate(("n01.tar", "n02.tar")):
        path = make_tar(
            tmp_path / name, {f"{name}_{i}.JPEG": picture(10 * n + i) for i in range(2)}
        )
        inner[name] = path.read_bytes()
    inner["n03.tar"] = b"no tar" * 200
    inner["n04.tar"] = inner["n01.tar"][:1000]
    found = index(make_tar(tmp_path / "train.tar", inner))
    good = [f"{name}/{name}_{i}.JPEG" for name in ("n01.tar", "n02.tar") for i in range(2)]
    data = contents(tmp_path / "train.tar", found)
    assert [data[name] for name in good] == [picture(n) for n in (0, 1, 10, 11)]
    reasons = {found.members[i]: reason for i, reason in found.reasons.items()}
    assert set(reasons) == {"n03.tar", "n04.tar", "n04.tar/n01.tar_0.JPEG"}
    assert "is no tar" in reasons["n03.tar"]
    names = class_names(["train.tar"], [len(found.members)], found.members)
    assert names[:4] == ["n01", "n01", "n02", "n02"]


def test_labels_are_those_of_the_key(tmp_path, picture, make_tar):
    image = picture()
    members = {
        "a/000.cls": b"7\n", "a/000.jpg": image,
        "a/001.jpg": image, "a/001.json": json.dumps({"url": "x", "label": 3}).encode(),
        "a/002.jpg": image, "a/002.json": b'"dog"',
        "a/003.jpg": image, "a/003.json": b"{broken", "b/000.jpg": image,
        "a/004.left.png": image, "a/004.right.png": image, "a/004.cls": b"cat",
        "a/005.jpg": image, "a/005.mask.png": image, "a/005.txt": b"a caption",
        "a/photo.jpg": image, "a/photo.1.jpg": image,
    }  # fmt: skip
    found = index(make_tar(tmp_path / "t.tar", members))
    assert dict(zip(found.members, found.labels, strict=True)) == {
        "a/000.jpg": "7", "a/001.jpg": "3", "a/002.jpg": "dog", "a/003.jpg": "", "b/000.jpg": "",
        "a/004.left.png": "cat", "a/004.right.png": "cat", "a/005.jpg": "",
        "a/photo.jpg": "", "a/photo.1.jpg": "",
    }  # fmt: skip


def test_a_tar_that_ends_early_gives_its_whole_images_and_names_the_one_cut_off(
    tmp_path, picture, make_tar
):
    path = make_tar(tmp_path / "t.tar", {f"{i}.jpg": picture(i, (64, 48)) for i in range(3)})
    whole, data = index(path), path.read_bytes()
    assert whole.note == ""
    offset, length, _ = whole.parts[2]
    for end, images in (
        (offset + length // 2, 2),
        (offset - 300, 2),
        (offset - 512, 2),
        (offset, 2),
    ):
        path.write_bytes(data[:end])
        found = index(path)
        assert found.parts[:2] == whole.parts[:2]
        assert f"ends early or is damaged: the {images} images before" in found.note
        cut = {found.members[i]: reason for i, reason in found.reasons.items()}
        assert all("the tar ends within it" in reason for reason in cut.values())
        assert list(cut) == (["2.jpg"] if end >= offset else [])


def test_garbage_between_members_is_not_taken_for_the_end(tmp_path, picture, make_tar):
    path = make_tar(tmp_path / "t.tar", {f"{i}.jpg": picture(i) for i in range(3)})
    offset = index(path).parts[1][0]
    data = bytearray(path.read_bytes())
    data[offset - 512 : offset - 400] = b"\xff" * 112
    path.write_bytes(data)
    found = index(path)
    assert found.members == ["0.jpg"]
    assert "the 1 images before" in found.note


def test_empty_tars_and_links_are_named(tmp_path, picture, make_tar):
    (tmp_path / "nothing.tar").touch()
    assert index(tmp_path / "nothing.tar").note == "is empty (0 bytes)"
    assert index(make_tar(tmp_path / "empty.tar", {})).note == "holds no images"
    assert index(make_tar(tmp_path / "text.tar", {"a.txt": b"x"})).note == "holds no images"
    link = tarfile.TarInfo()
    link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
    found = index(make_tar(tmp_path / "link.tar", {"a.jpg": picture(), "b.jpg": link}))
    assert list(found.reasons) == [1]
    assert "link" in found.reasons[1]


def test_what_is_no_tar_is_an_error(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"t.tar is no tar .*copy it again"):
        index(path)


@pytest.mark.parametrize(
    ("mode", "command"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")]
)
def test_a_compressed_tar_is_an_error_that_says_how_to_unpack_it(tmp_path, make_tar, mode, command):
    path = make_tar(tmp_path / "t.tar", {"a.jpg": b"x" * 600}, f"w:{mode}")
    with pytest.raises(DataError, match=rf"is compressed .*`{command} .*t.tar`"):
        is_tar(str(path))


def test_a_tar_is_known_by_its_first_header_too(tmp_path, make_tar):
    assert is_tar(str(make_tar(tmp_path / "images", {"a.jpg": b"x"})))
    (tmp_path / "list.txt").write_text("a.jpg")
    assert not is_tar(str(tmp_path / "list.txt"))


def test_ranges_are_expanded_in_order_with_their_zeros():
    assert expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand("{0..1}-{2..3}") == ["0-2", "0-3", "1-2", "1-3"]
    assert expand("plain") == ["plain"]
    with pytest.raises(DataError, match=r"\{3..1\} runs backwards"):
        expand("{3..1}")

"""Tests of fastdino.data.image_dataset."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastdino.data import image_files, scanning
from fastdino.data.image_dataset import scan_images
from fastdino.errors import DataError


def write(path, size=(20, 10), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.jpg", "b/10.JPEG", "a/z.png", "a/deep/er/1.webp", "c/x.bmp"):
        write(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    return tmp_path


def test_scan_finds_what_imagefolder_finds_in_its_order(folder):
    source = scan_images(folder)
    theirs = ImageFolder(folder)
    assert list(zip(source.paths, source.labels.tolist(), strict=True)) == theirs.samples
    assert source.classes == theirs.classes == ["a", "b", "c"]
    assert source.sizes.tolist() == [[10, 20]] * 5
    assert source.sizes.dtype == np.int32
    assert source.labels.dtype == np.int64
    assert source.skipped == {}
    assert len(source) == 5


def test_sorted_folders_below_a_class_as_imagefolder_sorts_them(tmp_path):
    for name in ("k/b/1.png", "k/a/1.png", "k/a-/1.png", "k/0.png", "k/a/c/1.png"):
        write(tmp_path / name)
    assert list(scan_images(tmp_path).paths) == [path for path, _ in ImageFolder(tmp_path).samples]


def test_a_flat_folder_is_one_class(tmp_path):
    root = tmp_path / "photos"
    for name in ("b.jpg", "a.png"):
        write(root / name)
    (root / "empty").mkdir()
    source = scan_images(str(root))
    assert [os.path.basename(path) for path in source.paths] == ["a.png", "b.jpg"]
    assert source.classes == ["photos"]
    assert source.labels.tolist() == [0, 0]


def test_empty_classes_keep_their_label_and_loose_images_are_named(folder):
    (folder / "aa").mkdir()
    loose = write(folder / "loose.png")
    source = scan_images(folder)
    assert source.classes == ["a", "aa", "b", "c"]
    assert source.labels.tolist() == [0, 0, 2, 2, 3]
    assert source.skipped == {str(loose): "lies beside the class folders"}


def test_links_are_followed_and_cycles_are_not(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "1.jpg")
    (folder / "a" / "linked").symlink_to(elsewhere)
    (folder / "a" / "deep" / "up").symlink_to(folder / "a")
    source = scan_images(folder)
    assert len(source) == 6
    assert any("linked" in path for path in source.paths)


def test_links_that_lead_in_a_circle_end(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        write(tmp_path / name)
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "y").symlink_to(tmp_path / "a")
    found = [os.path.relpath(path, tmp_path) for path in scan_images(tmp_path).paths]
    assert found == ["a/1.jpg", "a/x/1.jpg", "a/x/2.jpg", "b/1.jpg", "b/2.jpg", "b/y/1.jpg"]


@pytest.mark.parametrize("place", [".", "a"])
def test_a_link_to_itself_is_a_skipped_file(folder, place):
    link = folder / place / "loop.jpg"
    link.symlink_to("loop.jpg")
    source = scan_images(folder, max_bad_share=0.5)
    assert len(source) == 5
    assert list(source.skipped) == [str(link)]


def test_more_images_beside_the_folders_than_in_them_are_an_error(tmp_path):
    for n in range(3):
        write(tmp_path / f"{n}.jpg")
    write(tmp_path / "rejected" / "1.jpg")
    with pytest.raises(DataError, match="3 images, and folders with 1 more.*Move"):
        scan_images(tmp_path)


def broken_files(root):
    """Files that cannot be used, with a word of the reason."""
    good_jpeg = write(root / "c" / "good.jpg", (200, 200)).read_bytes()
    good_png = write(root / "c" / "good.png", (200, 200)).read_bytes()
    (root / "c" / "text.jpg").write_text("this is no image")
    (root / "c" / "empty.jpg").touch()
    (root / "c" / "cut.jpg").write_bytes(good_jpeg[:-2000])
    (root / "c" / "cut.png").write_bytes(good_png[: len(good_png) // 2])
    (root / "c" / "header.jpg").write_bytes(good_jpeg[:100])
    (root / "c" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    return {
        "text.jpg": "is not an image",
        "empty.jpg": "0 bytes",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "header.jpg": "cannot be",
        "gone.jpg": "No such file",
    }


def test_broken_files_are_skipped_with_a_reason(folder):
    reasons = broken_files(folder)
    source = scan_images(folder, max_bad_share=0.9)
    assert {os.path.basename(path) for path in source.skipped} == set(reasons)
    for path, reason in source.skipped.items():
        assert reasons[os.path.basename(path)] in reason, (path, reason)
    assert len(source.paths) == len(source.labels) == len(source.sizes) == 7
    assert not set(source.paths) & set(source.skipped)
    assert source.broken == 6


def test_a_file_without_permission_is_skipped(folder, monkeypatch):
    locked = str(folder / "b" / "2.jpg")
    real_open = open

    def no_permission(path, *args, **kwargs):
        if path == locked:
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(image_files, "open", no_permission, raising=False)
    source = scan_images(folder, max_bad_share=0.5)
    assert source.skipped == {locked: "cannot be read: Permission denied"}


def test_an_unreadable_class_folder_is_an_error(folder, monkeypatch):
    real_scandir = os.scandir

    def no_permission(path):
        if os.fspath(path) == str(folder / "b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", no_permission)
    with pytest.raises(DataError, match="the folder .*b cannot be read: Permission denied"):
        scan_images(folder)


def test_odd_but_good_files_are_kept(tmp_path):
    write(tmp_path / "k" / "cmyk.jpg", mode="CMYK")
    write(tmp_path / "k" / "gray.jpg", mode="L")
    write(tmp_path / "k" / "rgba.png", mode="RGBA")
    write(tmp_path / "k" / "palette.png", mode="P")
    write(tmp_path / "k" / "pixel.png", (1, 1))
    write(tmp_path / "k" / "named.jpg", format="PNG")
    (tmp_path / "k" / "trailing.jpg").write_bytes(
        write(tmp_path / "k" / "whole.jpg").read_bytes() + b"\0" * 9
    )
    deep = np.arange(200, dtype=np.uint16).reshape(10, 20) * 300
    Image.fromarray(deep).save(tmp_path / "k" / "deep.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "k" / "huge.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "k" / "turned.jpg", exif=exif)
    source = scan_images(tmp_path)
    assert source.skipped == {}
    sizes = {
        os.path.basename(p): s for p, s in zip(source.paths, source.sizes.tolist(), strict=True)
    }
    assert len(sizes) == 11
    assert sizes["huge.png"] == [10_000, 10_000]
    assert sizes["pixel.png"] == [1, 1]
    assert sizes["turned.jpg"] == [10, 20], "no EXIF rotation, as in the paper's loader"


def test_more_pixels_than_pillow_takes_are_skipped(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    huge = write(folder / "c" / "huge.png", (100, 100))
    source = scan_images(folder, max_bad_share=0.5)
    assert list(source.skipped) == [str(huge)]
    assert "too many pixels" in source.skipped[str(huge)]


def test_too_many_broken_files_are_an_error_that_counts_and_names(folder):
    broken_files(folder)
    with pytest.raises(
        DataError, match=r"6 of 13 images .*max_bad_share 0.3.*; and 1 more"
    ) as error:
        scan_images(folder, max_bad_share=0.3)
    assert str(folder / "c" / "cut.jpg") in str(error.value)


def test_no_good_image_is_an_error_whatever_share_is_allowed(tmp_path):
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match="none of the 1 images"):
        scan_images(tmp_path, max_bad_share=1.0)


def test_folders_without_images_are_errors_that_say_why(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no folder"):
        scan_images(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no images in .*\.jpg, \.jpeg, \.png"):
        scan_images(tmp_path)

    def no_permission(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", no_permission)
    with pytest.raises(DataError, match="cannot be read.*Permission denied"):
        scan_images(tmp_path)


def test_the_number_of_threads_changes_nothing(folder, monkeypatch):
    monkeypatch.setattr(scanning, "_A_TASK", 2)
    one, many = scan_images(folder, workers=1), scan_images(folder, workers=4)
    assert list(one.paths) == list(many.paths)
    assert one.sizes.tolist() == many.sizes.tolist()
    assert list(pickle.loads(pickle.dumps(one)).paths) == list(one.paths)


def test_no_memory_is_not_a_broken_file(folder, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(MemoryError):
        scan_images(folder, max_bad_share=1.0)


def as_tars(folder, target, make_tar):
    """The images of class folders as class tars, and all in one tar."""
    members = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for name in {name.split("/")[0] for name in members}:
        own = {n.partition("/")[2]: data for n, data in members.items() if n.startswith(f"{name}/")}
        make_tar(target / "classes" / f"{name}.tar", own)
    make_tar(target / "all.tar", {f"train/{name}": data for name, data in members.items()})
    return target / "classes", target / "all.tar"


def test_the_same_images_in_tars_and_a_list_are_read_the_same(folder, tmp_path_factory, make_tar):
    target = tmp_path_factory.mktemp("tars")
    expected = scan_images(folder)
    (target / "list.txt").write_text(
        "".join(
            f"{os.path.relpath(path, target)} {expected.classes[label]}\n"
            for path, label in zip(expected.paths, expected.labels, strict=True)
        )
    )
    others = [scan_images(one) for one in (*as_tars(folder, target, make_tar), target / "list.txt")]
    order = sorted(range(5), key=lambda i: expected.read_bytes(i))
    for source in others:
        source = pickle.loads(pickle.dumps(source))
        ours = sorted(range(5), key=lambda i, source=source: source.read_bytes(i))
        assert source.classes == ["a", "b", "c"]
        assert source.skipped == {}
        for i, j in zip(ours, order, strict=True):
            assert source.read_bytes(i) == expected.read_bytes(j)
            assert np.array_equal(source.read_rgb(i), expected.read_rgb(j))
            assert source.labels[i] == expected.labels[j]
            assert source.sizes[i].tolist() == expected.sizes[j].tolist()
    assert others[0].paths[0] == str(target / "classes" / "a.tar" / "deep" / "er" / "1.webp")
    assert [source.kind for source in others] == [
        "class tars: 3 tar(s)", "class tars: 1 tar(s)", "a list",
    ]  # fmt: skip


def test_shards_have_the_labels_of_their_members_or_none(tmp_path, make_tar, picture):
    for n in range(2):
        members = {f"{i}.jpg": picture(10 * n + i) for i in range(3)}
        labels = {f"{i}.cls": str(9 + i).encode() for i in range(3)}
        make_tar(tmp_path / "labelled" / f"s-{n}.tar", members | labels)
        make_tar(tmp_path / "plain" / f"s-{n}.tar", members)
    source = scan_images(tmp_path / "labelled" / "s-{0..1}.tar")
    assert (source.classes, source.labels.tolist()) == (["9", "10", "11"], [0, 1, 2] * 2)
    assert source.kind == "2 labelled tar shard(s)"
    source = scan_images(tmp_path / "plain")
    assert (source.classes, source.labels.tolist()) == (["plain"], [0] * 6)
    assert source.kind == "2 tar shards"


def test_what_is_broken_in_tars_is_skipped_and_named(tmp_path, make_tar, picture):
    make_tar(tmp_path / "0.tar", {f"{i}.jpg": picture(i, (64, 48)) for i in range(3)})
    make_tar(tmp_path / "1.tar", {"a.jpg": picture(), "b.jpg": b"no image", "c.jpg": b""})
    make_tar(tmp_path / "2.tar", {})
    cut = tmp_path / "0.tar"
    end = scan_images(tmp_path, max_bad_share=0.5).in_archives.parts[2].sum()
    cut.write_bytes(cut.read_bytes()[: end - 9])
    source = scan_images(tmp_path, max_bad_share=0.5)
    assert [os.path.relpath(path, tmp_path) for path in source.paths] == [
        "0.tar/0.jpg", "0.tar/1.jpg", "1.tar/a.jpg",
    ]  # fmt: skip
    assert source.read_bytes(2) == picture(), "the places of the good ones are theirs"
    assert source.broken == 3
    skipped = {os.path.relpath(path, tmp_path): why for path, why in source.skipped.items()}
    assert skipped == {
        "0.tar": "ends early or is damaged: the 2 images before that are used",
        "0.tar/2.jpg": "is cut off: the tar ends within it",
        "1.tar/b.jpg": "is not an image",
        "1.tar/c.jpg": "is empty (0 bytes)",
        "2.tar": "holds no images",
    }
    with pytest.raises(DataError, match="3 of 6 images .*max_bad_share 0.4"):
        scan_images(tmp_path, max_bad_share=0.4)


def test_a_tar_cut_after_the_scan_is_a_broken_image(tmp_path, make_tar, picture):
    path = make_tar(tmp_path / "t.tar", {f"{i}.jpg": picture(i) for i in range(2)})
    source = scan_images(path)
    path.write_bytes(path.read_bytes()[: source.in_archives.parts[1].sum() - 9])
    assert len(source.read_bytes(0)) > 0
    with pytest.raises(image_files.UnusableImageError, match="t.tar ends within it"):
        source.read_bytes(1)


def test_tars_without_an_image_are_an_error_that_names_them(tmp_path, make_tar):
    make_tar(tmp_path / "0.tar", {"a.txt": b"x"})
    (tmp_path / "1.tar").touch()
    with pytest.raises(DataError, match=r"0.tar holds no images; .*1.tar is empty"):
        scan_images(tmp_path)


def test_orientation_turns_pictures_and_sizes_where_it_is_asked_for(tmp_path, picture, make_tar):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_tar(tmp_path / "t.tar", {"a.jpg": picture(), "b.jpg": picture(exif=exif)})
    plain, turned = (scan_images(tmp_path, exif=flag) for flag in (False, True))
    assert plain.sizes.tolist() == [[10, 20], [10, 20]]
    assert turned.sizes.tolist() == [[10, 20], [20, 10]]
    for source in (plain, turned):
        pictures = [source.read_rgb(i) for i in range(2)]
        assert [[p.height, p.width] for p in pictures] == source.sizes.tolist()
    assert plain.fingerprint == turned.fingerprint, "the same images, another setting"


def test_the_fingerprint_tells_image_lists_apart(folder, tmp_path_factory):
    first = scan_images(folder).fingerprint
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(folder, copy)
    assert scan_images(copy).fingerprint == first, "wherever they lie"
    write(copy / "b" / "2.jpg", (21, 10))
    other_size = scan_images(copy).fingerprint
    (copy / "b" / "2.jpg").rename(copy / "b" / "3.jpg")
    other_name = scan_images(copy).fingerprint
    assert len({first, other_size, other_name}) == 3


def test_a_list_names_what_is_not_there(folder):
    (folder / "l.txt").write_text("b/2.jpg\nb/none.jpg\nb/10.JPEG\n")
    source = scan_images(folder / "l.txt", max_bad_share=0.5)
    assert list(source.skipped) == [str(folder / "b" / "none.jpg")]
    assert "No such file" in source.skipped[str(folder / "b" / "none.jpg")]

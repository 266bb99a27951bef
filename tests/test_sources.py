"""fastdino.data.sources: which images there are in folders, lists and tars, and their bytes."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastdino.data import reading, scan
from fastdino.data.sources import scan_images
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

    monkeypatch.setattr(reading, "open", no_permission, raising=False)
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
    monkeypatch.setattr(scan, "_A_TASK", 2)
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

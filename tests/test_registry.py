"""Tests of fastdino.data.datasets.registry, file_list, folders and lists."""

from __future__ import annotations

import errno
import os

import pytest

from fastdino.data import image_files
from fastdino.data.datasets.file_list import common_base, number_labels
from fastdino.data.datasets.registry import find_dataset
from fastdino.errors import DataError


@pytest.fixture
def write_images(tmp_path, picture):
    """A function that writes small JPEGs."""

    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(picture())
        return tmp_path

    return write


@pytest.fixture
def shards(tmp_path, make_tar):
    for n in range(3):
        make_tar(tmp_path / f"s-{n:03}.tar", {"a.jpg": b"x"})
    return tmp_path


def write_list(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_labels_are_numbered_in_sorted_order():
    assert number_labels(["b", "a", "b"], "x") == ([1, 0, 1], ["a", "b"])
    assert number_labels(["10", "9"], "x") == ([1, 0], ["9", "10"])
    assert number_labels(["", ""], "x") == ([0, 0], ["x"])
    assert number_labels(["cat", ""], "x") == ([0, 1], ["cat", "unlabelled"])


def test_known_classes_keep_their_numbers():
    assert number_labels(["2", "0"], "x", ["a", "b", "c"]) == ([2, 0], ["a", "b", "c"])
    assert number_labels(["", "0"], "x", ["a"]) == ([1, 0], ["a", "unlabelled"])
    with pytest.raises(DataError, match="label 3 is not a number of the 2 classes"):
        number_labels(["1", "3"], "x", ["a", "b"])


def test_common_base_is_the_deepest_folder():
    assert common_base(["/a/b/1.jpg", "/a/c/2.jpg"]) == ("/a", ["b/1.jpg", "c/2.jpg"])
    assert common_base(["/a/1.jpg"]) == ("/a", ["1.jpg"])


def test_list_has_paths_labels_comments_and_blank_lines(tmp_path):
    text = (
        "\ufeff# made by hand\n\na b.jpg 7\r\n  sub/c.PNG\t3\n/abs/d.webp 10\n../e.jpg 7\nodd\t3\n"
    )
    files = find_dataset(write_list(tmp_path / "train.txt", text))
    assert files.files == ["a b.jpg", "sub/c.PNG", "/abs/d.webp", "../e.jpg", "odd"]
    assert files.path("a b.jpg") == str(tmp_path / "a b.jpg")
    assert files.path("/abs/d.webp") == "/abs/d.webp"
    assert files.classes == ["3", "7", "10"], "numbers are sorted numerically"
    assert files.labels == [1, 0, 2, 1, 0]


def test_list_without_labels_is_one_class(tmp_path):
    files = find_dataset(write_list(tmp_path / "all.txt", "a b 3.jpg\n# c.jpg\nd.jpg\n"))
    assert (files.files, files.classes, files.labels) == (["a b 3.jpg", "d.jpg"], ["all"], [0, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no images in the list .*contains no path; expected a folder"),
        ("# nothing\n\n", "no images in the list"),
        ("a.jpg\n\nnotes about it\n", "line 3: expected the path of an image .*'notes about it'"),
        (b"\x89PNG\0\0", "not a text file, a tar or a zip: expected a folder"),
    ],
)
def test_invalid_list_is_error(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        find_dataset(write_list(tmp_path / "l.txt", text))


def test_images_in_class_folders_take_precedence_over_archives(shards, write_images):
    write_images("cat/1.jpg")
    files = find_dataset(str(shards))
    assert (files.files, files.labels) == (["cat/1.jpg"], [0])
    assert files.skipped[str(shards / "s-000.tar")] == "is next to the class folders"


def test_loose_images_and_archives_in_one_folder_are_ambiguous(shards, write_images):
    write_images("1.jpg")
    with pytest.raises(DataError, match="1 images and 3 tars: move those away"):
        find_dataset(str(shards))


def test_compressed_tars_in_a_folder_are_an_error(tmp_path):
    (tmp_path / "s-0.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"s-0.tar.gz is a compressed tar.*unpack it"):
        find_dataset(str(tmp_path))


def test_split_of_a_folder_is_a_subfolder(write_images):
    root = write_images("train/cat/1.jpg", "val/cat/2.jpg", "test/cat/3.jpg")
    assert find_dataset(f"{root}?split=test").base == str(root / "test")
    assert find_dataset(str(root), "val").base == str(root / "val")
    assert find_dataset(f"{root}?val=test", "val").base == str(root / "test")
    with pytest.raises(DataError, match=r"no folder .*/dev; .* has the folders test, train, val"):
        find_dataset(f"{root}?split=dev")


def test_evaluation_of_a_dataset_without_splits_is_error(shards):
    for name, kind in (("s-*.tar", "a pattern"), ("s-000.tar", "an archive")):
        with pytest.raises(DataError, match=f"is {kind}, which has no splits: expected a folder"):
            find_dataset(str(shards / name), "train")
        with pytest.raises(DataError, match=f"{kind} has no option 'split'; supported: metadata"):
            find_dataset(f"{shards / name}?split=train")
    with pytest.raises(DataError, match="a list has no option 'split'; supported: none"):
        find_dataset(f"{write_list(shards / 'l.txt', 'a.jpg')}?split=train")
    with pytest.raises(DataError, match="there is no file or folder .*gone: expected a folder"):
        find_dataset(str(shards / "gone"))


def test_folder_is_listed_again_after_a_transient_error(write_images, monkeypatch):
    root = write_images("cat/1.jpg", "cat/deep/2.jpg", "dog/3.jpg")
    expected, failed, scandir = find_dataset(str(root)).files, set(), os.scandir

    def fails_once(path):
        if path not in failed:
            failed.add(path)
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return scandir(path)

    monkeypatch.setattr(image_files, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(os, "scandir", fails_once)
    assert find_dataset(str(root)).files == expected
    assert len(failed) == 4

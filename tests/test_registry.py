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


@pytest.mark.parametrize(
    ("labels", "known", "expected"),
    [
        (["b", "a", "b"], [], ([1, 0, 1], ["a", "b"], None)),
        (["10", "9"], [], ([1, 0], ["9", "10"], None)),
        (["10", "", "9"], [], ([1, 2, 0], ["9", "10", "unlabelled"], [True, False, True])),
        (["", ""], [], ([0, 0], ["x"], [False, False])),
        (["cat", ""], [], ([0, 1], ["cat", "unlabelled"], [True, False])),
        (["", "zebra"], [], ([1, 0], ["zebra", "unlabelled"], [False, True])),
        (["unlabelled", "zebra"], [], ([0, 1], ["unlabelled", "zebra"], None)),
        (
            ["unlabelled", "", "zebra"],
            [],
            ([0, 2, 1], ["unlabelled", "zebra", "unlabelled"], [True, False, True]),
        ),
        (["2", "0"], ["a", "b", "c"], ([2, 0], ["a", "b", "c"], None)),
        (["", "0"], ["a"], ([1, 0], ["a", "unlabelled"], [False, True])),
        (
            ["1", ""],
            ["unlabelled", "b"],
            ([1, 2], ["unlabelled", "b", "unlabelled"], [True, False]),
        ),
    ],
)
def test_labels_are_numbered_in_sorted_or_known_order_and_missing_ones_last(
    labels, known, expected
):
    assert number_labels(labels, "x", known) == expected


def test_label_that_is_not_a_known_class_is_error():
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


def test_a_tab_ends_a_path_with_or_without_a_label(tmp_path):
    files = find_dataset(write_list(tmp_path / "train.txt", "a\tb.jpg\tcat\n odd \t\r\nodd 7\t\n"))
    assert files.files == ["a\tb.jpg", "odd", "odd 7"]
    assert files.classes == ["cat", "unlabelled"]
    assert files.labels == [0, 1, 1]


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
    with pytest.raises(DataError, match="1 images and 3 archives: move those away"):
        find_dataset(str(shards))


def test_split_of_a_folder_is_a_subfolder(write_images):
    root = write_images("train/cat/1.jpg", "val/cat/2.jpg", "test/cat/3.jpg")
    assert find_dataset(f"{root}?split=test").base == str(root / "test")
    assert find_dataset(str(root), "val").base == str(root / "val")
    assert find_dataset(f"{root}?val=test", "val").base == str(root / "test")
    with pytest.raises(DataError, match=r"no folder .*/dev; .* has the folders test, train, val"):
        find_dataset(f"{root}?split=dev")


@pytest.mark.parametrize(
    ("path", "role", "message"),
    [
        ("s-*.tar", "train", "is a pattern, which has no splits: expected a folder"),
        ("s-*.tar?split=a", "", "a pattern has no option 'split'; supported: metadata"),
        ("s-000.tar", "val", "is an archive, which has no splits: expected a folder"),
        ("s-000.tar?split=a", "", "an archive has no option 'split'; supported: metadata"),
        ("l.txt?split=train", "", "a list has no option 'split'; supported: none"),
        ("gone", "", "there is no file or folder .*gone: expected a folder"),
    ],
)
def test_option_or_split_that_a_kind_lacks_is_error(shards, path, role, message):
    write_list(shards / "l.txt", "a.jpg")
    with pytest.raises(DataError, match=message):
        find_dataset(str(shards / path), role)


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

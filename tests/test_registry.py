"""fastdino.data.datasets.registry: what lies at --data_path, told apart by looking."""

from __future__ import annotations

import errno
import os

import pytest

from fastdino.data import image_files
from fastdino.data.datasets.registry import find
from fastdino.errors import DataError


def files_of(path):
    found = find(str(path))
    return [os.path.relpath(found.path(file), path.parent) for file in found.files]


def write_list(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_list_has_paths_labels_comments_and_blank_lines(tmp_path):
    text = (
        "\ufeff# made by hand\n\na b.jpg 7\r\n  sub/c.PNG\t3\n/abs/d.webp 10\n../e.jpg 7\nodd\t3\n"
    )
    path = write_list(tmp_path / "train.txt", text)
    found = find(str(path))
    assert found.files == ["a b.jpg", "sub/c.PNG", "/abs/d.webp", "../e.jpg", "odd"]
    assert found.path("a b.jpg") == str(tmp_path / "a b.jpg")
    assert found.path("/abs/d.webp") == "/abs/d.webp"
    assert found.classes == ["3", "7", "10"], "numbers in the order of numbers"
    assert found.labels == [1, 0, 2, 1, 0]


def test_a_list_without_labels_is_one_class_and_missing_ones_are_a_class(tmp_path):
    found = find(str(write_list(tmp_path / "all.txt", "a b 3.jpg\n# c.jpg\nd.jpg\n")))
    assert (found.files, found.classes, found.labels) == (["a b 3.jpg", "d.jpg"], ["all"], [0, 0])
    found = find(str(write_list(tmp_path / "all.txt", "a.jpg cat\nb.jpg\n")))
    assert (found.classes, found.labels) == (["cat", "unlabelled"], [0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no images in the list .*it holds no path; expected a folder"),
        ("# nothing\n\n", "no images in the list"),
        ("a.jpg\n\nnotes about it\n", "line 3: expected the path of an image .*'notes about it'"),
        (b"\x89PNG\0\0", "neither a text file nor a tar nor a zip: expected a folder"),
    ],
)
def test_what_is_no_list_says_what_was_expected(tmp_path, text, message):
    path = write_list(tmp_path / "l.txt", text)
    with pytest.raises(DataError, match=message):
        find(str(path))


@pytest.fixture
def shards(tmp_path, make_tar):
    for n in range(3):
        make_tar(tmp_path / "d" / f"s-{n:03}.tar", {"a.jpg": b"x"})
    return tmp_path / "d"


def test_tars_by_folder_pattern_and_name(shards):
    names = [f"s-00{n}.tar" for n in range(3)]
    assert find(str(shards)).files == names
    for pattern, expected in (
        ("s-{000..002}.tar", names),
        ("s-{001..002}.tar", names[1:]),
        ("s-*.tar", names),
        ("s-00[02].tar", names[::2]),
    ):
        assert files_of(shards / pattern) == expected
        assert find(str(shards / pattern)).labels is None
    assert files_of(shards / "s-001.tar") == names[1:2]
    assert find(str(shards)).numbered
    assert not find(str(shards / "s-00[02].tar")).numbered


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s-{000..003}.tar", "there is no .*s-003.tar"),
        ("t-*.tar", "no file is called .*t-.*expected a folder"),
        ("s-{2..1}.tar", "runs backwards"),
        ("*", "must name tars or zips, and .*notes.txt is none"),
        ("gone", "there is no folder .*gone, and no file: expected a folder"),
    ],
)
def test_a_pattern_without_tars_says_so(shards, path, message):
    (shards / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        find(str(shards / path))


def test_images_win_over_tars_beside_class_folders_and_the_tars_are_named(shards, picture):
    (shards / "cat").mkdir()
    (shards / "cat" / "1.jpg").write_bytes(picture())
    found = find(str(shards))
    assert (found.files, found.labels) == (["cat/1.jpg"], [0])
    assert found.skipped[str(shards / "s-000.tar")] == "lies beside the class folders"


def test_loose_images_and_tars_in_one_folder_are_ambiguous(shards, picture):
    (shards / "1.jpg").write_bytes(picture())
    with pytest.raises(DataError, match="1 images and 3 tars: which are meant"):
        find(str(shards))


def test_compressed_tars_in_a_folder_are_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "s-0.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"s-0.tar.gz is a compressed tar.*unpack it"):
        find(str(tmp_path))


def test_a_split_of_a_folder_is_the_folder_of_that_name(tmp_path, picture):
    for name in ("train/cat/1.jpg", "val/cat/2.jpg", "test/cat/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(picture())
    assert find(f"{tmp_path}?split=test").base == str(tmp_path / "test")
    assert find(str(tmp_path), "val").base == str(tmp_path / "val")
    assert find(f"{tmp_path}?val=test", "val").base == str(tmp_path / "test")
    with pytest.raises(DataError, match=r"no folder .*/dev; .* has the folders test, train, val"):
        find(f"{tmp_path}?split=dev")


def test_what_has_no_splits_is_not_evaluated_on(shards):
    for name, kind in (("s-*.tar", "a pattern"), ("s-000.tar", "an archive")):
        with pytest.raises(DataError, match=f"is {kind}, which has no splits: expected a folder"):
            find(str(shards / name), "train")
        with pytest.raises(DataError, match=f"{kind} has no option 'split'; it takes metadata"):
            find(f"{shards / name}?split=train")


def test_a_folder_that_cannot_be_listed_once_is_listed_again(tmp_path, picture, monkeypatch):
    for name in ("cat/1.jpg", "cat/deep/2.jpg", "dog/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    expected, failed, real = find(str(tmp_path)).files, set(), os.scandir

    def fails_once(path):
        if path not in failed:
            failed.add(path)
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return real(path)

    monkeypatch.setattr(image_files, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(os, "scandir", fails_once)
    assert find(str(tmp_path)).files == expected
    assert len(failed) == 4

"""Tests of fastdino.data.datasets.archives and webdataset."""

from __future__ import annotations

import os

import pytest

from fastdino.data.datasets.archives import are_numbered, class_names, expand_range
from fastdino.data.datasets.registry import find_dataset
from fastdino.data.datasets.webdataset import is_hidden
from fastdino.data.image_files import Part
from fastdino.data.manifest import concatenate, unread_manifest
from fastdino.errors import DataError

SHARDS = [f"s-00{n}.tar" for n in range(3)]


@pytest.fixture
def shards(tmp_path, make_tar):
    for name in SHARDS:
        make_tar(tmp_path / name, {"a.jpg": b"x"})
    return tmp_path


def test_macos_metadata_is_hidden():
    assert is_hidden("a/._b.jpg")
    assert is_hidden("__MACOSX/a/b.jpg")
    assert not is_hidden("a/b.jpg")


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
def test_tars_of_a_folder_a_pattern_or_a_name(shards, path, expected):
    files = find_dataset(str(shards / path))
    assert [os.path.relpath(files.path(file), shards) for file in files.files] == expected
    assert files.labels is None
    assert files.numbered == (len(expected) > 1 and path != "s-00[02].tar")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s-{000..003}.tar", "s-003.tar does not exist"),
        ("t-*.tar", "t-.*no file matches; expected a folder"),
        ("s-{2..1}.tar", "is descending"),
        ("*", "expected only tars or zips, but it matches .*notes.txt"),
    ],
)
def test_pattern_without_archives_is_error(shards, path, message):
    (shards / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        find_dataset(str(shards / path))


def test_ranges_keep_order_and_leading_zeros():
    names = ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_range("a/{08..11}.tar") == names
    assert expand_range("{0..1}-{2..3}") == ["0-2", "0-3", "1-2", "1-3"]
    assert expand_range("plain") == ["plain"]

"""fastdino.data.datasets.data_path: --data_path taken apart, splits chosen, labels numbered."""

from __future__ import annotations

import pytest

from fastdino.data.datasets.data_path import Place, common_base, known_labels, number_labels, parse
from fastdino.errors import DataError

SCHEMES = ("torchvision", "hf")


@pytest.mark.parametrize(
    ("text", "scheme", "path", "options"),
    [
        ("/data/x", "", "/data/x", {}),
        ("/data/x?split=a", "", "/data/x", {"split": "a"}),
        ("torchvision:STL10?split=a+b", "torchvision", "STL10", {"split": "a+b"}),
        ("hf:u/n?image=a b&label=x=y", "hf", "u/n", {"image": "a b", "label": "x=y"}),
        ("hf:/a/b?root=/c/d", "hf", "/a/b", {"root": "/c/d"}),
        ("train-?.tar", "", "train-?.tar", {}),
        ("train-??.tar?metadata=/m", "", "train-??.tar", {"metadata": "/m"}),
        ("a:b/c-*.tar", "", "a:b/c-*.tar", {}),
    ],
)  # fmt: skip
def test_a_place_is_taken_apart(text, scheme, path, options):
    assert parse(text, SCHEMES) == Place(text, scheme, path, options)


def test_a_file_or_folder_of_that_very_name_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("hf:x", "y?split=z"):
        (tmp_path / name).mkdir()
        assert parse(name, SCHEMES) == Place(name, "", name)
    assert parse("hf:x?split=a", SCHEMES) == Place("hf:x?split=a", "", "hf:x", {"split": "a"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x?a=1&a=2", "the option 'a' is given twice"),
        ("x?a=", "the option 'a' has no value"),
        ("torchvison:CIFAR10?split=a", "of the kind torchvison:; did you mean torchvision:C"),
        ("s3://bucket/x", "no data of the kind s3:; known are torchvision, hf"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_apart_says_why(text, message):
    with pytest.raises(DataError, match=message):
        parse(text, SCHEMES)


@pytest.mark.parametrize(
    ("text", "role", "splits", "expected"),
    [
        ("x", "", ["test", "train"], "train"),
        ("x", "", ["all"], "all"),
        ("x?split=test", "", ["test", "train"], "test"),
        ("x", "train", ["test", "train"], "train"),
        ("x", "val", ["test", "train"], "test"),
        ("x", "val", ["test", "validation"], "validation"),
        ("x?val=test", "val", ["test", "val"], "test"),
        ("x?val=test", "train", ["test", "train"], "train"),
    ],
)
def test_a_split_is_the_one_asked_for_or_the_usual_one(text, role, splits, expected):
    assert parse(text, SCHEMES, role).choose_split(splits) == expected


@pytest.mark.parametrize(
    ("text", "role", "splits", "message"),
    [
        ("x?split=b", "", ["a", "train"], r"no split 'b'; its splits are a, train: .* by \?split="),
        ("x", "", ["a", "b"], "no split to take for training; its splits are a, b"),
        ("x", "val", ["train"], r"no split to take for val; its splits are train: .* by \?val="),
        ("x?split=a", "val", ["a"], r"two splits are wanted here: name them by \?train=...&val="),
    ],
)
def test_a_split_that_there_is_not_is_an_error_that_lists_them(text, role, splits, message):
    with pytest.raises(DataError, match=message):
        parse(text, SCHEMES, role).choose_split(splits)


def test_options_that_are_not_taken_are_errors():
    place = parse("x?a=1&b=2", SCHEMES)
    place.check_options(["b", "a"], "a folder")
    with pytest.raises(DataError, match="a folder has no option 'b'; it takes a"):
        place.check_options(["a"], "a folder")
    with pytest.raises(DataError, match="a list has no option 'a'; it takes none"):
        place.check_options([], "a list")


def test_labels_are_numbered():
    assert number_labels(["b", "a", "b"], "x") == ([1, 0, 1], ["a", "b"])
    assert number_labels(["10", "9"], "x") == ([1, 0], ["9", "10"])
    assert number_labels(["", ""], "x") == ([0, 0], ["x"])


def test_numbers_of_known_classes_keep_them_all():
    assert known_labels(["2", "0"], ["a", "b", "c"]) == ([2, 0], ["a", "b", "c"])
    assert known_labels(["", "0"], ["a"]) == ([1, 0], ["a", "unlabelled"])
    with pytest.raises(DataError, match="the label 3 is none of the 2 classes' numbers"):
        known_labels(["1", "3"], ["a", "b"])


def test_paths_have_a_folder_in_common():
    assert common_base(["/a/b/1.jpg", "/a/c/2.jpg"]) == ("/a", ["b/1.jpg", "c/2.jpg"])
    assert common_base(["/a/1.jpg"]) == ("/a", ["1.jpg"])

"""Tests of fastdino.data.datasets.data_path and splits: parsing --data_path, choosing a split."""

from __future__ import annotations

import pytest

from fastdino.data.datasets.data_path import DataPath, parse
from fastdino.data.datasets.splits import choose_split
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
)
def test_parse_separates_scheme_path_and_options(text, scheme, path, options):
    assert parse(text, SCHEMES) == DataPath(text, scheme, path, options)


def test_existing_file_name_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("hf:x", "y?split=z"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf:list.txt").write_text("a.jpg\n")
    (tmp_path / "hf:gone").symlink_to("nowhere")
    for name in ("hf:x", "y?split=z", "hf:list.txt", "hf:gone"):
        assert parse(name, SCHEMES) == DataPath(name, "", name)
    assert parse("hf:x?split=a", SCHEMES) == DataPath("hf:x?split=a", "", "hf:x", {"split": "a"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x?a=1&a=2", "option 'a' is given twice"),
        ("x?a=", "option 'a' has no value"),
        ("torchvison:CIFAR10?split=a", "unknown scheme torchvison:; did you mean torchvision:C"),
        ("s3://bucket/x", "unknown scheme s3:; supported are torchvision:, hf:"),
    ],
)
def test_invalid_data_path_is_error(text, message):
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
def test_split_is_the_requested_or_the_usual_one(text, role, splits, expected):
    assert choose_split(parse(text, SCHEMES, role), splits) == expected


@pytest.mark.parametrize(
    ("text", "role", "splits", "message"),
    [
        ("x?split=b", "", ["a", "train"], r"no split 'b'; .* are a, train: .* with \?split="),
        ("x", "", ["a", "b"], "no default split for training; its splits are a, b"),
        ("x", "val", ["train"], r"no default split for val; .* are train: .* with \?val="),
        ("x?split=a", "val", ["a"], r"needs two splits: use \?train=...&val="),
    ],
)
def test_missing_split_is_error(text, role, splits, message):
    with pytest.raises(DataError, match=message):
        choose_split(parse(text, SCHEMES, role), splits)

"""Tests of fastdino.data.datasets.davis_frames."""

from __future__ import annotations

import os

import pytest

from fastdino.data.datasets.data_path import DataPath
from fastdino.data.datasets.davis_frames import is_davis, sequence_names
from fastdino.data.image_dataset import scan_images
from fastdino.errors import DataError


@pytest.fixture
def davis(tmp_path, picture):
    """Three sequences of two frames with masks, in two resolutions, and lists of both years."""
    for name in ("bear", "camel", "dog"):
        for folder in ("JPEGImages/480p", "JPEGImages/Full-Resolution", "Annotations/480p"):
            below = tmp_path / folder / name
            below.mkdir(parents=True)
            form, suffix = ("PNG", "png") if "Ann" in folder else ("JPEG", "jpg")
            size = (40, 30) if "Full" in folder else (20, 15)
            for i in range(2):
                (below / f"{i:05}.{suffix}").write_bytes(picture(i, size, form))
    pairs = [
        f"/JPEGImages/480p/{name}/{i:05}.jpg /Annotations/480p/{name}/{i:05}.png\n"
        for name in ("camel", "dog")
        for i in range(2)
    ]
    lists = {"2017/train": "dog\nbear\n", "2017/val": "camel\n", "480p/trainval": "".join(pairs)}
    for name, text in lists.items():
        path = tmp_path / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(root, options=""):
    dataset = scan_images(f"{root}{options}")
    return dataset, [os.path.relpath(path, root) for path in dataset.paths]


def test_dataset_contains_frames_but_not_masks(davis):
    dataset, frames = names(davis)
    classes = ["bear", "camel", "dog"]
    assert frames == [f"JPEGImages/480p/{name}/{i:05}.jpg" for name in classes for i in range(2)]
    assert (dataset.classes, dataset.labels.tolist()) == (classes, [0, 0, 1, 1, 2, 2])
    assert dataset.kind == "DAVIS sequences, 480p"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("2017/train", ["bear", "dog"]),
        ("train", ["bear", "dog"]),
        ("val", ["camel"]),
        ("trainval", ["camel", "dog"]),
    ],
)
def test_split_contains_the_sequences_of_its_list(davis, split, expected):
    assert names(davis, f"?split={split}")[0].classes == expected


def test_resolution_option(davis):
    dataset, frames = names(davis, "?resolution=Full-Resolution&split=val")
    assert frames[0] == "JPEGImages/Full-Resolution/camel/00000.jpg"
    assert dataset.sizes.tolist() == [[30, 40]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("split=tset", "no split 'tset'; its splits are 2017/train, 2017/val, 480p/trainval"),
        ("resolution=1080p", "no resolution '1080p'; available: 480p, Full-Resolution"),
        ("size=1", "DAVIS has no option 'size'; supported: split, train, val, resolution"),
    ],
)
def test_unsupported_option_values_are_errors(davis, options, message):
    with pytest.raises(DataError, match=message):
        scan_images(f"{davis}?{options}")


def test_sequences_without_frames_are_left_out(davis):
    whole = scan_images(f"{davis}?split=train")
    (davis / "ImageSets/2017/train.txt").write_text("\n".join([*whole.classes, "zebra", "empty"]))
    (davis / "JPEGImages/480p/empty").mkdir()
    dataset = scan_images(f"{davis}?split=train")
    assert dataset.paths == whole.paths
    frames = davis / "JPEGImages/480p"
    assert dataset.skipped == {
        f"{frames}/empty": "has no frames",
        f"{frames}/zebra": "is missing; 2017/train lists it",
    }
    assert dataset.broken == 0
    (davis / "ImageSets/2017/train.txt").write_text("zebra\nempty\n")
    with pytest.raises(DataError, match="none of 2 sequences has frames, for example empty"):
        scan_images(f"{davis}?split=train")


def test_empty_lists_are_errors(davis):
    (davis / "ImageSets/2017/train.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no sequence"):
        sequence_names(davis / "ImageSets/2017/train.txt")


def test_pascal_voc_is_not_davis(tmp_path, picture):
    assert not is_davis(DataPath(str(tmp_path), "", str(tmp_path)))
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "2007_000027.jpg").write_bytes(picture())  # as PASCAL VOC
    assert not is_davis(DataPath(str(tmp_path), "", str(tmp_path)))

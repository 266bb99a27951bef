"""fastdino.data.datasets.davis_frames: DAVIS's frames as images to train on."""

from __future__ import annotations

import os

import pytest

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
    lists = {"2017/train": "dog\nbear\n", "2017/val": "camel\n", "480p/trainval": ""}
    lists["480p/trainval"] = "".join(
        f"/JPEGImages/480p/{name}/{i:05}.jpg /Annotations/480p/{name}/{i:05}.png\n"
        for name in ("camel", "dog")
        for i in range(2)
    )
    for name, text in lists.items():
        path = tmp_path / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(root, options="", **more):
    source = scan_images(f"{root}{options}", **more)
    frames = [os.path.relpath(path, root) for path in source.paths]
    return source, frames


def test_frames_are_taken_and_masks_are_not(davis):
    source, frames = names(davis)
    assert frames == [
        f"JPEGImages/480p/{name}/{i:05}.jpg" for name in ("bear", "camel", "dog") for i in range(2)
    ]
    assert (source.classes, source.labels.tolist()) == (
        ["bear", "camel", "dog"],
        [0, 0, 1, 1, 2, 2],
    )
    assert source.kind == "DAVIS sequences, 480p"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("2017/train", ["bear", "dog"]),
        ("train", ["bear", "dog"]),
        ("val", ["camel"]),
        ("trainval", ["camel", "dog"]),
    ],
)
def test_a_split_takes_the_sequences_of_its_list(davis, split, expected):
    assert names(davis, f"?split={split}")[0].classes == expected


def test_the_resolution_is_chosen_by_an_option(davis):
    source, frames = names(davis, "?resolution=Full-Resolution&split=val")
    assert frames[0] == "JPEGImages/Full-Resolution/camel/00000.jpg"
    assert source.sizes.tolist() == [[30, 40]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "?split=tset",
            "no split 'tset'; its splits are 2017/train, 2017/val, 480p/trainval, train",
        ),
        ("?resolution=1080p", "no resolution '1080p'; there are 480p, Full-Resolution"),
        ("?size=1", "DAVIS has no option 'size'; it takes split, train, val, resolution"),
    ],
)
def test_what_there_is_not_is_said_with_what_there_is(davis, options, message):
    with pytest.raises(DataError, match=message):
        scan_images(f"{davis}{options}")


def test_missing_sequences_and_empty_lists_are_errors(davis):
    (davis / "ImageSets/2017/train.txt").write_text("dog\nzebra\n")
    with pytest.raises(DataError, match="2017/train names 1 sequences .* among them zebra"):
        scan_images(f"{davis}?split=train")
    (davis / "ImageSets/2017/train.txt").write_text("\n")
    with pytest.raises(DataError, match="names no sequence"):
        sequence_names(davis / "ImageSets/2017/train.txt")


def test_a_layout_without_folders_of_frames_is_none_of_davis(tmp_path, picture):
    assert not is_davis(str(tmp_path))
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "2007_000027.jpg").write_bytes(picture())  # as PASCAL VOC
    assert not is_davis(str(tmp_path))

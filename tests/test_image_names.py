"""fastdino.data.image_names, and its rules wherever images are listed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastdino.data import image_files, image_names, scan_images
from fastdino.data.image_files import AS_STORED
from fastdino.data.image_names import is_image_name, is_leftover, natural_order
from fastdino.errors import DataError
from fastdino.evals.attention_jaccard import find_masked
from fastdino.evals.davis_dataset import find_sequences
from fastdino.evals.features import ImageFiles
from fastdino.evals.video_io import open_frames
from fastdino.evals.visualize_attention import find_images

LEFTOVERS = [
    "._0.jpg", ".DS_Store", ".hidden.jpg", "Thumbs.db", "__MACOSX/a/._0.jpg", "__MACOSX/0.jpg",
    ".ipynb_checkpoints/0-checkpoint.jpg", "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/0.jpg",
    "$RECYCLE.BIN/$R0.jpg", "desktop.ini", ".Trash-1000/files/0.jpg",
]  # fmt: skip


def jpeg(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def litter():
    """A function that puts what systems leave behind into a folder."""

    def write(folder):
        for name in LEFTOVERS:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0\5\26\7" + bytes(60))

    return write


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers_are_recognised_in_any_folder(name):
    assert is_leftover(name)
    assert is_leftover(f"train/n01/{name}")
    assert not is_image_name(name)


@pytest.mark.parametrize("name", ["a.jpg", "./a.JPG", "a/b.c/d..png", "x.jfif", "DS_Store/a.webp"])
def test_images_of_the_user_are_no_leftovers(name):
    assert is_image_name(name)


def test_names_are_ordered_by_the_value_of_their_numbers():
    names = ["f10.png", "f2.png", "f02.png", "f1a10.png", "f1a9.png", "f.png", "٣.png"]
    assert sorted(names, key=natural_order) == [
        "f1a9.png", "f1a10.png", "f02.png", "f2.png", "f10.png", "f.png", "٣.png",
    ]  # fmt: skip


def test_training_ignores_leftovers_in_folders_and_archives(tmp_path, litter):
    data = tmp_path / "data"
    for name in ("a", "b", "empty"):
        (data / name).mkdir(parents=True)
    for i in range(3):
        (data / "a" / f"{i}.jpg").write_bytes(jpeg())
        (data / "b" / f"{i}.jpg").write_bytes(jpeg())
    litter(data)
    litter(data / "a")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in data.rglob("*"):
            archive.write(path, path.relative_to(data))
    folder, zipped = scan_images(data), scan_images(tmp_path / "data.zip")
    assert (len(folder), folder.classes, folder.skipped) == (6, ["a", "b", "empty"], {})
    assert (len(zipped), zipped.classes, zipped.skipped) == (6, ["a", "b"], {})


def test_a_flat_folder_with_leftovers_in_folders_is_flat(tmp_path, litter):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg())
    litter(tmp_path)
    dataset = scan_images(tmp_path)
    assert (len(dataset), dataset.kind) == (3, "a flat folder")


def davis(root, litter):
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        folder = root / kind / "480p/bear"
        folder.mkdir(parents=True)
        for i in (1, 2, 10):
            Image.new("L", (64, 48), i).save(folder / f"{i}.{suffix}")
        litter(folder)
        litter(folder.parent)
    lists = root / "ImageSets/2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_bytes(b"\xef\xbb\xbfbear\r\n")
    return root


def test_frames_are_in_natural_order_wherever_they_are_read(tmp_path, litter):
    root = davis(tmp_path / "DAVIS", litter)
    expected = ["1.jpg", "2.jpg", "10.jpg"]
    (sequence,), left_out = find_sequences(root)
    assert not left_out
    assert [path.name for path in sequence.frames] == expected
    dataset = scan_images(f"{root}?split=2017/val")
    assert [os.path.basename(path) for path in dataset.paths] == expected
    assert dataset.classes == ["bear"]
    folder = root / "JPEGImages/480p/bear"
    assert [path.name for path in ImageFiles.in_folder(folder).paths] == expected
    assert [frame.getpixel((0, 0))[0] for frame in open_frames(str(folder))] == [1, 2, 10]


def test_evaluations_ignore_leftovers(tmp_path, litter):
    (tmp_path / "val/a").mkdir(parents=True)
    (tmp_path / "masks/val/a").mkdir(parents=True)
    (tmp_path / "val/a/0.jpg").write_bytes(jpeg())
    Image.new("L", (64, 48)).save(tmp_path / "masks/val/a/0.png")
    litter(tmp_path / "val/a")
    litter(tmp_path / "val")
    assert len(find_masked(tmp_path, "val").images) == 1
    assert len(find_images(str(tmp_path / "val/a"))[0]) == 1


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".gif", ".jp2", ".avif"])
def test_images_that_pillow_reads_are_used(tmp_path, suffix):
    if suffix not in image_names.EXTENSIONS:
        pytest.skip("this version of Pillow does not read it")
    picture = Image.new("RGB", (64, 48), (200, 30, 40))
    for i in range(2):
        picture.save(tmp_path / f"{i}{suffix}", "JPEG" if suffix in (".jfif", ".jpe") else None)
    dataset = scan_images(tmp_path)
    assert len(dataset) == 2
    assert np.abs(np.array(dataset.read_rgb(0)) - np.array(picture).astype(int)).max() < 8


def test_images_that_pillow_does_not_read_are_counted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(DataError, match=r"x\.HEIC and 0 more .* convert them"):
        scan_images(tmp_path)
    (tmp_path / "a/x.jpg").write_bytes(jpeg())
    dataset = scan_images(tmp_path, max_bad_share=0)
    assert len(dataset) == 1
    assert dataset.broken == 0
    (reason,) = dataset.skipped.values()
    assert "format" in reason


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg())
    path = tmp_path / "x.jpg"
    make = {
        "pipe": "os.mkfifo(path)",
        "socket": "socket.socket(socket.AF_UNIX).bind(path)",
        "device": "os.symlink('/dev/zero', path)",
        "folder": "os.mkdir(path); os.mkdir(path + '/y.jpg')",
    }[kind]
    subprocess.run([sys.executable, "-c", f"import os, socket; path = 'x.jpg'; {make}"],
                   cwd=tmp_path, check=True)  # fmt: skip
    dataset = scan_images(tmp_path, max_bad_share=0.5)
    assert len(dataset) == 3
    if kind != "folder":
        reason = "cannot be read: not a regular file"
        assert list(dataset.skipped.items()) == [(str(path), reason)]
        with pytest.raises(DataError, match=rf"x\.jpg {reason}"):
            AS_STORED.read(path)


@pytest.mark.parametrize("pipe", ["list.txt", "a.zip", "a.tar", "folder/a.zip", "folder/a.tar"])
def test_pipes_are_no_datasets(tmp_path, pipe):
    (tmp_path / pipe).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / pipe)
    with pytest.raises(DataError, match=r"cannot be read: .*not a regular file"):
        scan_images(tmp_path / pipe.split("/")[0])


def test_files_and_members_beyond_the_size_of_an_image_are_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGEST_IMAGE", 100_000)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    data = tmp_path / "data"
    data.mkdir()
    contents = {f"{i}.jpg": jpeg() for i in range(4)} | {"bomb.jpg": jpeg() + bytes(200_000)}
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"a/{name}", content)
            (data / name).write_bytes(content)
    for path in (data, tmp_path / "data.zip"):
        dataset = scan_images(path, max_bad_share=0.5)
        assert len(dataset) == 4
        (reason,) = dataset.skipped.values()
        assert "more than 0 MB of an image" in reason

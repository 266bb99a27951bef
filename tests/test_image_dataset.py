"""Tests of fastdino.data.image_dataset: finding, labelling and reading the images of a dataset."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastdino.data import image_files, scanning
from fastdino.data.image_dataset import scan_images
from fastdino.data.image_files import Conversion
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


def test_scan_matches_imagefolder(folder):
    for name in ("k/b/1.png", "k/a/1.png", "k/a-/1.png", "k/0.png", "k/a/c/1.png"):
        write(folder / name)
    dataset = scan_images(folder)
    theirs = ImageFolder(folder)
    assert list(zip(dataset.paths, dataset.labels.tolist(), strict=True)) == theirs.samples
    assert dataset.classes == theirs.classes == ["a", "b", "c", "k"]
    assert dataset.sizes.tolist() == [[10, 20]] * len(dataset) == [[10, 20]] * 10
    assert (dataset.sizes.dtype, dataset.labels.dtype) == (np.int32, np.int64)
    assert dataset.skipped == {}


def test_flat_folder_is_one_class(tmp_path):
    for name in ("b.jpg", "a.png"):
        write(tmp_path / "photos" / name)
    (tmp_path / "photos" / "empty").mkdir()
    dataset = scan_images(str(tmp_path / "photos"))
    assert [os.path.basename(path) for path in dataset.paths] == ["a.png", "b.jpg"]
    assert (dataset.classes, dataset.labels.tolist()) == (["photos"], [0, 0])


@pytest.mark.parametrize("splits", [["val"], ["train", "val"]])
def test_an_evaluation_of_a_flat_folder_says_that_it_has_no_class_folders(
    tmp_path, picture, splits
):
    for split in ("train", "val"):
        folder = tmp_path / split / ("" if split in splits else "a")
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.jpg").write_bytes(picture())
    for split in splits:
        message = rf"{split} of .* \(a flat folder\) has no class folders: expected one folder per"
        with pytest.raises(DataError, match=message):
            scan_images(tmp_path, role=split)
        assert len(scan_images(tmp_path / split)) == 3


def test_empty_classes_are_kept_and_loose_images_are_skipped(folder):
    (folder / "aa").mkdir()
    loose = write(folder / "loose.png")
    dataset = scan_images(folder)
    assert dataset.classes == ["a", "aa", "b", "c"]
    assert dataset.labels.tolist() == [0, 0, 2, 2, 3]
    assert dataset.skipped == {str(loose): "is next to the class folders"}


def test_links_are_followed_but_cycles_are_not(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        write(tmp_path / name)
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "y").symlink_to(tmp_path / "a")
    paths = [os.path.relpath(path, tmp_path) for path in scan_images(tmp_path).paths]
    assert paths == ["a/1.jpg", "a/x/1.jpg", "a/x/2.jpg", "b/1.jpg", "b/2.jpg", "b/y/1.jpg"]


@pytest.mark.parametrize("place", [".", "a"])
def test_link_to_itself_is_skipped(folder, place):
    link = folder / place / "loop.jpg"
    link.symlink_to("loop.jpg")
    dataset = scan_images(folder, max_bad_share=0.5)
    assert len(dataset) == 5
    assert list(dataset.skipped) == [str(link)]


@pytest.fixture
def broken(folder):
    """Unusable files in class c: name -> a word of the reason."""
    good_jpeg = write(folder / "c" / "good.jpg", (200, 200)).read_bytes()
    good_png = write(folder / "c" / "good.png", (200, 200)).read_bytes()
    contents = {
        "text.jpg": (b"this is no image", "is not an image"),
        "empty.jpg": (b"", "0 bytes"),
        "cut.jpg": (good_jpeg[:-2000], "truncated"),
        "cut.png": (good_png[: len(good_png) // 2], "truncated"),
        "header.jpg": (good_jpeg[:100], "cannot be"),
    }
    for name, (data, _) in contents.items():
        (folder / "c" / name).write_bytes(data)
    (folder / "c" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return {name: reason for name, (_, reason) in contents.items()} | {"gone.jpg": "No such file"}


def test_broken_files_are_skipped_with_a_reason(folder, broken):
    dataset = scan_images(folder, max_bad_share=0.9)
    assert {os.path.basename(path) for path in dataset.skipped} == set(broken)
    for path, reason in dataset.skipped.items():
        assert broken[os.path.basename(path)] in reason, (path, reason)
    assert len(dataset.paths) == len(dataset.labels) == len(dataset.sizes) == 7
    assert not set(dataset.paths) & set(dataset.skipped)
    assert dataset.broken == 6
    with pytest.raises(DataError, match=r"6 of 13 images .*share 0.3 .*c/cut.jpg.*; and 1 more"):
        scan_images(folder, max_bad_share=0.3)


def test_labels_belong_to_their_images_if_others_are_skipped(folder, broken):
    for name in ("b/3.jpg", "d/1.png", "d/2.png", "e/1.png"):
        write(folder / name)
    (folder / "a" / "0.jpg").write_bytes(b"this is no image")
    dataset = scan_images(folder, max_bad_share=0.9)
    names = [os.path.relpath(path, folder).split(os.sep)[0] for path in dataset.paths]
    assert [dataset.classes[label] for label in dataset.labels] == names
    assert sorted(set(names)) == dataset.classes == ["a", "b", "c", "d", "e"]


def test_labels_keep_their_classes_without_the_unlabelled_images(tmp_path, make_tar, picture):
    """A class may have the name of the class of the unlabelled images."""
    labels = {"1": b"zebra", "2": None, "3": b"unlabelled", "4": b"zebra", "5": None}
    members = {f"{key}.jpg": picture(int(key)) for key in labels}
    members |= {f"{key}.cls": label for key, label in labels.items() if label}
    make_tar(tmp_path / "train" / "a.tar", members)
    dataset = scan_images(tmp_path / "train")
    assert dataset.classes == ["unlabelled", "zebra", "unlabelled"]
    assert dataset.labels.tolist() == [1, 2, 0, 1, 2]
    known, classes = dataset.known_labels()
    assert known.tolist() == [1, -1, 0, 1, -1]
    assert classes == ["unlabelled", "zebra"]
    labelled = dataset.subset(np.array([2, 0]))
    assert labelled.known_labels()[1] == classes, "also without the unlabelled images"
    evaluated = scan_images(tmp_path, role="train")
    assert evaluated.classes == ["unlabelled", "zebra"]
    assert evaluated.labels.tolist() == [1, 0, 1]
    assert [os.path.basename(path) for path in evaluated.paths] == ["1.jpg", "3.jpg", "4.jpg"]


def test_images_of_a_list_without_labels_have_none(tmp_path, picture):
    """A list in which some lines have a label, and one in which none has."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "some.txt").write_text("0.jpg cat\n1.jpg\n2.jpg ant\n")
    labels, classes = scan_images(tmp_path / "some.txt").known_labels()
    assert (labels.tolist(), classes) == ([1, -1, 0], ["ant", "cat"])
    (tmp_path / "none.txt").write_text("0.jpg\n1.jpg\n")
    labels, classes = scan_images(tmp_path / "none.txt").known_labels()
    assert (labels.tolist(), classes) == ([-1, -1], [])


@pytest.fixture
def forbid(monkeypatch):
    """A function that makes another one raise PermissionError for one path."""

    def patch(module, name, forbidden):
        real = getattr(module, name, open)

        def fails(path, *args, **options):
            if os.fspath(path) == str(forbidden):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(module, name, fails, raising=False)

    return patch


def test_file_without_permission_is_skipped(folder, forbid):
    locked = str(folder / "b" / "2.jpg")
    forbid(image_files, "open", locked)
    dataset = scan_images(folder, max_bad_share=0.5)
    assert dataset.skipped == {locked: "cannot be read: Permission denied"}


@pytest.mark.parametrize("place", [".", "b"])
def test_folder_without_permission_is_error(folder, forbid, place):
    forbid(os, "scandir", folder / place)
    message = f"{folder / place} cannot be read: Permission denied; make it readable"
    with pytest.raises(DataError, match=message):
        scan_images(folder)


def test_unusual_but_valid_files_are_kept(tmp_path):
    folder = tmp_path / "k"
    for mode, name in (("CMYK", "a.jpg"), ("L", "b.jpg"), ("RGBA", "c.png"), ("P", "d.png")):
        write(folder / name, mode=mode)
    write(folder / "pixel.png", (1, 1))
    write(folder / "named.jpg", format="PNG")
    (folder / "trailing.jpg").write_bytes(write(folder / "whole.jpg").read_bytes() + b"\0" * 9)
    deep = np.arange(200, dtype=np.uint16).reshape(10, 20) * 300
    Image.fromarray(deep).save(folder / "deep.png")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    write(folder / "rotated.jpg", exif=exif)
    dataset = scan_images(tmp_path)
    assert dataset.skipped == {}
    names = map(os.path.basename, dataset.paths)
    sizes = dict(zip(names, dataset.sizes.tolist(), strict=True))
    assert len(sizes) == 11
    assert (sizes["huge.png"], sizes["pixel.png"]) == ([10_000, 10_000], [1, 1])
    assert sizes["rotated.jpg"] == [10, 20], "no EXIF rotation, as in the paper's loader"


def test_images_above_pillows_pixel_limit_are_skipped(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    huge = write(folder / "c" / "huge.png", (100, 100))
    dataset = scan_images(folder, max_bad_share=0.5)
    assert list(dataset.skipped) == [str(huge)]
    assert "too many pixels" in dataset.skipped[str(huge)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "there is no file or folder"),
        ("empty", r"no images in .*\.jpg, \.jpeg, \.png"),
        ("text", "/text: none of the 1 images"),
        ("loose", "3 images, and 1 more in folders.*Move"),
    ],
)
def test_folder_without_readable_images_is_error_for_any_share(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text" / "k").mkdir(parents=True)
    (tmp_path / "text" / "k" / "1.jpg").write_text("no image")
    for name in ("1.jpg", "2.jpg", "3.jpg", "rejected/1.jpg"):
        write(tmp_path / "loose" / name)
    with pytest.raises(DataError, match=message):
        scan_images(tmp_path / path, max_bad_share=1.0)


def test_result_is_independent_of_threads(folder, monkeypatch):
    monkeypatch.setattr(scanning, "_CHUNK", 2)
    one, many = scan_images(folder, workers=1), scan_images(folder, workers=4)
    assert list(one.paths) == list(many.paths)
    assert one.sizes.tolist() == many.sizes.tolist()
    assert list(pickle.loads(pickle.dumps(one)).paths) == list(one.paths)


def test_memory_error_is_not_a_broken_file(folder, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(MemoryError):
        scan_images(folder, max_bad_share=1.0)


def test_tars_and_lists_give_the_same_images_as_folders(folder, tmp_path_factory, make_tar):
    target = tmp_path_factory.mktemp("tars")
    expected = scan_images(folder)
    names = [os.path.relpath(path, folder) for path in expected.paths]
    members = {name: expected.read_bytes(i) for i, name in enumerate(names)}
    for kind in expected.classes:
        own = {n[len(kind) + 1 :]: data for n, data in members.items() if n.startswith(f"{kind}/")}
        make_tar(target / "classes" / f"{kind}.tar", own)
    make_tar(target / "all.tar", {f"train/{name}": data for name, data in members.items()})
    (target / "list.txt").write_text(
        "".join(f"{os.path.relpath(folder / name, target)} {name[0]}\n" for name in names)
    )
    assert scan_images(target / "classes").paths[1] == f"{target}/classes/a.tar/deep/er/1.webp"
    for path, kind in (
        ("classes", "class tars: 3 tar(s)"),
        ("all.tar", "class tars: 1 tar(s)"),
        ("list.txt", "a list"),
    ):
        dataset = pickle.loads(pickle.dumps(scan_images(target / path)))
        assert [dataset.read_bytes(i) for i in range(5)] == list(members.values())
        assert np.array_equal(dataset.read_rgb(4), expected.read_rgb(4))
        assert dataset.labels.tolist() == expected.labels.tolist()
        assert dataset.sizes.tolist() == expected.sizes.tolist()
        assert (dataset.classes, dataset.skipped, dataset.kind) == (["a", "b", "c"], {}, kind)


def test_shards_have_the_labels_of_their_members_or_none(tmp_path, make_tar, picture):
    for n in range(2):
        members = {f"{i}.jpg": picture(10 * n + i) for i in range(3)}
        labels = {f"{i}.cls": str(9 + i).encode() for i in range(3)}
        make_tar(tmp_path / "labelled" / f"s-{n}.tar", members | labels)
        make_tar(tmp_path / "plain" / f"s-{n}.tar", members)
    dataset = scan_images(tmp_path / "labelled" / "s-{0..1}.tar")
    assert (dataset.classes, dataset.labels.tolist()) == (["9", "10", "11"], [0, 1, 2] * 2)
    assert dataset.kind == "2 labelled tar shard(s)"
    dataset = scan_images(tmp_path / "plain")
    assert (dataset.classes, dataset.labels.tolist()) == (["plain"], [0] * 6)
    assert dataset.kind == "2 tar shards"


def test_broken_images_in_tars_are_skipped(tmp_path, make_tar, picture):
    make_tar(tmp_path / "0.tar", {f"{i}.jpg": picture(i, (64, 48)) for i in range(3)})
    make_tar(tmp_path / "1.tar", {"a.jpg": picture(), "b.jpg": b"no image", "c.jpg": b""})
    make_tar(tmp_path / "2.tar", {})
    cut = tmp_path / "0.tar"
    end = scan_images(tmp_path, max_bad_share=0.5).manifest.parts[2].sum()
    cut.write_bytes(cut.read_bytes()[: end - 9])
    dataset = scan_images(tmp_path, max_bad_share=0.5)
    assert [os.path.relpath(path, tmp_path) for path in dataset.paths] == [
        "0.tar/0.jpg", "0.tar/1.jpg", "1.tar/a.jpg",
    ]  # fmt: skip
    assert dataset.read_bytes(2) == picture(), "the byte ranges are those of the good images"
    assert dataset.broken == 3
    skipped = {os.path.relpath(path, tmp_path): why for path, why in dataset.skipped.items()}
    assert skipped == {
        "0.tar": "is truncated or damaged: only the 2 images before that are used",
        "0.tar/2.jpg": "is cut off: the tar ends within it",
        "1.tar/b.jpg": "is not an image",
        "1.tar/c.jpg": "is empty (0 bytes)",
        "2.tar": "contains no images",
    }
    with pytest.raises(DataError, match="3 of 6 images .*max_bad_share 0.4"):
        scan_images(tmp_path, max_bad_share=0.4)


def test_exif_option_rotates_images_and_sizes(tmp_path, picture, make_tar):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_tar(tmp_path / "t.tar", {"a.jpg": picture(), "b.jpg": picture(exif=exif)})
    plain, rotated = (
        scan_images(tmp_path, conversion=Conversion(exif=flag)) for flag in (False, True)
    )
    assert plain.sizes.tolist() == [[10, 20], [10, 20]]
    assert rotated.sizes.tolist() == [[10, 20], [20, 10]]
    for dataset in (plain, rotated):
        images = [dataset.read_rgb(i) for i in range(2)]
        assert [[image.height, image.width] for image in images] == dataset.sizes.tolist()
    assert plain.fingerprint == rotated.fingerprint, "the same images with another option"


def test_fingerprint_depends_on_names_and_sizes_only(folder, tmp_path_factory):
    first = scan_images(folder).fingerprint
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(folder, copy)
    assert scan_images(copy).fingerprint == first, "in another folder"
    write(copy / "b" / "2.jpg", (21, 10))
    other_size = scan_images(copy).fingerprint
    (copy / "b" / "2.jpg").rename(copy / "b" / "3.jpg")
    other_name = scan_images(copy).fingerprint
    assert len({first, other_size, other_name}) == 3


def test_missing_file_of_a_list_is_skipped(folder):
    (folder / "l.txt").write_text("b/2.jpg\nb/none.jpg\n")
    dataset = scan_images(folder / "l.txt", max_bad_share=0.5)
    assert dataset.files == dataset.paths == [str(folder / "b" / "2.jpg")]
    assert list(dataset.skipped) == [str(folder / "b" / "none.jpg")]
    assert "No such file" in dataset.skipped[str(folder / "b" / "none.jpg")]


@pytest.mark.parametrize(("lost", "present"), [(["b"], True), (["a", "b", "c"], False)])
def test_a_machine_needs_some_files_of_the_dataset(folder, lost, present):
    """A single missing image is skipped when it is read."""
    dataset = scan_images(folder)
    for name in lost:
        shutil.rmtree(folder / name)
    with nullcontext() if present else pytest.raises(DataError, match="has no .*/a/"):
        dataset.check_present()

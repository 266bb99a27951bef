"""Tests of fastdino.data.manifest."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from fastdino.data import manifest as manifests
from fastdino.data.manifest import Manifest, Names, concatenate, load, save


@pytest.fixture
def manifest():
    return Manifest(
        files=["a.tar", "b\udcff.tar", "c.tar"],
        file_ids=np.array([0, 0, 2], np.int32),
        members=["1.jpg", "", "ä.png"],
        parts=np.arange(9).reshape(3, 3) + 2**40,
        labels=["", "7", "dog"],
        reasons={2: "is not an image"},
        notes={1: "contains no images"},
        stamps=np.arange(6).reshape(3, 2),
        headers=np.arange(9, dtype=np.int32).reshape(3, 3),
    )


def assert_same(one, other):
    for name, column in vars(one).items():
        if isinstance(column, dict):
            assert column == getattr(other, name), name
        else:
            assert np.array_equal(column, getattr(other, name)), name
            assert getattr(column, "dtype", None) == getattr(getattr(other, name), "dtype", None)


def test_saved_manifest_is_loaded_unchanged(manifest, tmp_path):
    save(manifest, tmp_path / "t.npz")
    assert_same(load(tmp_path / "t.npz"), manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_concatenated_manifests_renumber_files_and_images(manifest):
    both = concatenate([manifest, manifest])
    both.check(6)
    assert both.file_ids.tolist() == [0, 0, 2, 3, 3, 5]
    assert both.notes == {1: "contains no images", 4: "contains no images"}
    assert both.reasons == {2: "is not an image", 5: "is not an image"}
    assert both.members == manifest.members * 2
    assert_same(concatenate([manifest]), manifest)
    concatenate([]).check(0)


def test_concatenation_counts_images_and_files_separately(manifest):
    many = manifest.select_images(np.array([2, 0, 1, 2, 0]))  # 5 images in 3 files
    both = concatenate([replace(many, members=list(many.members), labels=list(many.labels),
                                files=list(many.files)), manifest])  # fmt: skip
    assert both.reasons == dict.fromkeys((0, 3, 7), "is not an image")
    assert both.notes == dict.fromkeys((1, 4), "contains no images")
    assert both.file_ids.tolist() == [2, 0, 0, 2, 0, 3, 3, 5]


def test_selected_files_keep_their_images(manifest):
    selected = manifest.select_files(np.array([2, 1, 0]))
    selected.check(3)
    assert selected.files == ["c.tar", "b\udcff.tar", "a.tar"]
    assert selected.file_ids.tolist() == [0, 2, 2]
    assert list(selected.members) == ["ä.png", "1.jpg", ""]
    assert list(selected.labels) == ["dog", "", "7"]
    assert (selected.reasons, selected.notes) == ({0: "is not an image"}, manifest.notes)
    assert selected.stamps.tolist() == manifest.stamps[::-1].tolist()
    assert selected.parts.tolist() == manifest.parts[[2, 0, 1]].tolist()
    assert_same(manifest.select_files(np.arange(3)), manifest)


def test_selected_images_may_be_repeated(manifest):
    selected = manifest.select_images(np.array([2, 0, 2]))
    assert list(selected.members) == ["ä.png", "1.jpg", "ä.png"]
    assert selected.file_ids.tolist() == [2, 0, 2]
    assert selected.reasons == {0: "is not an image", 2: "is not an image"}
    assert selected.headers.tolist() == manifest.headers[[2, 0, 2]].tolist()


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty", "another Pillow"])
def test_damaged_or_outdated_file_is_value_error(manifest, tmp_path, monkeypatch, damage):
    path = tmp_path / "t.npz"
    save(manifest, path)
    if damage == "another Pillow":
        monkeypatch.setattr(manifests.PIL, "__version__", "0.1")
    else:
        data = bytearray(path.read_bytes())
        data[data.index(b"parts.npy") + 40] ^= 0xFF
        path.write_bytes({"cut": data[:-100], "flip": data, "text": b"text", "empty": b""}[damage])
    with pytest.raises(ValueError, match="Pillow" if damage == "another Pillow" else "."):
        load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", ["", ""]),
        ("file_ids", np.array([0, 2], np.int32)),
        ("stamps", np.zeros((2, 2), np.int64)),
        ("files", ["a.tar", "b.tar"]),
        ("reasons", {3: "is beyond the end"}),
    ],
)
def test_columns_of_different_lengths_are_value_error(manifest, tmp_path, name, value):
    setattr(manifest, name, value)
    save(manifest, tmp_path / "t.npz")
    with pytest.raises(ValueError, match="columns|images|image"):
        load(tmp_path / "t.npz")


def test_names_behave_like_a_list():
    strings = ["", "a", "ä/\udcff.jpg", "b" * 1000]
    names = pickle.loads(pickle.dumps(Names(strings)))
    assert list(names) == strings
    assert (len(names), names[-1], names[1]) == (4, strings[3], "a")
    assert "a" in names
    assert list(Names([])) == []
    for index in (4, -5):
        with pytest.raises(IndexError):
            names[index]

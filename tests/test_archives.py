"""Tests of fastdino.data.datasets.archives."""

from __future__ import annotations

import pytest

from fastdino.data.datasets.archives import (
    ArchiveIndex,
    Collector,
    are_numbered,
    class_names,
    is_hidden,
)
from fastdino.data.image_files import Part


def test_an_index_of_some_images_has_their_labels_and_reasons():
    parts = [Part(i, 10 + i) for i in range(4)]
    found = ArchiveIndex(list("abcd"), parts, list("0123"), {1: "bad", 3: "worse"}, "cut")
    taken = found.taken([0, 3])
    assert taken == ArchiveIndex(["a", "d"], [parts[0], parts[3]], ["0", "3"], {1: "worse"}, "cut")


def test_labels_come_from_what_lies_beside_and_masks_are_no_images():
    members = Collector((".jpg", ".png"))
    for name in ("k/1.jpg", "k/1.mask.png", "k/2.jpg", "v1.0.png"):
        assert members.is_image(name.upper())
        members.add(name, Part(0, 1), "bad" if name == "k/2.jpg" else "")
    members.add_other("k/1.cls", 1, lambda: b" 7\n")
    members.add_other("k/2.json", 20, lambda: b'{"label": "dog"}')
    members.add_other("v1.cls", 1 << 30, lambda: pytest.fail("too large to be a label"))
    found = members.finish()
    assert (found.members, found.labels) == (["k/1.jpg", "k/2.jpg", "v1.0.png"], ["7", "dog", ""])
    assert found.reasons == {1: "bad"}


def test_a_macs_notes_are_hidden():
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
def test_shards_are_told_from_class_tars_by_their_numbers(names, numbered):
    assert are_numbered(names) is numbered


def test_classes_are_archives_or_the_folders_of_an_only_one():
    assert class_names(["x/b.tar", "a.tar"], [2, 1], ["1", "z/2", "3"]) == ["b", "b", "a"]
    assert class_names(["x/b.zip", "a.zip"], [1, 1], ["1", "2"]) == ["b", "a"]
    assert class_names(["t.tar"], [2], ["cat/1", "dog/deep/2"]) == ["cat", "dog"]
    assert class_names(["t.tar"], [2], ["train/cat/1", "train/dog/2"]) == ["cat", "dog"]
    assert class_names(["t.tar"], [2], ["cat/1", "cat/2"]) == ["cat", "cat"]
    assert class_names(["t.tar"], [2], ["1", "2"]) == ["t", "t"]

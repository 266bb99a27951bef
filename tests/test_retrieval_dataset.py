from __future__ import annotations

import codecs
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from fastdino.errors import DataError
from fastdino.evals.descriptors import Picture
from fastdino.evals.retrieval_dataset import read_set, sizes_of


def truth():
    """Three images, two queries, arrays and lists mixed, as the sets' own files have them."""
    return {
        "imlist": ["a", "b", "c"],
        "qimlist": ["q", "c"],
        "gnd": [
            {"easy": np.array([0]), "hard": [1], "junk": [], "bbx": [1.4, 2.0, 9.6, 12.0]},
            {"easy": [], "hard": np.array([0, 2]), "junk": np.int64(1), "bbx": np.arange(4.0)},
        ],
    }


class Code:
    def __init__(self, function, *args):
        self.made_by = function, args

    def __reduce__(self):
        return self.made_by


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "roxford5k" / "jpg").mkdir(parents=True)
    for name in "abcq":
        Image.new("RGB", (20, 14)).save(tmp_path / "roxford5k" / "jpg" / f"{name}.jpg")
    return tmp_path


@pytest.fixture
def read(folder):
    def call(value, *, crop_queries=False, protocol=4):
        path = folder / "roxford5k" / "gnd_roxford5k.pkl"
        path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
        return read_set(folder, "roxford5k", crop_queries=crop_queries)

    return call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_set_is_read_from_pickles_of_every_protocol(read, folder, protocol):
    found = read(truth(), protocol=protocol)
    jpg = folder / "roxford5k" / "jpg"
    assert [picture.path for picture in found.database] == [jpg / f"{n}.jpg" for n in "abc"]
    assert found.queries == [Picture(jpg / "q.jpg"), Picture(jpg / "c.jpg")]
    first, second = found.relevance
    assert [p.tolist() for p in (first.easy, first.hard, first.junk)] == [[0], [1], []]
    assert [p.tolist() for p in (second.easy, second.hard, second.junk)] == [[], [0, 2], [1]]
    assert {p.dtype for p in (first.easy, first.junk, second.junk)} == {np.dtype(np.int64)}


def test_arrays_under_numpys_older_names_are_read(read):
    data = pickle.dumps(truth(), 2)
    assert b"numpy._core." in data
    assert len(read(data.replace(b"numpy._core.", b"numpy.core.")).queries) == 2


def test_boxes_are_taken_where_they_are_wanted(read):
    found = read(truth(), crop_queries=True)
    assert [picture.box for picture in found.queries] == [(1, 2, 10, 12), (0, 1, 2, 3)]
    assert sizes_of([*found.queries, *found.database[:1]], 2) == [(9, 10), (2, 2), (20, 14)]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("code", "name"),
    [
        (Code(os.mkdir, "made"), "posix.mkdir"),
        (Code(eval, "1"), "eval"),
        (Code(np.load, "x"), "numpy.load"),
        (Code(codecs.encode, "x", "rot13"), "_codecs.encode to rot13"),
    ],
)
def test_a_pickle_with_code_is_refused_and_the_code_not_run(
    read, tmp_path, monkeypatch, code, name, protocol
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="which is not run") as error:
        read(truth() | {"extra": code}, protocol=protocol)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


def changed(**entries):
    return truth() | entries


def first_mark(**entries):
    marks = truth()["gnd"]
    marks[0] |= entries
    return changed(gnd=marks)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (b"no pickle", "is no pickle that can be read"),
        (pickle.dumps(truth())[:-40], "is no pickle that can be read"),
        ([1, 2], "holds a list, expected a dict"),
        (changed(imlist=[]), "imlist must be a list of images' names"),
        (changed(qimlist=["q", 3]), "qimlist must hold names alone"),
        (changed(gnd=truth()["gnd"][:1]), "gnd must be a list of 2"),
        (changed(gnd=[{}, {}]), "gnd[0] must be a dict with easy, hard, junk"),
        (first_mark(easy=[3]), "gnd[0]['easy'] must hold places in imlist, from 0 to 2"),
        (first_mark(easy=[-1]), "gnd[0]['easy'] must hold places"),
        (first_mark(easy=[0.5]), "gnd[0]['easy'] must hold places"),
        (first_mark(easy=[[0], [1, 2]]), "gnd[0]['easy'] must be a list of places"),
        (first_mark(junk=[1]), "gnd[0]: an image stands twice"),
        (first_mark(bbx=[0, 0, 5]), "gnd[0] must have bbx, four numbers"),
        (first_mark(bbx=[5, 0, 5, 9]), "gnd[0] must have bbx"),
        (first_mark(bbx=[0, 0, float("nan"), 9]), "gnd[0] must have bbx"),
        (changed(imlist=["a", "b", "nobody"]), "1 images of"),
        (changed(qimlist=["q", "nobody"]), "jpg/nobody.jpg"),
    ],
)
def test_ground_truth_that_cannot_be_is_named(read, value, part):
    with pytest.raises(DataError) as error:
        read(value, crop_queries=True)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_ground_truth_is_named(folder):
    with pytest.raises(DataError, match=r"there is no ground truth .*gnd_rparis6k.pkl"):
        read_set(folder, "rparis6k", crop_queries=False)

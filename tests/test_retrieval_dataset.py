from __future__ import annotations

import codecs
import os
import pickle
import resource

import numpy as np
import pytest
from PIL import Image

from fastdino.data.image_files import Header
from fastdino.errors import DataError
from fastdino.evals.retrieval_dataset import read_dataset


def truth():
    """Return a ground truth of three images and two queries, with arrays and lists as in use."""
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
        self.call = function, args

    def __reduce__(self):
        return self.call


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
        return read_dataset(folder, "roxford5k", crop_queries=crop_queries)

    return call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_of_every_protocol_are_read(read, folder, protocol):
    dataset = read(truth(), protocol=protocol)
    jpg = folder / "roxford5k" / "jpg"
    assert dataset.database.paths == [jpg / f"{n}.jpg" for n in "abc"]
    assert dataset.queries.paths == [jpg / "q.jpg", jpg / "c.jpg"]
    assert dataset.queries.boxes == [None, None]
    first, second = dataset.relevance
    assert [p.tolist() for p in (first.easy, first.hard, first.junk)] == [[0], [1], []]
    assert [p.tolist() for p in (second.easy, second.hard, second.junk)] == [[], [0, 2], [1]]
    assert {p.dtype for p in (first.easy, first.junk, second.junk)} == {np.dtype(np.int64)}


def test_arrays_under_numpys_older_names_are_read(read):
    data = pickle.dumps(truth(), 2)
    assert b"numpy._core." in data
    assert len(read(data.replace(b"numpy._core.", b"numpy.core.")).queries) == 2


def test_boxes_of_the_queries_are_read_if_requested(read):
    dataset = read(truth(), crop_queries=True)
    assert dataset.queries.boxes == [(1, 2, 10, 12), (0, 1, 2, 3)]
    assert dataset.queries.sizes([Header(30, 40)] * 2) == [(10, 9), (2, 2)]
    assert dataset.database.sizes([Header(14, 20)] * 3) == [(14, 20)] * 3


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
def test_code_in_a_pickle_is_refused_and_not_run(read, tmp_path, monkeypatch, code, name, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="which is not run") as error:
        read(truth() | {"extra": code}, protocol=protocol)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


INDICES = "gnd[0]['easy'] must be a list of indices into imlist, from 0 to 2"


def changed(**entries):
    return truth() | entries


def first_entry(**entries):
    gnd = truth()["gnd"]
    gnd[0] |= entries
    return changed(gnd=gnd)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (b"no pickle", "is no readable pickle"),
        (pickle.dumps(truth())[:-40], "is no readable pickle"),
        ([1, 2], "holds a list, expected a dict"),
        (changed(imlist=[]), "imlist must be a list of image names"),
        (changed(qimlist=["q", 3]), "qimlist must be a list of image names"),
        (changed(gnd=truth()["gnd"][:1]), "gnd must be a list of 2"),
        (changed(gnd=[{}, {}]), "gnd[0] must be a dict with easy, hard, junk"),
        (first_entry(easy=[3]), INDICES),
        (first_entry(easy=[-1]), INDICES),
        (first_entry(easy=[0.5]), INDICES),
        (first_entry(easy=[[0], [1, 2]]), INDICES),
        (first_entry(junk=[1]), "gnd[0]: an image occurs twice"),
        (first_entry(bbx=[0, 0, 5]), "gnd[0] must have bbx, four numbers"),
        (first_entry(bbx=[5, 0, 5, 9]), "gnd[0] must have bbx"),
        (first_entry(bbx=[0, 0, float("nan"), 9]), "gnd[0] must have bbx"),
        (changed(imlist=["a", "b", "none"]), "1 images of"),
        (changed(qimlist=["q", "none"]), "jpg/none.jpg"),
    ],
)
def test_invalid_ground_truth_is_an_error(read, value, part):
    with pytest.raises(DataError) as error:
        read(value, crop_queries=True)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_ground_truth_is_an_error(folder):
    with pytest.raises(DataError, match=r"there is no ground truth .*gnd_rparis6k.pkl"):
        read_dataset(folder, "rparis6k", crop_queries=False)


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02Nr\xff\xff\xff\x07.", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f", b"(" * 10**5],
    ids=["memo", "bytes", "marks"],
)
def test_a_pickle_does_not_take_the_memory_that_it_claims(read, content):
    """9 bytes make pickle's implementation in C allocate and clear 2 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"gnd_roxford5k.pkl (is no readable|holds a)"):
        read(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000

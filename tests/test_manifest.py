"""fastdino.data.manifest: the scan's columns and their copy on disk."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fastdino.data import manifest as tables
from fastdino.data.manifest import Names, Table, concatenate, load, save


@pytest.fixture
def table():
    return Table(
        files=["a.tar", "b\udcff.tar", "c.tar"],
        stamps=np.arange(6).reshape(3, 2),
        counts=np.array([2, 0, 1]),
        members=["1.jpg", "", "ä.png"],
        parts=np.arange(9).reshape(3, 3) + 2**40,
        headers=np.arange(9, dtype=np.int32).reshape(3, 3),
        labels=["", "7", "dog"],
        notes={1: "holds no images"},
        reasons={2: "is not an image"},
    )


def assert_same(table, other):
    for name, column in vars(table).items():
        if isinstance(column, np.ndarray):
            assert column.dtype == getattr(other, name).dtype
            assert np.array_equal(column, getattr(other, name)), name
        else:
            assert column == getattr(other, name), name


def test_a_table_survives_its_file(table, tmp_path):
    save(table, tmp_path / "t.npz")
    assert_same(load(tmp_path / "t.npz"), table)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_tables_one_after_the_other(table):
    both = concatenate([table, table])
    both.check()
    assert both.notes == {1: "holds no images", 4: "holds no images"}
    assert both.reasons == {2: "is not an image", 5: "is not an image"}
    assert both.members == table.members * 2
    assert_same(concatenate([table]), table)
    concatenate([]).check()


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty"])
def test_a_damaged_file_is_a_value_error(table, tmp_path, damage):
    path = tmp_path / "t.npz"
    save(table, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"parts.npy") + 40] ^= 0xFF
    path.write_bytes({"cut": data[:-100], "flip": data, "text": b"text", "empty": b""}[damage])
    with pytest.raises(ValueError, match="."):
        load(path)


def test_another_pillow_or_format_is_a_value_error(table, tmp_path, monkeypatch):
    save(table, tmp_path / "t.npz")
    monkeypatch.setattr(tables.PIL, "__version__", "0.1")
    with pytest.raises(ValueError, match="Pillow"):
        load(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", ["", ""]),
        ("counts", np.array([1, 0, 1])),
        ("stamps", np.zeros((2, 2), np.int64)),
        ("reasons", {3: "is beyond the end"}),
    ],
)
def test_columns_that_do_not_belong_together_are_a_value_error(table, tmp_path, name, value):
    setattr(table, name, value)
    save(table, tmp_path / "t.npz")
    with pytest.raises(ValueError, match="columns|images|image"):
        load(tmp_path / "t.npz")


def test_names_are_a_sequence_in_two_arrays():
    strings = ["", "a", "ä/\udcff.jpg", "b" * 1000]
    names = pickle.loads(pickle.dumps(Names(strings)))
    assert list(names) == strings
    assert (len(names), names[-1], names[1:3]) == (4, strings[3], strings[1:3])
    assert "a" in names
    assert list(Names([])) == []
    for index in (4, -5):
        with pytest.raises(IndexError):
            names[index]

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdino import checkpoint
from fastdino.errors import CheckpointError, DataError
from fastdino.evals.retrieval_dataset import read_dataset

SCALAR = np.float64(0).__reduce__()[0]
RECONSTRUCT = np.zeros(0).__reduce__()[0]
FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]
ADDRESS = (0x123456789000).to_bytes(8, "little")


class Crafted:
    """Pickled as a call with arguments, and a state if one is given."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def dtype(code: str, *, order: str = "<", subarray=None, names=None, fields=None, extra=()) -> Any:
    state = (3, order, subarray, names, fields, 8, 1, 0, *extra)
    return Crafted(np.dtype, code, False, True, state=state)


def array(kind: Any, shape: Any = (1,), data: Any = ADDRESS) -> Any:
    return Crafted(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, shape, kind, False, data))


REFUSED_DTYPES = {
    "object": dtype("O8", order="|"),
    "fields": dtype("V8", names=("a",), fields={"a": (np.dtype("f8"), 0)}),
    "fields of a number": dtype("f8", names=("a",), fields={"a": (np.dtype("f8"), 0)}),
    "subarray": dtype("f8", subarray=(np.dtype("f8"), (1 << 40,))),
    "metadata": dtype("f8", extra=({"x": 1},)),
    "date": dtype("M8"),
    "fields in the code": dtype("i4,i4"),
    "text longer than any name": dtype("U100000000"),
    "no code": Crafted(np.dtype, 8),
    "unknown byte order": dtype("f8", order="P"),
    "short state": Crafted(np.dtype, "f8", False, True, state=(3, "<")),
    "no tuple as state": Crafted(np.dtype, "f8", False, True, state=7),
}
REFUSED_ARRAYS = {
    "shape beyond the data": array(np.dtype("f8"), (1 << 40,)),
    "negative shape": array(np.dtype("f8"), (-1, -1)),
    "shape of text": array(np.dtype("f8"), ("1",)),
    "a list as data": array(np.dtype("f8"), data=[1.0]),
    "no dtype": array(3),
    "ndarray called": Crafted(np.ndarray, (1 << 40,)),
    "buffer beyond the data": Crafted(FROMBUFFER, ADDRESS, np.dtype("f8"), (2,), "C"),
}
REFUSED_SCALARS = {
    "no bytes": Crafted(SCALAR, np.dtype("f8")),
    "short": Crafted(SCALAR, np.dtype("f8"), b"123"),
    "long": Crafted(SCALAR, np.dtype("f8"), ADDRESS + b"1"),
    "a dtype's name": Crafted(SCALAR, "f8", ADDRESS),
}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "roxford5k").mkdir()

    def call(value: Any, protocol: int = 2) -> None:
        path = tmp_path / "roxford5k/gnd_roxford5k.pkl"
        path.write_bytes(pickle.dumps({"imlist": value}, protocol))
        read_dataset(tmp_path, "roxford5k", crop_queries=False)

    return call


@pytest.mark.parametrize("name", [*REFUSED_DTYPES, *REFUSED_ARRAYS, *REFUSED_SCALARS])
def test_a_ground_truth_that_forges_arrays_is_refused(read, name):
    arrays = {key: array(value) for key, value in REFUSED_DTYPES.items()}
    value = (arrays | REFUSED_ARRAYS | REFUSED_SCALARS)[name]
    with pytest.raises(DataError, match="is no readable pickle") as error:
        read(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*REFUSED_DTYPES, *REFUSED_SCALARS])
def test_a_checkpoint_that_forges_scalars_is_refused(tmp_path, name):
    scalars = {key: Crafted(SCALAR, value, ADDRESS) for key, value in REFUSED_DTYPES.items()}
    value = (scalars | REFUSED_SCALARS)[name]
    torch.save({"args": {"lr": value}}, tmp_path / "forged.pth")
    with pytest.raises(CheckpointError, match="forged.pth cannot be read") as error:
        checkpoint.load(tmp_path / "forged.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [np.float16(0.5), np.float64(1e-3), np.int8(-3), np.uint64(7), np.bool_(True)],
    ids=lambda value: value.dtype.name,
)
def test_scalars_keep_value_and_type(tmp_path, value):
    torch.save({"x": value}, tmp_path / "x.pth")
    read = checkpoint.load(tmp_path / "x.pth")["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("kind", ["U3", ">U3"])
def test_names_in_an_array_are_read(read, protocol, kind):
    with pytest.raises(DataError, match="qimlist must be a list"):  # imlist was accepted
        read(np.array(["abc", "d"], dtype=kind), protocol)

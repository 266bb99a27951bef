"""Revisited Oxford and Paris on disk, the ground truth read without running code from its file.

<dataset>/gnd_<dataset>.pkl    names of the images and the queries, which show the same, boxes
<dataset>/jpg/<name>.jpg
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdino.errors import DataError
from fastdino.evals.descriptors import Picture
from fastdino.evals.ranking_metrics import Places, Relevance

DATASETS = ("roxford5k", "rparis6k")
LABELS = ("easy", "hard", "junk")


@dataclass(frozen=True)
class RetrievalSet:
    """The queries [Q], which images of the database [N] are relevant to each, and the database."""

    queries: list[Picture]
    relevance: list[Relevance]
    database: list[Picture]


def read_set(root: Path, dataset: str, *, crop_queries: bool) -> RetrievalSet:
    """The set of a ground truth file, every image's file known to be there.

    Args:
        crop_queries: cuts the queries' boxes out.

    Raises: DataError: no such file, one that holds code or something else, or images are missing.
    """
    path = root / dataset / f"gnd_{dataset}.pkl"
    truth = _read_plain(path)
    names, queries = _names(truth, "imlist", path), _names(truth, "qimlist", path)
    marks = truth.get("gnd")
    if not isinstance(marks, (list, tuple)) or len(marks) != len(queries):
        raise DataError(f"{path}: gnd must be a list of {len(queries)}, one of each of qimlist")
    relevance = [_relevance(mark, len(names), f"{path}: gnd[{i}]") for i, mark in enumerate(marks)]
    boxes = [
        _box(mark, f"{path}: gnd[{i}]") if crop_queries else None for i, mark in enumerate(marks)
    ]
    folder = root / dataset / "jpg"
    database = [Picture(folder / f"{name}.jpg") for name in names]
    asked = [Picture(folder / f"{name}.jpg", box) for name, box in zip(queries, boxes, strict=True)]
    missing = [picture.path for picture in (*asked, *database) if not picture.path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images of {path} are missing, among them {missing[0]}")
    return RetrievalSet(asked, relevance, database)


def sizes_of(pictures: Sequence[Picture], workers: int) -> list[tuple[int, ...]]:
    """The size in pixels of each picture's box or whole, by its header; () where it has none."""

    def size(picture: Picture) -> tuple[int, ...]:
        if picture.box is not None:
            left, top, right, bottom = picture.box
            return right - left, bottom - top
        try:
            with Image.open(picture.path) as image:
                return image.size
        except Exception:  # It is named where it is decoded.
            return ()

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(size, pictures))


class _CodeInPickleError(Exception):
    """The name of what a pickle would have run."""


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles write bytes; any other codec is refused."""
    if encoding not in ("latin1", "latin-1"):
        raise _CodeInPickleError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


# What NumPy's arrays and scalars are made by, under the names that its versions give them.
_MAKERS = {
    "multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "multiarray.scalar": np.float64(0).__reduce__()[0],
    "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
}
_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _encode,
    **{
        f"numpy.{core}.{name}": made for core in ("core", "_core") for name, made in _MAKERS.items()
    },
}


class _PlainUnpickler(pickle.Unpickler):
    """Makes NumPy arrays and scalars, numbers, text and containers of them; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ADMITTED:
            raise _CodeInPickleError(f"{module}.{name}")
        return _ADMITTED[f"{module}.{name}"]


def _read_plain(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            # Pickles of Python 2, with arrays in them, are read as latin1.
            value = _PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"there is no ground truth {path}") from None
    except _CodeInPickleError as error:
        raise DataError(
            f"{path} holds more than arrays, numbers and text: code ({error}), which is not run; "
            "take the file from the set's authors"
        ) from None
    except Exception as error:  # A broken pickle makes pickle raise all kinds.
        raise DataError(f"{path} is no pickle that can be read: {error!r}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a dict")
    return value


def _names(truth: dict[str, Any], key: str, path: Path) -> list[str]:
    names = truth.get(key)
    names = names.tolist() if isinstance(names, np.ndarray) else names
    if not isinstance(names, (list, tuple)) or not names:
        raise DataError(f"{path}: {key} must be a list of images' names")
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: {key} must hold names alone")
    return list(names)


def _relevance(mark: Any, images: int, where: str) -> Relevance:
    if not isinstance(mark, dict) or not set(LABELS) <= set(mark):
        raise DataError(f"{where} must be a dict with {', '.join(LABELS)}")
    places = {label: _places(mark[label], images, f"{where}[{label!r}]") for label in LABELS}
    if len(np.unique(np.concatenate(list(places.values())))) < sum(map(len, places.values())):
        raise DataError(f"{where}: an image stands twice in {', '.join(LABELS)}")
    return Relevance(**places)


def _places(values: Any, images: int, where: str) -> Places:
    try:
        places = np.asarray(values).reshape(-1)
    except ValueError as error:
        raise DataError(f"{where} must be a list of places in imlist: {error}") from error
    if not places.size:
        return np.zeros(0, np.int64)
    if places.dtype.kind not in "iu" or places.min() < 0 or places.max() >= images:
        raise DataError(f"{where} must hold places in imlist, from 0 to {images - 1}")
    return places.astype(np.int64)


def _box(mark: dict[str, Any], where: str) -> tuple[int, int, int, int]:
    """A query's box in whole pixels; raises DataError where it has none."""
    try:
        edges = np.asarray(mark["bbx"]).reshape(-1)
        left, top, right, bottom = (round(float(edge)) for edge in edges)
        if right <= left or bottom <= top:
            raise ValueError("it is empty")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where} must have bbx, four numbers: left, top, right, bottom ({error!r})"
        ) from error
    return left, top, right, bottom

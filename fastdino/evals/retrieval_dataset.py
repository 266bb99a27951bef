"""Revisited Oxford and Paris on disk. The ground truth is a pickle, read without running its code.

<dataset>/gnd_<dataset>.pkl    image names; for each query its name, relevant images and box
<dataset>/jpg/<name>.jpg
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdino import numpy_pickles
from fastdino.data.image_files import AS_STORED, Box, Conversion, read_file
from fastdino.errors import DataError
from fastdino.evals.features import ImageFiles
from fastdino.evals.ranking_metrics import Indices, Relevance
from fastdino.file_names import as_path

DATASETS = ("roxford5k", "rparis6k")
LABELS = ("easy", "hard", "junk")


@dataclass(frozen=True)
class RetrievalDataset:
    """Query images [Q] with their relevant images, and the database images [N]."""

    queries: ImageFiles
    relevance: list[Relevance]
    database: ImageFiles


def read_dataset(
    root: Path, dataset: str, *, crop_queries: bool, conversion: Conversion = AS_STORED
) -> RetrievalDataset:
    """Read the ground truth of a dataset and check that all image files exist.

    Args:
        crop_queries: cut out the queries' boxes.
        conversion: how images become RGB.

    Raises: DataError: no ground truth, one with code or invalid content, or missing images.
    """
    path = root / dataset / f"gnd_{dataset}.pkl"
    truth = _read_ground_truth(path)
    names, query_names = _names(truth, "imlist", path), _names(truth, "qimlist", path)
    entries = truth.get("gnd")
    if not isinstance(entries, (list, tuple)) or len(entries) != len(query_names):
        raise DataError(
            f"{path}: gnd must be a list of {len(query_names)} entries, one per name in qimlist"
        )
    relevance, boxes = [], []
    for i, entry in enumerate(entries):
        where = f"{path}: gnd[{i}]"
        relevance.append(_relevance(entry, len(names), where))
        boxes.append(_box(entry, where) if crop_queries else None)
    folder = root / dataset / "jpg"
    database = ImageFiles([folder / f"{name}.jpg" for name in names], (), conversion)
    paths = [folder / f"{name}.jpg" for name in query_names]
    queries = ImageFiles(paths, boxes, conversion)
    missing = [image for image in (*queries.paths, *database.paths) if not image.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images of {path} are missing, for example {missing[0]}")
    return RetrievalDataset(queries, relevance, database)


class _CodeInPickleError(Exception):
    """A pickle refers to a function or class that is not allowed; the message is its name."""


def _encode(text: str, encoding: str) -> bytes:
    """Decode bytes as old pickles store them; refuse other codecs."""
    if encoding not in ("latin1", "latin-1"):
        raise _CodeInPickleError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


_ALLOWED: dict[str, Any] = {
    "numpy.ndarray": object(),  # an argument of the functions below, which ignore it
    "numpy.dtype": numpy_pickles.PlainDtype,
    "_codecs.encode": _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray._reconstruct"] = numpy_pickles.reconstruct
    _ALLOWED[f"{_core}.multiarray.scalar"] = numpy_pickles.scalar
    _ALLOWED[f"{_core}.numeric._frombuffer"] = numpy_pickles.frombuffer


class _SafeUnpickler(pickle._Unpickler):
    """Unpickler limited to NumPy arrays and scalars, numbers, text and containers of them.

    Use pickle's Python implementation: the C one allocates what a file claims.
    """

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise _CodeInPickleError(f"{module}.{name}")
        return _ALLOWED[f"{module}.{name}"]


def _read_ground_truth(path: Path) -> dict[str, Any]:
    try:
        content = io.BytesIO(read_file(str(path)))
        # Python 2 pickles that contain arrays must be read as latin1.
        value = _SafeUnpickler(content, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"there is no ground truth {path}") from None
    except _CodeInPickleError as error:
        raise DataError(
            f"{path} contains code ({error}), which is not run; expected only arrays, numbers and "
            "text: take the file from the authors of the dataset"
        ) from None
    except Exception as error:  # pickle raises many types on broken files.
        raise DataError(f"{path} is no readable pickle: {error!r}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a dict")
    return value


def _names(truth: dict[str, Any], key: str, path: Path) -> list[str]:
    names = truth.get(key)
    names = names.tolist() if isinstance(names, np.ndarray) else names
    valid = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not valid or not names:
        raise DataError(f"{path}: {key} must be a list of image names")
    return [as_path(name) for name in names]


def _relevance(entry: Any, images: int, where: str) -> Relevance:
    """Return the sets of an entry, checked to be disjoint indices into imlist."""
    if not isinstance(entry, dict) or not set(LABELS) <= set(entry):
        raise DataError(f"{where} must be a dict with {', '.join(LABELS)}")
    sets: dict[str, Indices] = {}
    for label in LABELS:
        try:
            indices = np.asarray(entry[label]).reshape(-1)
            integers = indices.dtype.kind in "iu" and indices.min(initial=0) >= 0
            valid = not indices.size or (integers and indices.max() < images)
        except ValueError:  # lists of different lengths
            valid = False
        if not valid:
            raise DataError(
                f"{where}[{label!r}] must be a list of indices into imlist, from 0 to {images - 1}"
            )
        sets[label] = indices.astype(np.int64)
    if len(np.unique(np.concatenate(list(sets.values())))) < sum(map(len, sets.values())):
        raise DataError(f"{where}: an image occurs twice in {', '.join(LABELS)}")
    return Relevance(**sets)


def _box(entry: dict[str, Any], where: str) -> Box:
    """Return a query's box, rounded to whole pixels."""
    try:
        edges = np.asarray(entry["bbx"]).reshape(-1)
        left, top, right, bottom = (round(float(edge)) for edge in edges)
        if right <= left or bottom <= top:
            raise ValueError("it is empty")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where} must have bbx, four numbers: left, top, right, bottom ({error!r})"
        ) from error
    return left, top, right, bottom

"""The kinds of datasets that --data_path accepts: DATASET_KINDS lists them all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from fastdino.data.datasets.archives import find_archive, find_pattern, is_archive, is_pattern
from fastdino.data.datasets.data_path import EXPECTED, DataPath, parse
from fastdino.data.datasets.davis_frames import find_davis, is_davis
from fastdino.data.datasets.file_list import FileList
from fastdino.data.datasets.folders import find_folder, is_folder
from fastdino.data.datasets.hugging_face import find_hugging_face
from fastdino.data.datasets.lists import find_list, is_file
from fastdino.data.datasets.torchvision_sets import find_torchvision
from fastdino.errors import DataError


class DatasetKind(NamedTuple):
    """A kind of dataset. Its finder returns the files of a path for which `matches` is true."""

    name: str
    matches: Callable[[DataPath], bool]
    find: Callable[[DataPath], FileList]
    options: str = ""


def find_dataset(text: str, role: str = "") -> FileList:
    """Return the files of the dataset that --data_path names.

    role: "train" or "val" for one of an evaluation's two splits, "" for training.

    Raises: DataError: nothing of that name exists, or it is not a dataset.
    """
    data_path = parse(text, SCHEMES, role)
    kind = next(kind for kind in DATASET_KINDS if kind.matches(data_path))
    options = kind.options.split()
    for name in data_path.options:
        if name not in options:
            raise DataError(
                f"--data_path {text}: {kind.name} has no option {name!r}; supported: "
                f"{', '.join(options) or 'none'}"
            )
    if role and role not in options:
        raise DataError(
            f"--data_path {text} is {kind.name}, which has no splits: expected a folder with "
            "train/ and val/, torchvision:NAME or hf:NAME"
        )
    return kind.find(data_path)


def _scheme(name: str) -> Callable[[DataPath], bool]:
    return lambda data_path: data_path.scheme == name


def _fail(data_path: DataPath) -> FileList:
    path = os.path.join(data_path.path, data_path.role) if data_path.role else data_path.path
    raise DataError(f"--data_path: there is no file or folder {path}: {EXPECTED}")


# The first kind that matches a path is used.
# fmt: off
DATASET_KINDS = (
    DatasetKind("torchvision:", _scheme("torchvision"), find_torchvision,
                "split train val root size"),
    DatasetKind("hf:", _scheme("hf"), find_hugging_face,
                "split train val image label config revision"),
    DatasetKind("DAVIS", is_davis, find_davis, "split train val resolution"),
    DatasetKind("a folder", is_folder, find_folder, "split train val metadata"),
    DatasetKind("an archive", is_archive, find_archive, "metadata"),
    DatasetKind("a list", is_file, find_list),
    DatasetKind("a pattern", is_pattern, find_pattern, "metadata"),
    DatasetKind("nothing", lambda _: True, _fail, "split train val metadata"),
)
# fmt: on
SCHEMES = tuple(kind.name[:-1] for kind in DATASET_KINDS if kind.name.endswith(":"))

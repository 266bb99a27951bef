"""Hugging Face datasets, `hf:NAME` or `hf:FOLDER`: their encoded images, read where they lie.

The package `datasets` loads a set (from the Hub, or a folder of Arrow, Parquet or image files) and
keeps it on disk as Arrow files. These are not compressed: an image is a part of one of them, and
is read from there as from a tar, without the package, in any thread or process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdino.data.datasets.archives import ArchiveIndex
from fastdino.data.datasets.data_path import (
    SPLIT_OPTIONS,
    Found,
    Place,
    common_base,
    known_labels,
    number_labels,
)
from fastdino.data.image_files import Part
from fastdino.errors import DataError

OPTIONS = (*SPLIT_OPTIONS, "image", "label", "config", "revision")
INSTALL = 'pip install -U "fastdino[data]"'
OLDEST = 3  # major version of `datasets`
# Columns of these names are meant where several could be, or where no type says what they are.
_IMAGE = "image"
_LABELS = ("label", "labels", "class", "cls")


def find_hugging_face(place: Place) -> Found:
    """The Arrow files of a set's split, or the image files that its rows name.

    Raises: DataError: no such set, split or column, nothing of images in it, no network, no or too
        old a package.
    """
    sets = _load(_library(), place)
    split = place.choose_split(list(sets))
    one = sets[split]
    image, label = _columns(place, one.features)
    classes = list(getattr(one.features[label], "names", None) or []) if label else []
    files = [str(file["filename"]) for file in one.cache_files]
    kind = f"Hugging Face {place.path}, {split}"
    if not files or getattr(one, "_indices", None) is not None:
        raise DataError(
            f"--data_path {place.text}: its rows do not lie in Arrow files in their order: write "
            "them so, with dataset.flatten_indices().save_to_disk(FOLDER)"
        )
    if _names_files(files[0], image):
        return _image_files(kind, files, image, label, classes)
    base, names = common_base(files)
    return Found(
        kind,
        base,
        names,
        classes=classes,
        archive="Arrow file",
        index=partial(index_arrow, image=image, label=label),
        selection=f"{image}\n{label}",
        numbered=True,
    )


def index_arrow(path: str, *, image: str, label: str | None) -> ArchiveIndex:
    """Where the image of each row lies in an Arrow file, and what its label is.

    Raises: DataError: it is damaged, or compressed.
    """
    found = ArchiveIndex()
    for parts, names, labels in _rows(path, image, label):
        for part, name in zip(parts.tolist(), names, strict=True):
            row = len(found.members)
            found.members.append(str(row))
            found.parts.append(Part(*part) if part[0] >= 0 else Part(0, 0))
            if part[0] < 0:
                found.reasons[row] = f"is not in the file, but {name}" if name else "has no image"
        found.labels += labels
    return found


def _library() -> Any:
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise DataError(f"--data_path hf:... needs the package {error.name}: {INSTALL}") from error
    version = str(library.__version__)
    if int(version.partition(".")[0]) < OLDEST:
        raise DataError(
            f"--data_path hf:... needs datasets {OLDEST} or newer, here is {version}: {INSTALL}"
        )
    return library


def _load(library: Any, place: Place) -> dict[str, Any]:
    """The splits of a set, whole."""
    path = os.path.expanduser(place.path)
    if not path:
        raise DataError(f"--data_path {place.text} names no set: expected hf:NAME or hf:FOLDER")
    if not os.path.exists(path) and path.startswith(("/", ".", "~")):
        raise DataError(f"--data_path {place.text}: there is no folder {path}")
    options = {"keep_in_memory": False}
    names = {k: place.options[k] for k in ("revision",) if k in place.options}
    try:
        if os.path.exists(os.path.join(path, "dataset_dict.json")):
            return dict(library.load_from_disk(path, **options))
        if os.path.exists(os.path.join(path, "state.json")):
            one = library.load_from_disk(path, **options)
            return {str(one.split or "train"): one}
        if os.path.isfile(path):
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(Path(path).suffix.lower())
            if kind is None:
                raise DataError(
                    f"--data_path {place.text}: expected a folder, or a file .parquet or .arrow"
                )
            return dict(library.load_dataset(kind, data_files=path, **options))
        return dict(library.load_dataset(path, place.options.get("config"), **names, **options))
    except (MemoryError, DataError):
        raise
    except Exception as error:  # All kinds: of the network, of the files, of what is in them.
        raise DataError(f"--data_path {place.text}: {_reason(error, place)}") from error


def _reason(error: Exception, place: Place) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConnectionError) or "ffline" in text:
        return (
            f"it is not on this machine, and the Hub cannot be reached ({text}): load it once "
            "where there is a network, dataset.save_to_disk(FOLDER), and give hf:FOLDER; or set "
            "HF_HOME to where it was loaded"
        )
    if isinstance(error, OSError) and error.errno:
        return f"the set cannot be written as Arrow files to HF_HOME: {error.strerror}"
    return f"it cannot be loaded: {text[:400]}"


def _columns(place: Place, features: Any) -> tuple[str, str | None]:
    """The names of the columns that hold images and labels; None where there are no labels."""
    images = [name for name, feature in features.items() if _holds_images(feature)]
    labels = [name for name, feature in features.items() if hasattr(feature, "names")]
    labels = labels or [name for name in _LABELS if _is_plain(features.get(name))][:1]
    have = ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())
    videos = [name for name, feature in features.items() if type(feature).__name__ == "Video"]
    image, label = place.options.get("image"), place.options.get("label")
    if not images:
        what = f"videos (column {videos[0]}), not images" if videos else "no column of images"
        raise DataError(f"--data_path {place.text} has {what}; its columns: {have}")
    if image is None:
        image = images[0] if len(images) == 1 else _IMAGE
    if image not in images:
        raise DataError(
            f"--data_path {place.text}: name the column of images by ?image=...: it is one of "
            f"{', '.join(images)}"
        )
    if label is not None and not hasattr(features.get(label), "names"):
        if not _is_plain(features.get(label)):
            raise DataError(
                f"--data_path {place.text}: {label!r} is no column of labels; its columns: {have}"
            )
    elif label is None and labels:
        label = labels[0] if len(labels) == 1 else next((n for n in _LABELS if n in labels), None)
        if label is None:
            raise DataError(
                f"--data_path {place.text}: name the column of labels by ?label=...: it is one of "
                f"{', '.join(labels)}"
            )
    return image, label


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images, or of what may be the bytes of some."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return _type(feature) in ("Image", "binary", "large_binary")


def _is_plain(feature: Any) -> bool:
    """Whether a column's values can be labels: text or whole numbers."""
    return feature is not None and _type(feature).startswith(("int", "uint", "string", "large_str"))


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else "") or (
        type(feature).__name__
    )


def _names_files(path: str, image: str) -> bool:
    """Whether the first rows hold no images, but the paths of some."""
    for parts, names, _ in _rows(path, image, None):
        if len(parts):
            return bool((parts[:, 0] < 0).all() and any(names))
    return False


def _image_files(
    kind: str, files: Sequence[str], image: str, label: str | None, classes: list[str]
) -> Found:
    """The image files that the rows name, with their labels."""
    paths: list[str] = []
    texts: list[str] = []
    for file in files:
        for _, names, labels in _rows(file, image, label):
            paths += names
            texts += labels
    base, relative = common_base(paths)
    if classes:
        labels_, classes = known_labels(texts, classes)
    else:
        labels_, classes = number_labels(texts, Path(base).name)
    return Found(kind, base, relative, labels_, classes)


def _rows(
    path: str, image: str, label: str | None
) -> Iterator[tuple[NDArray[np.int64], list[str], list[str]]]:
    """Of each batch of rows the parts [n, 3] that are images (-1: none), their paths, labels."""
    arrow = importlib.import_module("pyarrow")
    try:
        with arrow.memory_map(path) as mapped:
            size, start = mapped.size(), mapped.read_buffer(1).address
            mapped.seek(0)
            with arrow.ipc.open_stream(mapped) as batches:
                for batch in batches:
                    column = batch.column(image)
                    names = _paths(column)
                    parts = _parts(column, start, size)
                    labels = _texts(batch.column(label)) if label else [""] * len(names)
                    yield parts, names, labels
    except (arrow.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None):  # of the system, not of what is in the file
            raise
        raise DataError(f"--data_path: {path} is damaged or cut off: {error}") from error
    except KeyError as error:
        raise DataError(f"--data_path: {path} has no column {error}") from error
    except ValueError as error:
        raise DataError(f"--data_path: {path} {error}") from error


def _parts(column: Any, start: int, size: int) -> NDArray[np.int64]:
    """Where the values of a column of bytes lie in the mapped file: [n, 3], -1 where none is.

    start: the address of the file's first byte. size: the file's.
    """
    stored = _field(column, "bytes")
    parts = np.full((len(column), 3), -1, np.int64)
    if stored is None or stored.null_count == len(stored):
        return parts
    wide = str(stored.type).startswith("large")
    _, ends, data = stored.buffers()
    bounds = np.frombuffer(ends, np.int64 if wide else np.int32)[stored.offset :]
    bounds = bounds[: len(stored) + 1].astype(np.int64)
    offset = data.address - start
    if not 0 <= offset <= offset + int(bounds[-1]) <= size:
        raise ValueError("is compressed, and images cannot be read from its middle")
    valid = [one.is_valid().to_numpy(zero_copy_only=False) for one in (column, stored)]
    there = valid[0] & valid[1]  # a row that is none may have a value all the same
    parts[there, 0] = (offset + bounds[:-1])[there]
    parts[there, 1] = np.diff(bounds)[there]
    parts[there, 2] = 0
    return parts


def _paths(column: Any) -> list[str]:
    paths = _field(column, "path")
    if paths is None:
        return [""] * len(column)
    return [path or "" for path in paths.to_pylist()]


def _field(column: Any, name: str) -> Any:
    """A field of a column of {bytes, path}; of one of bytes or text that is the column itself."""
    kind = str(column.type)
    if kind.startswith("struct"):
        return column.field(name) if column.type.get_field_index(name) >= 0 else None
    return column if ("binary" in kind) == (name == "bytes") else None


def _texts(column: Any) -> list[str]:
    """Labels as text; "" where there is none, or it is -1, as the Hub marks those that are kept."""
    return ["" if value in (None, -1) else str(value) for value in column.to_pylist()]

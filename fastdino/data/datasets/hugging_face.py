"""Hugging Face datasets, hf:NAME or hf:FOLDER: encoded images, read in place from Arrow files.

The package `datasets` loads a dataset (from the Hub, or a folder of Arrow, Parquet or image files)
and stores it as Arrow files. These are not compressed, so an image is a range of bytes in one of
them and can be read like a member of a tar, without the package, in any thread or process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdino.data.datasets.data_path import DataPath
from fastdino.data.datasets.file_list import FileList, common_base, number_labels
from fastdino.data.datasets.splits import choose_split
from fastdino.data.manifest import Manifest, unread_manifest
from fastdino.errors import DataError
from fastdino.file_names import as_path

_INSTALL = 'pip install -U "fastdino[data]"'
_OLDEST_VERSION = 3  # major version of `datasets`
_SAVED = ("dataset_dict.json", "state.json")  # in folders of save_to_disk
# Preferred columns if there are several, or if no type marks a column as labels.
_IMAGE = "image"
_LABELS = ("label", "labels", "class", "cls")


def find_hugging_face(data_path: DataPath) -> FileList:
    """Return the Arrow files of a split, or the image files that its rows name.

    Raises: DataError: no such dataset, split or column; it has no images; the Hub cannot be
        reached; the package `datasets` is missing or too old.
    """
    splits = _load(_import_library(), data_path)
    split = choose_split(data_path, list(splits))
    dataset = splits[split]
    image, label = _choose_columns(data_path, dataset.features)
    classes = list(getattr(dataset.features[label], "names", None) or []) if label else []
    files = [str(file["filename"]) for file in dataset.cache_files]
    kind = f"Hugging Face {data_path.path}, {split}"
    if not files or getattr(dataset, "_indices", None) is not None:
        raise data_path.error(
            "its rows are not stored in Arrow files in their order: "
            "write them with dataset.flatten_indices().save_to_disk(FOLDER)"
        )
    first = next((batch for batch in _rows(files[0], image, None) if len(batch[0])), None)
    if first and (first[0][:, 0] < 0).all() and any(first[1]):  # paths instead of bytes
        rows = [batch for file in files for batch in _rows(file, image, label)]
        base, names = common_base([as_path(path) for _, paths, _ in rows for path in paths])
        labels = [label for _, _, labels in rows for label in labels]
        return FileList(kind, base, names, *number_labels(labels, Path(base).name, classes))
    base, names = common_base(files)
    return FileList(
        kind,
        base,
        names,
        classes=classes,
        archive="Arrow file",
        index=partial(index_arrow, image=image, label=label),
        selection=f"{image}\n{label}",
        numbered=True,
    )


def index_arrow(path: str, *, image: str, label: str | None) -> Manifest:
    """Return the byte range and the label of the image in each row of an Arrow file.

    Raises: DataError: the file is damaged or compressed, or has no such column.
    """
    members: list[str] = []
    all_labels: list[str] = []
    all_parts = [np.zeros((0, 3), np.int64)]
    reasons: dict[int, str] = {}
    for parts, names, labels in _rows(path, image, label):
        for i in np.flatnonzero(parts[:, 0] < 0).tolist():
            reason = f"is not in the file, but {names[i]}" if names[i] else "has no image"
            reasons[len(members) + i] = reason
        members += [str(len(members) + i) for i in range(len(names))]
        all_parts.append(parts.clip(min=0))
        all_labels += labels
    return unread_manifest([path], members, np.concatenate(all_parts), all_labels, reasons)


def _import_library() -> Any:
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise DataError(f"--data_path hf:... needs the package {error.name}: {_INSTALL}") from error
    version = str(library.__version__)
    if int(version.partition(".")[0]) < _OLDEST_VERSION:
        raise DataError(
            f"--data_path hf:... needs datasets {_OLDEST_VERSION} or newer, found {version}: "
            f"{_INSTALL}"
        )
    return library


def _load(library: Any, data_path: DataPath) -> dict[str, Any]:
    """Return all splits of a dataset."""
    path, options = os.path.expanduser(data_path.path), data_path.options
    if not path:
        raise data_path.error("expected hf:NAME or hf:FOLDER")
    if not os.path.exists(path) and path.startswith(("/", ".", "~")):
        raise data_path.error(f"there is no folder {path}")
    is_file, suffix = os.path.isfile(path), Path(path).suffix.lower()
    if is_file and suffix not in (".parquet", ".arrow"):
        raise data_path.error("expected a folder, or a .parquet or .arrow file")
    try:
        if any(os.path.exists(os.path.join(path, name)) for name in _SAVED):
            saved = library.load_from_disk(path, keep_in_memory=False)
            return saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        return library.load_dataset(
            suffix[1:] if is_file else path,
            options.get("config"),
            data_files=path if is_file else None,
            revision=options.get("revision"),
            keep_in_memory=False,
        )
    except MemoryError:
        raise
    except Exception as error:  # of any type: from the network, the files or their contents
        raise data_path.error(_load_problem(error)) from error


def _load_problem(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConnectionError) or "ffline" in text:
        return (
            f"not on this machine, and the Hub cannot be reached ({text}): on a machine with a "
            "network, call dataset.save_to_disk(FOLDER) and use hf:FOLDER here; or set HF_HOME to "
            "where it was downloaded"
        )
    if isinstance(error, OSError) and error.errno:
        return f"cannot write Arrow files to HF_HOME: {error.strerror}"
    return f"cannot be loaded: {text[:400]}"


def _choose_columns(data_path: DataPath, features: Any) -> tuple[str, str | None]:
    """Return the columns with the images and the labels.

    None: there are no labels, or several columns of them and training, which uses none.
    """
    images = [name for name, feature in features.items() if _holds_images(feature)]
    labels = [name for name, feature in features.items() if hasattr(feature, "names")]
    labels = labels or [name for name in _LABELS if _holds_labels(features.get(name))][:1]
    columns = ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())
    if not images:
        videos = [name for name, feature in features.items() if _type(feature) == "Video"]
        contents = f"videos (column {videos[0]}), not images" if videos else "no image column"
        raise data_path.error(f"the dataset has {contents}; its columns: {columns}")
    image, label = data_path.options.get("image"), data_path.options.get("label")
    image = image or (images[0] if len(images) == 1 else _IMAGE)
    if image not in images:
        raise data_path.error(
            f"choose the image column with ?image=...: one of {', '.join(images)}"
        )
    if label is not None:
        if not hasattr(features.get(label), "names") and not _holds_labels(features.get(label)):
            raise data_path.error(f"{label!r} is not a label column; its columns: {columns}")
    elif len(labels) == 1:
        label = labels[0]
    elif labels:
        label = next((name for name in _LABELS if name in labels), None)
        if label is None and data_path.role:  # training needs none
            raise data_path.error(
                f"choose the label column with ?label=...: one of {', '.join(labels)}"
            )
    return image, label


def _holds_images(feature: Any) -> bool:
    """Return whether a column holds images, or bytes that may be images."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return _type(feature) in ("Image", "binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    """Return whether a column's values can be labels: text or integers."""
    return feature is not None and _type(feature).startswith(("int", "uint", "string", "large_str"))


def _type(feature: Any) -> str:
    name = type(feature).__name__
    return str((name == "Value" and getattr(feature, "dtype", None)) or name)


def _rows(
    path: str, image: str, label: str | None
) -> Iterator[tuple[NDArray[np.int64], list[str], list[str]]]:
    """Yield for each batch of n rows the images' parts [n, 3] (-1: none), paths and labels."""
    arrow = importlib.import_module("pyarrow")
    try:
        with arrow.memory_map(path) as mapped:
            size, start = mapped.size(), mapped.read_buffer(1).address
            mapped.seek(0)
            with arrow.ipc.open_stream(mapped) as batches:
                for batch in batches:
                    column = _valid(batch, image)
                    paths = _field(column, "path")
                    names = _texts(paths) if paths is not None else [""] * len(column)
                    labels = _texts(_valid(batch, label)) if label else [""] * len(column)
                    yield _parts(column, start, size), names, labels
    except KeyError as error:
        raise DataError(f"--data_path: {path}: {error.args[0]}") from error
    except (ValueError, TypeError, OSError, arrow.ArrowException) as error:
        if getattr(error, "errno", None):  # raised by the system, not by the file's contents
            raise
        raise DataError(f"--data_path: {path} is damaged or compressed: {error}") from error


def _valid(batch: Any, name: str) -> Any:
    """Return a column whose offsets have been checked: Arrow itself trusts those of a file.

    The checks read offsets and text, not the images. Raises: ValueError: the column is damaged.
    """
    column = batch.column(name)
    column.validate(full=True)
    return column


def _parts(column: Any, start: int, size: int) -> NDArray[np.int64]:
    """Return the byte ranges of a column's values in the mapped file, [n, 3]; -1 for null.

    Args:
        start: address of the file's first byte.
        size: bytes of the file.
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
        raise ValueError("compressed columns do not allow random access")
    # A null struct can still contain a value, so both levels are checked.
    valid = [one.is_valid().to_numpy(zero_copy_only=False) for one in (column, stored)]
    present = valid[0] & valid[1]
    parts[present, 0] = (offset + bounds[:-1])[present]
    parts[present, 1] = np.diff(bounds)[present]
    parts[present, 2] = 0
    return parts


def _field(column: Any, name: str) -> Any:
    """Return the field "bytes" or "path" of an image column; None if it is missing.

    A plain column of bytes or text is the field itself.
    """
    kind = str(column.type)
    if kind.startswith("struct"):
        return column.field(name) if column.type.get_field_index(name) >= 0 else None
    return column if ("binary" in kind) == (name == "bytes") else None


def _texts(column: Any) -> list[str]:
    """Return values as text; "" for null, and for -1, which the Hub uses for hidden labels."""
    return ["" if value in (None, -1, "-1") else str(value) for value in column.to_pylist()]

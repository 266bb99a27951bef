"""Datasets in a text file: one image path per line, optionally followed by a label."""

from __future__ import annotations

import os
from pathlib import Path

from fastdino.data.datasets.data_path import EXPECTED, DataPath
from fastdino.data.datasets.file_list import FileList, number_labels
from fastdino.data.image_files import read_file
from fastdino.data.image_names import EXTENSIONS
from fastdino.errors import DataError
from fastdino.file_names import as_path, decode_lines

LARGEST_LIST = 1 << 32  # bytes of a list that is read
_BEGINNING = 1 << 16


def is_file(data_path: DataPath) -> bool:
    """Return whether the path exists; it is a list if it is neither a folder nor an archive."""
    return os.path.exists(data_path.path)


def find_list(data_path: DataPath) -> FileList:
    """Return the image files listed in a text file, relative to the file's folder.

    Raises: DataError: the file cannot be read, is not text, or contains no path.
    """
    path = data_path.path
    try:
        # First its beginning: a file of another kind can be of any size.
        text = read_file(path, length=_BEGINNING)
        text = text if b"\0" in text else read_file(path, largest=LARGEST_LIST)
    except OSError as error:
        raise DataError(f"--data_path: the list {path} cannot be read: {error}") from error
    if b"\0" in text:
        raise DataError(f"--data_path: {path} is not a text file, a tar or a zip: {EXPECTED}")
    files: list[str] = []
    labels: list[str] = []
    for number, line in enumerate(decode_lines(text), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            file, label = _split_line(line, f"{path}, line {number}")
            files.append(as_path(file))
            labels.append(label)
    if not files:
        raise DataError(f"no images in the list {path}: it contains no path; {EXPECTED}")
    return FileList("a list", os.path.dirname(path), files, *number_labels(labels, Path(path).stem))


def _split_line(line: str, where: str) -> tuple[str, str]:
    """Split a line into path and label. A path without an image's extension must end with a tab."""
    has_end = line.rstrip(" \r\n").endswith("\t")
    line = line.strip()
    if "\t" in line:
        file, _, label = line.rpartition("\t")
        return file.strip(), label.strip()
    if line.lower().endswith(EXTENSIONS):
        return line, ""
    file, _, label = line.rpartition(" ")
    if file.strip().lower().endswith(EXTENSIONS):
        return file.strip(), label
    if has_end:
        return line, ""
    raise DataError(
        f"--data_path: {where}: expected the path of an image (ending in {', '.join(EXTENSIONS)}), "
        f"or a path and a label, got {line[:80]!r}; after any other extension put a tab"
    )

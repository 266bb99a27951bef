"""Datasets in tars or zips: a folder of them, one file, or a pattern such as train-{000..146}.tar.

Classes are, in this order: the labels in .cls or .json members, none for numbered shards, the names
of the archives, and for a single archive its folders (or the tars in it).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from fastdino.data.datasets import tars, zips
from fastdino.data.datasets.data_path import EXPECTED, DataPath
from fastdino.data.datasets.file_list import FileList, common_base, number_labels
from fastdino.data.datasets.yfcc import select_photos
from fastdino.data.manifest import Manifest
from fastdino.errors import DataError

INDEX: dict[str, Callable[[str], Manifest]] = {"tar": tars.index_tar, "zip": zips.index_zip}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SUFFIX = re.compile(r"\.(tar|zip)$", re.IGNORECASE)


def archive_kind(path: str) -> str:
    """Return "tar", "zip" or "", by a file's name or first bytes.

    Raises: DataError: the file cannot be read, or is a compressed tar.
    """
    try:
        return "tar" if tars.is_tar(path) else "zip" if zips.is_zip(path) else ""
    except OSError as error:
        raise DataError(f"--data_path: {path} cannot be read: {error}") from error


def is_archive(data_path: DataPath) -> bool:
    """Return whether the path is a tar or a zip; raise DataError if it cannot be read."""
    return os.path.isfile(data_path.path) and bool(archive_kind(data_path.path))


def find_archive(data_path: DataPath) -> FileList:
    """Return a single tar or zip."""
    folder, name = os.path.split(data_path.path)
    return select_photos(list_archives(folder, [name]), data_path.options.get("metadata"))


def is_pattern(data_path: DataPath) -> bool:
    """Return whether the path is a pattern for the names of archives."""
    return any(sign in data_path.path for sign in "*?[{")


def find_pattern(data_path: DataPath) -> FileList:
    """Return the archives that match a pattern: * ? [...] as in a shell, {000..146} a range."""
    is_range = "{" in data_path.path
    paths: list[str] = []
    for part in expand_range(data_path.path):
        matches = sorted(glob.glob(part)) if any(sign in part for sign in "*?[") else [part]
        if is_range and not (matches and all(map(os.path.exists, matches))):
            raise data_path.error(f"{part} does not exist")
        paths += matches
    if not paths:
        raise data_path.error(f"no file matches; {EXPECTED}")
    others = [path for path in paths if os.path.isdir(path) or not archive_kind(path)]
    if others:
        raise data_path.error(f"expected only tars or zips, but it matches {others[0]}")
    archives = list_archives(*common_base(paths), numbered=is_range)
    return select_photos(archives, data_path.options.get("metadata"))


def expand_range(pattern: str) -> list[str]:
    """Expand a-{000..002}.tar to its names, in order; raise DataError if a range is descending."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise DataError(f"--data_path {pattern}: the range {match[0]} is descending")
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for number in numbers for name in expand_range(before + number + after)]


def list_archives(base: str, files: list[str], *, numbered: bool = False) -> FileList:
    """Return archives, all tars or all zips.

    numbered: treat them as shards whatever their names are.
    """
    kinds = {archive_kind(os.path.join(base, file)) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{base} contains both tars and zips: move those away that are not meant")
    (kind,) = kinds
    numbered = numbered or are_numbered(files)
    return FileList(f"{kind}s", base, files, archive=kind, index=INDEX[kind], numbered=numbered)


def are_numbered(names: Sequence[str]) -> bool:
    """Return whether names differ only by consecutive numbers, as those of shards do."""
    matches = [re.fullmatch(r"(.*?)(\d+)", stem(name)) for name in names]
    prefixes = {match[1] if match else None for match in matches}
    if len(names) < 2 or len(prefixes) > 1 or None in prefixes:
        return False
    numbers = sorted(int(match[2]) for match in matches if match)
    return numbers == list(range(numbers[0], numbers[0] + len(names)))


def stem(name: str) -> str:
    """Return an archive's name without folder and suffix."""
    return _SUFFIX.sub("", PurePosixPath(name).name)


def label_images(files: FileList, images: Manifest) -> tuple[list[int], list[str], str]:
    """Return the class number of each image in archives, the classes, and the dataset's kind.

    Sets `files.labelled`.

    Raises: DataError: see number_labels.
    """
    number, archive, names = len(images.files), files.archive, images.labels
    has_labels = any(names)
    if files.classes and has_labels:
        kind = files.kind
    elif files.kind != f"{archive}s":  # a dataset with a name of its own
        kind = f"{files.kind}: {number} {archive}(s)"
    elif has_labels:
        kind = f"{number} labelled {archive} shard(s)"
    elif files.numbered:
        kind = f"{number} {archive} shards"
    else:
        kind = f"class {archive}s: {number} {archive}(s)"
        names = class_names(images)
    default = Path(files.base).resolve().name
    labels, classes, files.labelled = number_labels(names, default, files.classes)
    return labels, classes, kind


def class_names(images: Manifest) -> list[str]:
    """Return the class of each image: its archive's name, or for one archive its folder's name."""
    if len(images.files) > 1:
        return [stem(images.files[file]) for file in images.file_ids.tolist()]
    folders = [name.split("/")[:-1] for name in images.members]
    # A single top-level folder is not a class.
    while folders and all(len(f) > 1 for f in folders) and len({f[0] for f in folders}) == 1:
        folders = [folder[1:] for folder in folders]
    return [stem(folder[0]) if folder else stem(images.files[0]) for folder in folders]

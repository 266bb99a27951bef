"""Datasets in a folder: one folder per class, the images themselves, or tars or zips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastdino.data.datasets.archives import archive_kind, list_archives
from fastdino.data.datasets.data_path import DataPath
from fastdino.data.datasets.file_list import FileList
from fastdino.data.datasets.splits import requested_split
from fastdino.data.datasets.tars import COMPRESSED_SUFFIXES
from fastdino.data.datasets.yfcc import find_metadata, select_photos
from fastdino.data.image_files import retrying
from fastdino.data.image_names import (
    EXTENSIONS,
    is_image_name,
    is_leftover,
    is_unsupported_image,
)
from fastdino.errors import DataError


def is_folder(data_path: DataPath) -> bool:
    """Return whether the path is a folder."""
    return os.path.isdir(data_path.path)


def find_folder(data_path: DataPath) -> FileList:
    """Return the images or archives of a folder, or of the split in it that is requested.

    Raises: DataError: there is no such split, the folder cannot be read, it contains no images, or
        it is unclear which of its files are meant.
    """
    root = data_path.path
    split = requested_split(data_path) or data_path.role
    try:
        if split:
            root = os.path.join(root, split)
            if not os.path.isdir(root):
                folders, _ = _list_folder(data_path.path)
                raise data_path.error(
                    f"there is no folder {root}; {data_path.path} has the folders "
                    f"{', '.join(folders[:20]) or '(none)'}"
                )
        files = _find_files(root)
    except OSError as error:
        raise data_path.error(
            f"{error.filename} cannot be read: {error.strerror}; make it readable or move it "
            "elsewhere"
        ) from error
    return select_photos(files, data_path.options.get("metadata") or find_metadata(root))


def _find_files(root: str) -> FileList:
    folders, files = _list_folder(root)
    loose = list(filter(is_image_name, files))
    archives = [name for name in files if name.lower().endswith((".tar", ".zip"))]
    images: list[str] = []
    labels: list[int] = []
    unsupported = [os.path.join(root, name) for name in filter(is_unsupported_image, files)]
    for label, folder in enumerate(folders):
        below, others = _walk(os.path.join(root, folder))
        images += below
        unsupported += others
        labels += [label] * len(below)
    if len(loose) > len(images) > 0:
        raise DataError(
            f"{root} contains {len(loose)} images, and {len(images)} more in folders: images next "
            "to class folders are not used. Move them into a folder, or move the folders away"
        )
    if loose and archives and not images:
        raise DataError(
            f"{root} contains {len(loose)} images and {len(archives)} archives: move those away "
            "that are not meant"
        )
    skipped = dict.fromkeys(unsupported, "is in a format that this version of Pillow cannot read")
    if images:
        reason = "is next to the class folders"
        skipped |= {os.path.join(root, name): reason for name in [*loose, *archives]}
        start = len(os.path.join(root, ""))
        relative = [path[start:] for path in images]
        return FileList("class folders", root, relative, labels, folders, skipped=skipped)
    if loose:
        name = Path(root).resolve().name
        kind, labels = "a flat folder", [0] * len(loose)
        unlabelled = [False] * len(loose)
        return FileList(kind, root, loose, labels, [name], unlabelled, skipped=skipped)
    if archives:
        return list_archives(root, archives)
    for name in files:
        if name.lower().endswith(COMPRESSED_SUFFIXES):
            archive_kind(os.path.join(root, name))  # raises DataError if it is compressed
    if unsupported:
        raise DataError(
            f"no usable images in {root}: {unsupported[0]} and {len(unsupported) - 1} more are in "
            "a format that this version of Pillow cannot read: convert them to JPEG or PNG"
        )
    raise DataError(
        f"no images in {root}: it contains no file that ends in {', '.join(EXTENSIONS)}, directly "
        "or in a folder, and no .tar or .zip"
    )


@retrying
def _list_folder(root: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files in a folder, without leftovers."""
    folders: list[str] = []
    files: list[str] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if is_leftover(entry.name):
            continue
        # os.path.isdir is False for a link to itself.
        is_dir = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
        (folders if is_dir else files).append(entry.name)
    return folders, files


@retrying
def _walk(folder: str) -> tuple[list[str], list[str]]:
    """Return the images below a folder that Pillow reads, and the others.

    The order is that of torchvision's ImageFolder. Links are followed, but not in circles.
    """

    def fail(error: OSError) -> None:
        raise error

    images: list[tuple[str, list[str]]] = []
    above = {folder: [os.path.realpath(folder)]}  # real paths of a folder and its ancestors
    for current, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        ancestors = above.pop(current)
        real = {name: os.path.realpath(os.path.join(current, name)) for name in folders}
        folders[:] = [
            name
            for name in folders
            if not is_leftover(name) and not _is_above_any(real[name], ancestors)
        ]
        above |= {os.path.join(current, name): [*ancestors, real[name]] for name in folders}
        images.append((current, sorted(names)))
    paths = [
        (name, os.path.join(current, name)) for current, names in sorted(images) for name in names
    ]
    return (
        [path for name, path in paths if is_image_name(name)],
        [path for name, path in paths if is_unsupported_image(name)],
    )


def _is_above_any(folder: str, others: Sequence[str]) -> bool:
    """Return whether one of the others is this folder or is below it."""
    return any(os.path.commonpath([folder, other]) == folder for other in others)

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
from fastdino.data.image_files import EXTENSIONS, retrying
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
    loose = [name for name in files if name.lower().endswith(EXTENSIONS)]
    archives = [name for name in files if name.lower().endswith((".tar", ".zip"))]
    images: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        below = _walk(os.path.join(root, folder))
        images += below
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
    if images:
        reason = "is next to the class folders"
        skipped = {os.path.join(root, name): reason for name in [*loose, *archives]}
        start = len(os.path.join(root, ""))
        relative = [path[start:] for path in images]
        return FileList("class folders", root, relative, labels, folders, skipped=skipped)
    if loose:
        name = Path(root).resolve().name
        return FileList("a flat folder", root, loose, [0] * len(loose), [name])
    if archives:
        return list_archives(root, archives)
    for name in files:
        if name.lower().endswith(COMPRESSED_SUFFIXES):
            archive_kind(os.path.join(root, name))  # raises DataError if it is compressed
    raise DataError(
        f"no images in {root}: it contains no file that ends in {', '.join(EXTENSIONS)}, directly "
        "or in a folder, and no .tar or .zip"
    )


@retrying
def _list_folder(root: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files in a folder."""
    folders: list[str] = []
    files: list[str] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        # os.path.isdir is False for a link to itself.
        is_dir = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
        (folders if is_dir else files).append(entry.name)
    return folders, files


@retrying
def _walk(folder: str) -> list[str]:
    """Return all images below a folder, in the order of torchvision's ImageFolder.

    Links are followed, but not in circles.
    """

    def fail(error: OSError) -> None:
        raise error

    images: list[tuple[str, list[str]]] = []
    above = {folder: [os.path.realpath(folder)]}  # real paths of a folder and its ancestors
    for current, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        ancestors = above.pop(current)
        real = {name: os.path.realpath(os.path.join(current, name)) for name in folders}
        folders[:] = [name for name in folders if not _is_above_any(real[name], ancestors)]
        above |= {os.path.join(current, name): [*ancestors, real[name]] for name in folders}
        images.append((current, sorted(n for n in names if n.lower().endswith(EXTENSIONS))))
    return [os.path.join(current, name) for current, names in sorted(images) for name in names]


def _is_above_any(folder: str, others: Sequence[str]) -> bool:
    """Return whether one of the others is this folder or is below it."""
    return any(os.path.commonpath([folder, other]) == folder for other in others)

"""Datasets in a folder: one folder per class, the images themselves, or tars or zips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastdino.data.datasets import tars
from fastdino.data.datasets.archives import list_archives
from fastdino.data.datasets.data_path import DataPath
from fastdino.data.datasets.file_list import FileList
from fastdino.data.datasets.splits import requested_split
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
    if split:
        root = os.path.join(root, split)
        if not os.path.isdir(root):
            folders = [entry.name for entry in _list_folder(data_path.path) if _is_dir(entry)]
            raise DataError(
                f"--data_path: there is no folder {root}; {data_path.path} has the folders "
                f"{', '.join(folders[:20]) or '(none)'}"
            )
    metadata = data_path.options.get("metadata") or find_metadata(root)
    return select_photos(_find_files(root), metadata)


def _find_files(root: str) -> FileList:
    entries = _list_folder(root)
    folders = [entry.name for entry in entries if _is_dir(entry)]
    files = [entry.name for entry in entries if not _is_dir(entry)]
    loose = [name for name in files if name.lower().endswith(EXTENSIONS)]
    archives = [name for name in files if name.lower().endswith((".tar", ".zip"))]
    images: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        below = _images_below(os.path.join(root, folder))
        images += below
        labels += [label] * len(below)
    if len(loose) > len(images) > 0:
        raise DataError(
            f"{root} contains {len(loose)} images, and {len(images)} more in folders: images next "
            "to class folders are not used. Move them into a folder, or move the folders away"
        )
    if loose and archives and not images:
        suffixes = {name.lower()[-3:] for name in archives}
        raise DataError(
            f"{root} contains {len(loose)} images and {len(archives)} "
            f"{'archives' if len(suffixes) > 1 else suffixes.pop() + 's'}: move those away that "
            "are not meant"
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
    tars.raise_if_compressed([os.path.join(root, name) for name in files])
    raise DataError(
        f"no images in {root}: it contains no file that ends in {', '.join(EXTENSIONS)}, directly "
        "or in a folder, and no .tar or .zip"
    )


def _list_folder(root: str) -> list[os.DirEntry[str]]:
    try:
        return sorted(_scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"--data_path: the folder {root} cannot be read: {error}") from error


@retrying
def _scandir(root: str) -> list[os.DirEntry[str]]:
    return list(os.scandir(root))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _images_below(folder: str) -> list[str]:
    """Return all images below a folder, in the order of torchvision's ImageFolder."""
    try:
        return _walk(folder)
    except OSError as error:
        raise DataError(
            f"the folder {error.filename} cannot be read: {error.strerror}; "
            "make it readable or move it elsewhere"
        ) from error


@retrying
def _walk(folder: str) -> list[str]:
    """Return the images sorted by folder, then name. Links are followed, but not in circles."""

    def fail(error: OSError) -> None:
        raise error

    images: list[tuple[str, list[str]]] = []
    above = {folder: [os.path.realpath(folder)]}  # real paths of a folder and its ancestors
    for current, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        ancestors = above.pop(current)
        real = {name: os.path.realpath(os.path.join(current, name)) for name in folders}
        folders[:] = [name for name in folders if not _contains_any(real[name], ancestors)]
        above |= {os.path.join(current, name): [*ancestors, real[name]] for name in folders}
        images.append((current, sorted(n for n in names if n.lower().endswith(EXTENSIONS))))
    return [os.path.join(current, name) for current, names in sorted(images) for name in names]


def _contains_any(folder: str, others: Sequence[str]) -> bool:
    """Return whether one of the others is this folder or is below it."""
    start = os.path.join(folder, "")
    return any(os.path.join(other, "").startswith(start) for other in others)

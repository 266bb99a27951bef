"""What lies at --data_path: a folder of images, a list of them, tars; told apart by looking."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastdino.data import tars
from fastdino.data.reading import read_file, retrying
from fastdino.errors import DataError

# As torchvision.datasets.ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EXPECTED = (
    "expected a folder of images (one folder a class, or flat), a folder of .tar files or one of "
    "them, a pattern such as 'train-{000..146}.tar' or 'train-*.tar', or a text file with one "
    "image's path a line"
)
UNLABELLED = "unlabelled"


@dataclass
class Found:
    """Files that hold images, before any of them was opened.

    kind: in a few words. base: what `files` are relative to.
    labels: [f] class numbers, places in classes; None where the tars will tell.
    numbered: they are shards by their names. skipped: what is passed over, with the reason.
    """

    kind: str
    base: str
    files: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    numbered: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def path(self, file: str) -> str:
        return os.path.join(self.base, file)


def find(path: str) -> Found:
    """What --data_path holds; raises DataError where it is none of what was expected."""
    if os.path.isdir(path):
        return _in_folder(path)
    if os.path.exists(path):
        try:
            if tars.is_tar(path):
                return Found("a tar", os.path.dirname(path), [os.path.basename(path)])
        except OSError as error:
            raise DataError(f"--data_path: {path} cannot be read: {error}") from error
        return _in_list(path)
    if any(sign in path for sign in "*?[{"):
        return _by_pattern(path)
    raise DataError(f"--data_path: there is no folder {path}, and no file: {EXPECTED}")


def number_labels(names: Sequence[str], lone: str) -> tuple[list[int], list[str]]:
    """Class numbers and classes of names; numbers in their order. "" is UNLABELLED.

    lone: the class of all where no image has a name.
    """
    if not any(names):
        return [0] * len(names), [lone]
    named = [name or UNLABELLED for name in names]
    different = set(named)
    if all(name.isascii() and name.isdigit() for name in different):
        classes = sorted(different, key=lambda name: (int(name), name))
    else:
        classes = sorted(different)
    places = {name: place for place, name in enumerate(classes)}
    return [places[name] for name in named], classes


def _in_folder(root: str) -> Found:
    try:
        listed = retrying(lambda: sorted(os.scandir(root), key=lambda entry: entry.name))
    except OSError as error:
        raise DataError(f"--data_path: the folder {root} cannot be read: {error}") from error
    folders = [entry.name for entry in listed if _is_dir(entry)]
    files = [entry.name for entry in listed if not _is_dir(entry)]
    loose = [name for name in files if name.lower().endswith(EXTENSIONS)]
    archives = [name for name in files if name.lower().endswith(".tar")]
    below: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = _images_below(os.path.join(root, folder))
        below += images
        labels += [label] * len(images)
    if len(loose) > len(below) > 0:
        raise DataError(
            f"{root} holds {len(loose)} images, and folders with {len(below)} more: images beside "
            "folders would not be used. Move them into a folder of their own, or the folders away"
        )
    if loose and archives and not below:
        raise DataError(
            f"{root} holds {len(loose)} images and {len(archives)} tars: which are meant? Move "
            "the others away"
        )
    if below:
        beside = dict.fromkeys([*loose, *archives], "lies beside the class folders")
        skipped = {os.path.join(root, name): reason for name, reason in beside.items()}
        start = len(os.path.join(root, ""))
        relative = [path[start:] for path in below]
        return Found("class folders", root, relative, labels, folders, skipped=skipped)
    if loose:
        return Found("a flat folder", root, loose, [0] * len(loose), [Path(root).resolve().name])
    if archives:
        return Found("tars", root, archives, numbered=tars.are_numbered(archives))
    tars.raise_if_compressed([os.path.join(root, name) for name in files])
    raise DataError(
        f"no images in {root}: neither there nor in folders below it is a file that "
        f"ends in {', '.join(EXTENSIONS)}, nor is there a .tar"
    )


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _images_below(folder: str) -> list[str]:
    """Images in ImageFolder's order: by folder, then name. Links are followed, cycles are not."""
    try:
        return retrying(lambda: _walk(folder))
    except OSError as error:
        raise DataError(
            f"the folder {error.filename} cannot be read: {error.strerror}; "
            "make it readable or move it elsewhere"
        ) from error


def _walk(folder: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise error

    found: list[tuple[str, list[str]]] = []
    above = {folder: [os.path.realpath(folder)]}  # itself and its ancestors, without links
    for here, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        ancestors = above.pop(here)
        real = {below: os.path.realpath(os.path.join(here, below)) for below in folders}
        folders[:] = [below for below in folders if not _holds_one(real[below], ancestors)]
        above |= {os.path.join(here, below): [*ancestors, real[below]] for below in folders}
        found.append((here, sorted(n for n in names if n.lower().endswith(EXTENSIONS))))
    return [os.path.join(here, name) for here, names in sorted(found) for name in names]


def _holds_one(folder: str, others: Sequence[str]) -> bool:
    """Whether one of the others is this folder or lies below it."""
    start = os.path.join(folder, "")
    return any(os.path.join(other, "").startswith(start) for other in others)


def _by_pattern(pattern: str) -> Found:
    """Tars by a pattern of the shell's kind, with {000..146} as a range of numbers."""
    is_range = "{" in pattern
    paths: list[str] = []
    for part in tars.expand(pattern):
        matches = sorted(glob.glob(part)) if any(sign in part for sign in "*?[") else [part]
        if is_range and not (matches and all(map(os.path.exists, matches))):
            raise DataError(f"--data_path {pattern}: there is no {part}")
        paths += matches
    if not paths:
        raise DataError(f"--data_path: no file is called {pattern}; {EXPECTED}")
    try:
        others = [path for path in paths if os.path.isdir(path) or not tars.is_tar(path)]
    except OSError as error:
        raise DataError(
            f"--data_path {pattern}: {error.filename} cannot be read: {error}"
        ) from error
    if others:
        raise DataError(f"--data_path {pattern} must name tars, and {others[0]} is none")
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    files = [os.path.relpath(os.path.abspath(path), base) for path in paths]
    return Found("tars", base, files, numbered=is_range or tars.are_numbered(files))


def _in_list(path: str) -> Found:
    """The images that a text file names: a path a line, and a label where the list has labels."""
    try:
        text = read_file(path)
    except OSError as error:
        raise DataError(f"--data_path: the list {path} cannot be read: {error}") from error
    if b"\0" in text:
        raise DataError(f"--data_path: {path} is neither a text file nor a tar: {EXPECTED}")
    files: list[str] = []
    names: list[str] = []
    lines = text.decode("utf-8", "surrogateescape").removeprefix("\ufeff").splitlines()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            file, name = _split_line(line, f"{path}, line {number}")
            files.append(file)
            names.append(name)
    if not files:
        raise DataError(f"no images in the list {path}: it holds no path; {EXPECTED}")
    labels, classes = number_labels(names, Path(path).stem)
    return Found("a list", os.path.dirname(path), files, labels, classes)


def _split_line(line: str, where: str) -> tuple[str, str]:
    """The path and the label of a line; a tab ends a path that ends as no image does."""
    if "\t" in line:
        file, _, name = line.rpartition("\t")
        return file.strip(), name.strip()
    if line.lower().endswith(EXTENSIONS):
        return line, ""
    file, _, name = line.rpartition(" ")
    if file.strip().lower().endswith(EXTENSIONS):
        return file.strip(), name
    raise DataError(
        f"--data_path: {where}: expected the path of an image (ending in "
        f"{', '.join(EXTENSIONS)}), or a path and a label, got {line[:80]!r}; after a path that "
        "ends otherwise goes a tab"
    )

"""What lies at --data_path, told apart by its scheme or by looking: KINDS says what there is."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastdino.data.datasets import tars, yfcc, zips
from fastdino.data.datasets.archives import ArchiveIndex, are_numbered
from fastdino.data.datasets.data_path import (
    SPLIT_OPTIONS,
    Found,
    Place,
    common_base,
    number_labels,
    parse,
)
from fastdino.data.datasets.davis_frames import OPTIONS as DAVIS_OPTIONS
from fastdino.data.datasets.davis_frames import find_davis, is_davis
from fastdino.data.datasets.hugging_face import OPTIONS as HUGGING_FACE_OPTIONS
from fastdino.data.datasets.hugging_face import find_hugging_face
from fastdino.data.datasets.torchvision_sets import OPTIONS as TORCHVISION_OPTIONS
from fastdino.data.datasets.torchvision_sets import find_torchvision
from fastdino.data.image_files import EXTENSIONS, read_file, retrying
from fastdino.errors import DataError

EXPECTED = (
    "expected a folder of images (one folder a class, or flat), a folder of .tar or .zip files or "
    "one of them, a pattern such as 'train-{000..146}.tar' or 'train-*.tar', a text file with one "
    "image's path a line, torchvision:NAME or hf:NAME"
)
_INDEX: dict[str, Callable[[str], ArchiveIndex]] = {
    "tar": partial(tars.index_tar, extensions=EXTENSIONS),
    "zip": partial(zips.index_zip, extensions=EXTENSIONS),
}


@dataclass(frozen=True)
class Kind:
    """A kind of data: whether a place is one, what is found there, the options that it takes."""

    name: str
    fits: Callable[[Place], bool]
    find: Callable[[Place], Found]
    options: tuple[str, ...] = ()


def find(path: str, role: str = "") -> Found:
    """What --data_path holds; raises DataError where it is none of what was expected.

    role: of an evaluation's splits which one, "train" or "val"; "" for the data as they are named.
    """
    place = parse(path, SCHEMES, role)
    kind = next(kind for kind in KINDS if kind.fits(place))
    place.check_options(kind.options, kind.name)
    if role and role not in kind.options:
        raise DataError(
            f"--data_path {path} is {kind.name}, which has no splits: expected a folder with "
            "train/ and val/, torchvision:NAME or hf:NAME"
        )
    return kind.find(place)


def _in_folder(place: Place) -> Found:
    """A folder, or with an option `split` the one of that name in it."""
    root = place.path
    split = place.asked_split() or place.role
    if split:
        root = os.path.join(root, split)
        if not os.path.isdir(root):
            beside = [e.name for e in _listed(place.path) if _is_dir(e)]
            raise DataError(
                f"--data_path: there is no folder {root}; {place.path} has the folders "
                f"{', '.join(beside[:20]) or '(none)'}"
            )
    metadata = place.options.get("metadata") or yfcc.find_metadata(root)
    found = _of_folder(root)
    return found if metadata is None else _of_photos(found, metadata)


def _listed(root: str) -> list[os.DirEntry[str]]:
    try:
        return retrying(lambda: sorted(os.scandir(root), key=lambda entry: entry.name))
    except OSError as error:
        raise DataError(f"--data_path: the folder {root} cannot be read: {error}") from error


def _of_folder(root: str) -> Found:
    listed = _listed(root)
    folders = [entry.name for entry in listed if _is_dir(entry)]
    files = [entry.name for entry in listed if not _is_dir(entry)]
    loose = [name for name in files if name.lower().endswith(EXTENSIONS)]
    archives = [name for name in files if name.lower().endswith((".tar", ".zip"))]
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
            f"{root} holds {len(loose)} images and {len(archives)} {_plural(archives)}: which are "
            "meant? Move the others away"
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
        return _of_archives(root, archives)
    tars.raise_if_compressed([os.path.join(root, name) for name in files])
    raise DataError(
        f"no images in {root}: neither there nor in folders below it is a file that "
        f"ends in {', '.join(EXTENSIONS)}, nor is there a .tar or .zip"
    )


def _of_archives(base: str, files: list[str], *, numbered: bool = False) -> Found:
    """Archives of one kind."""
    kinds = {_archive(os.path.join(base, file)) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{base} holds tars and zips: which are meant? Move the others away")
    (kind,) = kinds
    numbered = numbered or are_numbered(files)
    return Found(f"{kind}s", base, files, archive=kind, index=_INDEX[kind], numbered=numbered)


def _archive(path: str) -> str:
    """The kind of archive that a file is, "" where it is none.

    Raises: OSError: it cannot be read. DataError: it is a compressed tar.
    """
    return "tar" if tars.is_tar(path) else "zip" if zips.is_zip(path) else ""


def _plural(archives: Sequence[str]) -> str:
    kinds = {name.lower()[-3:] for name in archives}
    return "archives" if len(kinds) > 1 else f"{kinds.pop()}s"


def _of_photos(found: Found, metadata: str) -> Found:
    """Of what was found the photos that the metadata of YFCC100M names; they have no classes."""
    photos = yfcc.read_metadata(metadata)
    found.photos, found.selection = photos, photos.selection()
    found.notes.append(
        f"{photos.source} names {photos.number} photos"
        + (f" (and {photos.videos} videos, which are passed over)" if photos.videos else "")
    )
    found.kind, found.numbered = f"YFCC100M, {found.kind}", True
    if found.labels is not None:
        found.files = [found.files[i] for i in photos.among(found.files).tolist()]
        found.labels, found.classes = [0] * len(found.files), [Path(found.base).resolve().name]
        if not found.files:
            raise DataError(
                f"none of the {photos.number} photos of {metadata} is in {found.base}: files are "
                "called by a photo's number or by its key"
            )
    return found


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


def _is_list(place: Place) -> bool:
    return os.path.exists(place.path)


def _is_archive(place: Place) -> bool:
    if not os.path.exists(place.path):
        return False
    try:
        return bool(_archive(place.path))
    except OSError as error:
        raise DataError(f"--data_path: {place.path} cannot be read: {error}") from error


def _one_archive(place: Place) -> Found:
    found = _of_archives(os.path.dirname(place.path), [os.path.basename(place.path)])
    return _with_metadata(found, place)


def _with_metadata(found: Found, place: Place) -> Found:
    metadata = place.options.get("metadata")
    return found if metadata is None else _of_photos(found, metadata)


def _by_pattern(place: Place) -> Found:
    """Archives by a pattern of the shell's kind, with {000..146} as a range of numbers."""
    pattern = place.path
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
        others = [path for path in paths if os.path.isdir(path) or not _archive(path)]
    except OSError as error:
        raise DataError(
            f"--data_path {pattern}: {error.filename} cannot be read: {error}"
        ) from error
    if others:
        raise DataError(f"--data_path {pattern} must name tars or zips, and {others[0]} is none")
    return _with_metadata(_of_archives(*common_base(paths), numbered=is_range), place)


def _nothing(place: Place) -> Found:
    path = os.path.join(place.path, place.role) if place.role else place.path
    raise DataError(f"--data_path: there is no folder {path}, and no file: {EXPECTED}")


def _in_list(place: Place) -> Found:
    """The images that a text file names: a path a line, and a label where the list has labels."""
    path = place.path
    try:
        text = read_file(path)
    except OSError as error:
        raise DataError(f"--data_path: the list {path} cannot be read: {error}") from error
    if b"\0" in text:
        raise DataError(
            f"--data_path: {path} is neither a text file nor a tar nor a zip: {EXPECTED}"
        )
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


def _of(scheme: str) -> Callable[[Place], bool]:
    return lambda place: place.scheme == scheme


# The first that fits a place is its kind.
KINDS = (
    Kind("torchvision:", _of("torchvision"), find_torchvision, TORCHVISION_OPTIONS),
    Kind("hf:", _of("hf"), find_hugging_face, HUGGING_FACE_OPTIONS),
    Kind("DAVIS", lambda place: is_davis(place.path), find_davis, DAVIS_OPTIONS),
    Kind("a folder", lambda p: os.path.isdir(p.path), _in_folder, (*SPLIT_OPTIONS, "metadata")),
    Kind("an archive", _is_archive, _one_archive, ("metadata",)),
    Kind("a list", _is_list, _in_list),
    Kind("a pattern", lambda p: any(sign in p.path for sign in "*?[{"), _by_pattern, ("metadata",)),
    Kind("nothing", lambda place: True, _nothing, (*SPLIT_OPTIONS, "metadata")),
)
SCHEMES = tuple(kind.name[:-1] for kind in KINDS if kind.name.endswith(":"))

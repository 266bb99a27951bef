"""The files of a dataset before any of them is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastdino.data.manifest import Manifest
from fastdino.errors import DataError

# Name of the class of the unlabelled images in a labelled dataset. Another class may be called so.
UNLABELLED = "unlabelled"


@dataclass
class FileList:
    """The image files of a dataset with their labels, or its archives.

    kind: short description for the log.
    base: folder that `files` are relative to.
    labels: [f] class numbers; None for archives, whose labels are known once they are indexed.
    classes: class names; for archives only if their labels are numbers of known classes.
    labelled: [n] whether each image has a label; None if all have, else the last class is that of
        the images without one. Set with the labels.
    archive: "tar", "zip", "Arrow file"; "" for image files.
    index: returns the manifest of an archive, without headers and stamps.
    selection: identifies which images of the archives `index` returns, for the scan's cache.
    numbered: the archives are shards, so their names are not classes.
    skipped: path -> reason, for files that are not used.
    notes: messages for the log.
    summarize: returns another message, given the names of all images (file or member names).
    """

    kind: str
    base: str
    files: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    labelled: Sequence[bool] | None = None
    archive: str = ""
    index: Callable[[str], Manifest] | None = None
    selection: str = ""
    numbered: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    summarize: Callable[[Sequence[str]], str] | None = None

    def path(self, file: str) -> str:
        """Return the path of one of the files."""
        return os.path.join(self.base, file)


def number_labels(
    labels: Sequence[str], default: str, classes: Sequence[str] = ()
) -> tuple[list[int], list[str], list[bool] | None]:
    """Return the class number of each label, the class names, and `labelled` as in FileList.

    Args:
        labels: class names, or numbers of known classes; "" for an unlabelled image. Names are
            sorted, numerically if all of them are numbers.
        default: the only class if no image has a label.
        classes: known classes. They keep their order, and classes without images are kept too.
    Raises: DataError: a label is not the number of a known class.
    """
    given = set(labels) - {""}
    labelled = None if all(labels) else [bool(label) for label in labels]
    if not given:
        return [0] * len(labels), [default], labelled
    if classes:
        names = list(classes)
        numbers = {str(number): number for number in range(len(names))}
        if unknown := sorted(given - set(numbers)):
            raise DataError(f"label {unknown[0]} is not a number of the {len(names)} classes")
    else:
        numeric = all(name.isascii() and name.isdigit() for name in given)
        names = sorted(given, key=(lambda name: (int(name), name)) if numeric else None)
        numbers = {name: number for number, name in enumerate(names)}
    numbers[""] = len(names)  # last, and apart from a class that is called UNLABELLED
    unlabelled = [] if labelled is None else [UNLABELLED]
    return [numbers[label] for label in labels], names + unlabelled, labelled


def common_base(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the deepest folder that contains all paths, and the paths relative to it."""
    absolute = [os.path.abspath(path) for path in paths]
    base = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return base, [os.path.relpath(path, base) for path in absolute]

"""What --data_path asks for, taken apart; and what was found there, before any file was opened.

One syntax for all kinds of data: [SCHEME:]PATH[?name=value&name=value]. Every kind that comes in
splits takes `split`; the evaluations, which want two, take `train` and `val`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastdino.data.datasets.archives import ArchiveIndex
from fastdino.data.datasets.yfcc import Photos
from fastdino.errors import DataError

SPLIT_OPTIONS = ("split", "train", "val")
UNLABELLED = "unlabelled"
# What the splits that evaluations want are called, the first that there is.
_CALLED = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test", "testing"),
}
_SCHEME = re.compile(r"([A-Za-z]\w*):(.*)", re.DOTALL)
_OPTIONS = re.compile(r"(.+?)\?(\w+=[^&?]*(?:&\w+=[^&?]*)*)", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """--data_path, taken apart.

    text: as it was given. scheme: "" for paths. role: of an evaluation's two splits which one,
    train or val; "" where one is wanted, by the option `split`.
    """

    text: str
    scheme: str
    path: str
    options: dict[str, str] = field(default_factory=dict)
    role: str = ""

    def asked_split(self) -> str | None:
        """The split by the options; None where they do not say."""
        if self.role and "split" in self.options:
            raise DataError(
                f"--data_path {self.text}: two splits are wanted here: name them by ?train=...&"
                "val=... instead of ?split=..."
            )
        return self.options.get(self.role or "split")

    def choose_split(self, splits: Sequence[str], default: str = "train") -> str:
        """The split of those there are: by the options, else by what splits are called.

        Raises: DataError: there is none of that name; the message lists them.
        """
        split = self.asked_split()
        if split is None:
            names = _CALLED.get(self.role, (default,))
            split = next((name for name in names if name in splits), None)
        if split is None and not self.role and len(splits) == 1:
            split = splits[0]
        if split in splits:
            return str(split)
        what = f"no split {split!r}" if split else f"no split to take for {self.role or 'training'}"
        raise DataError(
            f"--data_path {self.text}: there is {what}; its splits are {', '.join(splits)}: name "
            f"one by ?{self.role or 'split'}=..."
        )

    def check_options(self, allowed: Sequence[str], kind: str) -> None:
        """Raises DataError where an option is none of those that such data take."""
        for name in self.options:
            if name not in allowed:
                takes = f"takes {', '.join(allowed)}" if allowed else "takes none"
                raise DataError(
                    f"--data_path {self.text}: {kind} has no option {name!r}; it {takes}"
                )


@dataclass
class Found:
    """Files that hold images, before any of them was opened.

    kind: in a few words. base: what `files` are relative to.
    labels: [f] class numbers, places in classes; None where the files are archives.
    classes: all of them; of archives only where these have labels that are numbers of classes.
    archive: what holds many images, "tar" or the like. index: finds them in one.
    selection: of what is in the files, what is asked for: a scan of anything else is another's.
    numbered: they are shards by their names. skipped: what is passed over, with the reason.
    photos: those that are to be taken, where a list of metadata says so.
    notes: what is to be said about it.
    """

    kind: str
    base: str
    files: list[str]
    labels: list[int] | None = None
    classes: list[str] = field(default_factory=list)
    archive: str = ""
    index: Callable[[str], ArchiveIndex] | None = None
    selection: str = ""
    numbered: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    photos: Photos | None = None
    notes: list[str] = field(default_factory=list)

    def path(self, file: str) -> str:
        return os.path.join(self.base, file)


def parse(text: str, schemes: Sequence[str], role: str = "") -> Place:
    """Takes --data_path apart; a file or folder of that very name is itself, whatever is in it.

    Raises: DataError: an option twice, or a scheme that looks like one of these and is none.
    """
    if os.path.lexists(text):
        return Place(text, "", text, role=role)
    path, options = text, {}
    if found := _OPTIONS.fullmatch(text):
        path = found[1]
        for pair in found[2].split("&"):
            name, _, value = pair.partition("=")
            if name in options or not value:
                wrong = "is given twice" if value else "has no value"
                raise DataError(f"--data_path {text}: the option {name!r} {wrong}")
            options[name] = value
    scheme = _SCHEME.fullmatch(path)
    if scheme is None or os.path.exists(path):
        return Place(text, "", path, options, role)
    if scheme[1] in schemes:
        return Place(text, scheme[1], scheme[2], options, role)
    near = difflib.get_close_matches(scheme[1].lower(), schemes, n=1)
    if near or scheme[2].startswith("//"):
        hint = f"did you mean {near[0]}:{scheme[2]}?" if near else f"known are {', '.join(schemes)}"
        raise DataError(f"--data_path {text}: there are no data of the kind {scheme[1]}:; {hint}")
    return Place(text, "", path, options, role)


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


def known_labels(names: Sequence[str], classes: Sequence[str]) -> tuple[list[int], list[str]]:
    """The same for names that are numbers of known classes; these are all kept, and in their order.

    Raises: DataError: a name that is no such number.
    """
    places = {str(place): place for place in range(len(classes))}
    unknown = sorted({name for name in names if name not in places} - {""})
    if unknown:
        raise DataError(f"the label {unknown[0]} is none of the {len(classes)} classes' numbers")
    if "" not in names:
        return [places[name] for name in names], list(classes)
    return [places.get(name, len(classes)) for name in names], [*classes, UNLABELLED]


def common_base(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all paths lie in, and the paths relative to it."""
    absolute = [os.path.abspath(path) for path in paths]
    base = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return base, [os.path.relpath(path, base) for path in absolute]

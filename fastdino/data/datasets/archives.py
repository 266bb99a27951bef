"""What files that hold many images have in common: an index of where each image lies, its label.

tars.py, zips.py and hugging_face.py make such an index, each of its own kind of file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fastdino.data.image_files import Part

LARGEST_LABEL = 1 << 20  # bytes
_LABEL_KEYS = ("label", "cls", "class")
_SUFFIX = re.compile(r"\.(tar|zip)$", re.IGNORECASE)


@dataclass
class ArchiveIndex:
    """The images of an archive, in its order.

    members: names, of tars within it "TAR/MEMBER". parts: where each lies in the file.
    labels: what a .cls or .json of the same key says; "" where none does.
    reasons: image -> why it cannot be used. note: what is wrong with the archive, or "".
    """

    members: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    note: str = ""

    def taken(self, kept: Sequence[int]) -> ArchiveIndex:
        """These images of it alone."""
        places = {old: new for new, old in enumerate(kept)}
        return ArchiveIndex(
            members=[self.members[i] for i in kept],
            parts=[self.parts[i] for i in kept],
            labels=[self.labels[i] for i in kept] if self.labels else [],
            reasons={places[i]: reason for i, reason in self.reasons.items() if i in places},
            note=self.note,
        )


class Collector:
    """Makes the index of an archive of files from its members, one after the other.

    extensions: which members are images, by the ends of their names, in small letters.
    """

    def __init__(self, extensions: Sequence[str]) -> None:
        self._extensions = tuple(extensions)
        self.found = ArchiveIndex()
        self._labels: dict[str, str] = {}
        self._keys: set[str] = set()  # of what is no image

    def is_image(self, name: str) -> bool:
        return name.lower().endswith(self._extensions)

    def add(self, name: str, part: Part, reason: str = "") -> None:
        """An image; or something of no use, with the reason."""
        if reason:
            self.found.reasons[len(self.found.members)] = reason
        self.found.members.append(name)
        self.found.parts.append(part)

    def add_other(self, name: str, size: int, read: Callable[[], bytes]) -> None:
        """A member that is no image, of `size` bytes: it may say what one beside it shows."""
        key, _ = _key(name)
        self._keys.add(key)
        lower = name.lower()
        if lower.endswith((".cls", ".json")) and size <= LARGEST_LABEL:
            label = _label(read(), lower.endswith(".json"))
            if label:
                self._labels[key] = label

    def finish(self) -> ArchiveIndex:
        """The index; of a sample KEY.jpg, KEY.mask.png, KEY.cls the mask is no other image."""
        split = [_key(name) for name in self.found.members]
        samples = self._keys & {key for key, extension in split if "." not in extension}
        kept = [i for i, (key, ext) in enumerate(split) if "." not in ext or key not in samples]
        if len(kept) < len(split):
            self.found = self.found.taken(kept)
        self.found.labels = [self._labels.get(_key(name)[0], "") for name in self.found.members]
        return self.found


def is_hidden(name: str) -> bool:
    """Whether a member is one of macOS's notes on a file."""
    return PurePosixPath(name).name.startswith("._") or name.startswith("__MACOSX/")


def are_numbered(names: Sequence[str]) -> bool:
    """Whether names are those of shards: two or more, alike but for consecutive numbers."""
    found = [re.fullmatch(r"(.*?)(\d+)", stem(name)) for name in names]
    prefixes = {match[1] if match else None for match in found}
    if len(names) < 2 or len(prefixes) > 1 or None in prefixes:
        return False
    numbers = sorted(int(match[2]) for match in found if match)
    return numbers == list(range(numbers[0], numbers[0] + len(names)))


def stem(name: str) -> str:
    """An archive's name without folder and suffix."""
    return _SUFFIX.sub("", PurePosixPath(name).name)


def class_names(files: Sequence[str], counts: Sequence[int], members: Sequence[str]) -> list[str]:
    """The class of each image by where it lies: its archive's name, or its folder in an only one.

    Args:
        files, counts: the archives, and how many images each holds.
        members: all images, in the files' order.
    """
    if len(files) > 1:
        return [stem(file) for file, n in zip(files, counts, strict=True) for _ in range(n)]
    folders = [name.split("/")[:-1] for name in members]
    # An archive of one folder is that of what the folder holds.
    while folders and all(len(f) > 1 for f in folders) and len({f[0] for f in folders}) == 1:
        folders = [folder[1:] for folder in folders]
    return [stem(folder[0]) if folder else stem(files[0]) for folder in folders]


def _key(name: str) -> tuple[str, str]:
    """What the members of a sample share, and what tells them apart, as webdataset splits names."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension


def _label(content: bytes, is_json: bool) -> str:
    """The class that a .cls or a .json names; "" where it names none."""
    text = content.decode("utf-8", "replace").strip()
    if is_json:
        try:
            value = json.loads(text)
        except ValueError:
            return ""
        if isinstance(value, dict):
            value = next((value[key] for key in _LABEL_KEYS if key in value), None)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            return ""
        text = str(value)
    return text.replace("\0", "")

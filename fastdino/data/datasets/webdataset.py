"""Images and labels of an archive by webdataset's naming: KEY.jpg, KEY.cls, KEY.json."""

from __future__ import annotations

import json
from collections.abc import Callable

from fastdino.data.image_files import Part
from fastdino.data.manifest import Manifest, unread_manifest

_LARGEST_LABEL = 1 << 20  # bytes of a member that may hold a label
_LONGEST_LABEL = 1000  # characters; longer text is no class name
_LARGEST_NUMBER = 1 << 62
_LABEL_KEYS = ("label", "cls", "class")


class MemberCollector:
    """A builder of an archive's manifest, to which members are added one by one."""

    def __init__(self) -> None:
        self.members: list[str] = []
        self.reasons: dict[int, str] = {}
        self._parts: list[Part] = []
        self._labels: dict[str, str] = {}  # key -> label
        self._other_keys: set[str] = set()  # keys of members that are not images

    def add_image(self, name: str, part: Part, reason: str = "") -> None:
        """Add an image, or with a reason a member that cannot be used."""
        if reason:
            self.reasons[len(self.members)] = reason
        self.members.append(name)
        # Headers can claim more than fits into the manifest, for members that have a reason.
        self._parts.append(Part(*(min(value, _LARGEST_NUMBER) for value in part)))

    def add_other(self, name: str, size: int, read: Callable[[], bytes]) -> None:
        """Add a member of `size` bytes that is not an image; a .cls or .json holds a label."""
        key, _ = _split_name(name)
        self._other_keys.add(key)
        lower = name.lower()
        if lower.endswith((".cls", ".json")) and size <= _LARGEST_LABEL:
            label = _parse_label(read(), lower.endswith(".json"))
            if label:
                self._labels[key] = label

    def manifest(self, path: str, note: str = "") -> Manifest:
        """Return the manifest.

        In a sample KEY.jpg, KEY.mask.png, KEY.cls the mask is not a separate image: of a key with
        other members, only images whose extension has no dot count.
        """
        names = [_split_name(name) for name in self.members]
        samples = self._other_keys & {key for key, extension in names if "." not in extension}
        kept = [i for i, (key, ext) in enumerate(names) if "." not in ext or key not in samples]
        return unread_manifest(
            [path],
            [self.members[i] for i in kept],
            [self._parts[i] for i in kept],
            [self._labels.get(names[i][0], "") for i in kept],
            {new: self.reasons[old] for new, old in enumerate(kept) if old in self.reasons},
            note,
        )


def _split_name(name: str) -> tuple[str, str]:
    """Split a name at the first dot after its folder into key and extension."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension


def _parse_label(content: bytes, is_json: bool) -> str:
    """Return the label in a .cls or .json member; "" if it has none."""
    text = content.decode("utf-8", "replace").strip()
    if is_json:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        if isinstance(value, dict):
            value = next((value[key] for key in _LABEL_KEYS if key in value), None)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            return ""
        text = str(value)
    return "" if len(text) > _LONGEST_LABEL else text.replace("\0", "")

"""Images in tars: where each lies, so that any one can be read on its own, and which tars to read.

A tar is indexed by its headers alone, once; nothing is unpacked. Tars within tars (as ImageNet's
training set comes) are gone into.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from fastdino.data.reading import Window, retrying
from fastdino.errors import DataError

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"(\xb5/\xfd": ("zstd", "unzstd"),
}
_COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LARGEST_LABEL = 1 << 20  # bytes
_LABEL_KEYS = ("label", "cls", "class")


@dataclass
class TarIndex:
    """The images of a tar, in its order.

    members: names, of tars within it "TAR/MEMBER". parts: (offset, length) in the file.
    labels: what a .cls or .json of the same key says; "" where none does.
    reasons: image -> why it cannot be used. note: what is wrong with the tar; "" where nothing is.
    """

    members: list[str] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    note: str = ""


def is_tar(path: str) -> bool:
    """Whether the file is a tar by its name or first header; DataError where it is compressed."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(tarfile.BLOCKSIZE)

    start = retrying(read)
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"--data_path: {path} is compressed ({name}), and images cannot be read from its "
                f"middle: `{command} {path}` makes a tar that can (images hardly shrink anyway)"
            )
    return start[257:262] == b"ustar" or path.lower().endswith(".tar")


def raise_if_compressed(names: Sequence[str]) -> None:
    """Raises DataError where one of the files is a compressed tar by its name."""
    for name in names:
        if _COMPRESSED_NAME.search(name):
            raise DataError(
                f"--data_path: {name} is a compressed tar, and images cannot be read from its "
                "middle: unpack it to a plain .tar (gunzip, bunzip2, unxz, unzstd), or to a folder"
            )


def expand(pattern: str) -> list[str]:
    """`a-{000..002}.tar` as its names, in order.

    Raises: DataError: a range that runs backwards.
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(first) > int(last):
        raise DataError(f"--data_path {pattern}: the range {found[0]} runs backwards")
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for number in numbers for name in expand(before + number + after)]


def are_numbered(names: Sequence[str]) -> bool:
    """Whether names are those of shards: two or more, alike but for consecutive numbers."""
    found = [re.fullmatch(r"(.*?)(\d+)", _stem(name)) for name in names]
    prefixes = {match[1] if match else None for match in found}
    if len(names) < 2 or len(prefixes) > 1 or None in prefixes:
        return False
    numbers = sorted(int(match[2]) for match in found if match)
    return numbers == list(range(numbers[0], numbers[0] + len(names)))


def _stem(name: str) -> str:
    return PurePosixPath(name).name.removesuffix(".tar")


def class_names(tars: Sequence[str], counts: Sequence[int], members: Sequence[str]) -> list[str]:
    """The class of each image by where it lies: its tar's name, or its folder in an only tar.

    Args:
        tars, counts: the files, and how many images each holds.
        members: all images, in the files' order.
    """
    if len(tars) > 1:
        return [_stem(tar) for tar, n in zip(tars, counts, strict=True) for _ in range(n)]
    folders = [name.split("/")[:-1] for name in members]
    # A tar of one folder is that of what the folder holds.
    while folders and all(len(f) > 1 for f in folders) and len({f[0] for f in folders}) == 1:
        folders = [folder[1:] for folder in folders]
    return [_stem(folder[0]) if folder else _stem(tars[0]) for folder in folders]


def index_tar(path: str, extensions: Sequence[str]) -> TarIndex:
    """Reads all headers of a tar, and the small members that hold labels.

    A tar that ends early is indexed as far as it goes; `note` says so, and an image that is cut off
    has its reason.

    Args:
        extensions: which members are images, by the ends of their names, in small letters.
    Raises: DataError: it is no tar. OSError: it cannot be read.
    """

    def read() -> TarIndex:
        with open(path, "rb") as file:
            return _Indexer(file, extensions).index(path)

    return retrying(read)


class _Indexer:
    def __init__(self, file: BinaryIO, extensions: Sequence[str]) -> None:
        self._file, self._extensions = file, tuple(extensions)
        self._found = TarIndex()
        self._labels: dict[str, str] = {}
        self._keys: set[str] = set()  # of what is no image

    def index(self, path: str) -> TarIndex:
        length = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        found = self._found
        if length == 0:
            found.note = "is empty (0 bytes)"
            return found
        try:
            whole = self._walk(self._file, 0, length, "")
        except tarfile.ReadError as error:
            raise DataError(
                f"--data_path: {path} is no tar ({error}): copy it again, or move it away"
            ) from error
        if not whole:
            images = len(found.members) - len(found.reasons)
            found.note = f"ends early or is damaged: the {images} images before that are used"
        elif not found.members:
            found.note = "holds no images"
        self._drop_companions()
        found.labels = [self._labels.get(_key(name)[0], "") for name in found.members]
        return found

    def _walk(self, file: BinaryIO, start: int, length: int, folder: str) -> bool:
        """Goes through the tar that begins at `start` of the whole; False where it ends early."""
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError:
                    return False
                if member is None:
                    break
                tar.members.clear()  # type: ignore[attr-defined]  # else all stay in memory
                self._take(tar, member, start, length, folder)
            file.seek(tar.offset)
            # Two blocks of zeros end a tar; tarfile takes any garbage for its end.
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)

    def _take(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, start: int, length: int, folder: str
    ) -> None:
        name = folder + member.name.removeprefix("./")
        lower = name.lower()
        offset, size = member.offset_data, member.size
        whole = offset + size <= length
        if PurePosixPath(name).name.startswith("._"):  # macOS's notes on a file
            return
        if lower.endswith(self._extensions):
            reason = ""
            if not member.isreg() or member.issparse():
                reason = "is a link or a sparse member of the tar, which is not followed"
            elif not whole:
                reason = "is cut off: the tar ends within it"
            self._add(name, start + offset, size, reason)
        elif not member.isreg():
            return
        elif lower.endswith(".tar"):
            self._go_into(name, start + offset, min(size, length - offset))
        else:
            key = _key(name)[0]
            self._keys.add(key)
            if lower.endswith((".cls", ".json")) and whole and size <= _LARGEST_LABEL:
                content = tar.extractfile(member)
                label = _label(content.read() if content else b"", lower.endswith(".json"))
                if label:
                    self._labels[key] = label

    def _go_into(self, name: str, start: int, length: int) -> None:
        with io.BufferedReader(Window(self._file.fileno(), start, length)) as inner:
            try:
                whole = self._walk(inner, start, length, f"{name}/")
            except tarfile.ReadError as error:
                self._add(name, start, length, f"is no tar: {error}")
                return
        if not whole:
            self._add(name, start, length, "ends early or is damaged")

    def _add(self, name: str, offset: int, length: int, reason: str) -> None:
        if reason:
            self._found.reasons[len(self._found.members)] = reason
        self._found.members.append(name)
        self._found.parts.append((offset, length))

    def _drop_companions(self) -> None:
        """Of a sample KEY.jpg, KEY.mask.png, KEY.cls or the like, the mask is no other image."""
        found = self._found
        split = [_key(name) for name in found.members]
        samples = self._keys & {key for key, extension in split if "." not in extension}
        kept = [i for i, (key, ext) in enumerate(split) if "." not in ext or key not in samples]
        if len(kept) < len(split):
            places = {old: new for new, old in enumerate(kept)}
            found.reasons = {places[i]: r for i, r in found.reasons.items() if i in places}
            found.members = [found.members[i] for i in kept]
            found.parts = [found.parts[i] for i in kept]


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

"""Images in tars: where each lies, so that any one can be read on its own, and which tars to read.

A tar is indexed by its headers alone, once; nothing is unpacked. Tars within tars (as ImageNet's
training set comes) are gone into.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Sequence
from typing import BinaryIO

from fastdino.data.datasets.archives import ArchiveIndex, Collector, is_hidden
from fastdino.data.image_files import Part, Window, retrying
from fastdino.errors import DataError

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"(\xb5/\xfd": ("zstd", "unzstd"),
}
_COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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


def index_tar(path: str, extensions: Sequence[str]) -> ArchiveIndex:
    """Reads all headers of a tar, and the small members that hold labels.

    A tar that ends early is indexed as far as it goes; `note` says so, and an image that is cut off
    has its reason.

    Args:
        extensions: which members are images, by the ends of their names, in small letters.
    Raises: DataError: it is no tar. OSError: it cannot be read.
    """

    def read() -> ArchiveIndex:
        with open(path, "rb") as file:
            return _Indexer(file, extensions).index(path)

    return retrying(read)


class _Indexer:
    def __init__(self, file: BinaryIO, extensions: Sequence[str]) -> None:
        self._file, self._members = file, Collector(extensions)

    def index(self, path: str) -> ArchiveIndex:
        length = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if length == 0:
            return ArchiveIndex(note="is empty (0 bytes)")
        try:
            whole = self._walk(self._file, 0, length, "")
        except tarfile.ReadError as error:
            raise DataError(
                f"--data_path: {path} is no tar ({error}): copy it again, or move it away"
            ) from error
        found = self._members.found
        if not whole:
            images = len(found.members) - len(found.reasons)
            found.note = f"ends early or is damaged: the {images} images before that are used"
        elif not found.members:
            found.note = "holds no images"
        return self._members.finish()

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
        offset, size = member.offset_data, member.size
        whole = offset + size <= length
        if is_hidden(name):
            return
        if self._members.is_image(name):
            reason = ""
            if not member.isreg() or member.issparse():
                reason = "is a link or a sparse member of the tar, which is not followed"
            elif not whole:
                reason = "is cut off: the tar ends within it"
            self._members.add(name, Part(start + offset, size), reason)
        elif not member.isreg():
            return
        elif name.lower().endswith(".tar"):
            self._go_into(name, start + offset, min(size, length - offset))
        else:
            content = tar.extractfile(member) if whole else None
            self._members.add_other(name, size, content.read if content else bytes)

    def _go_into(self, name: str, start: int, length: int) -> None:
        with io.BufferedReader(Window(self._file.fileno(), start, length)) as inner:
            try:
                whole = self._walk(inner, start, length, f"{name}/")
            except tarfile.ReadError as error:
                self._members.add(name, Part(start, length), f"is no tar: {error}")
                return
        if not whole:
            self._members.add(name, Part(start, length), "ends early or is damaged")

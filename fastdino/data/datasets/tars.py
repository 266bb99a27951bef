"""Random access to the images of a tar, from an index of its headers. Nothing is unpacked.

Tars within tars, as in ImageNet's ILSVRC2012_img_train.tar, are indexed too.
"""

from __future__ import annotations

import os
import tarfile
from typing import IO

from PIL.ContainerIO import ContainerIO

from fastdino.data.datasets.webdataset import MemberCollector
from fastdino.data.image_files import Part, open_file, read_file, retrying
from fastdino.data.image_names import is_image_name, is_leftover
from fastdino.data.manifest import Manifest, unread_manifest
from fastdino.errors import DataError

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"(\xb5/\xfd": ("zstd", "unzstd"),
}
# Endings of compressed archives, also without .tar.
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")

LEVELS = 4  # tars within tars that are indexed
_LARGEST_HEADER = 1 << 20  # bytes of a long name or of extended attributes, read at once
_LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
# What tarfile raises for damaged or crafted headers; each long header is read by a recursive call.
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class _Member(tarfile.TarInfo):
    """A member whose header cannot claim any size."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _LONG_HEADERS and self.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def is_tar(path: str) -> bool:
    """Return whether a file is a tar, by its name or first header.

    Raises: DataError: the file is compressed. OSError: it cannot be read.
    """
    start = read_file(path, length=tarfile.BLOCKSIZE)
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"--data_path: {path} is compressed ({name}), which does not allow random access: "
                f"run `{command} {path}` first (images hardly shrink anyway)"
            )
    return start[257:262] == b"ustar" or path.lower().endswith(".tar")


@retrying
def index_tar(path: str) -> Manifest:
    """Read all headers of a tar, and the small members that hold labels.

    A truncated tar is indexed up to its end, with a note. An image that is cut off has a reason.

    Raises: DataError: the file is not a tar. OSError: it cannot be read.
    """
    with open_file(path) as file:
        return _TarIndexer(file).index(path)


class _TarIndexer:
    """A collector of the members of a tar and of the tars in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._collector = file, MemberCollector()
        self._level = 0  # of tars within tars

    def index(self, path: str) -> Manifest:
        length = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if length == 0:
            return unread_manifest([path], [], note="is empty (0 bytes)")
        try:
            is_whole = self._walk(self._file, 0, length, "")
        except _DAMAGED as error:
            raise DataError(
                f"--data_path: {path} is not a tar ({error}): copy it again, or move it away"
            ) from error
        note, members = "", self._collector.members
        if not is_whole:
            images = len(members) - len(self._collector.reasons)
            note = f"is truncated or damaged: only the {images} images before that are used"
        elif not members:
            note = "contains no images"
        return self._collector.manifest(path, note)

    def _walk(self, file: IO[bytes], start: int, length: int, folder: str) -> bool:
        """Add the members of the tar at offset `start`; return False if it is truncated."""
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member, encoding="utf-8") as tar:
            try:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else all stay in memory
                    self._add(tar, member, start, length, folder)
                file.seek(tar.offset)
                # A tar ends with two blocks of zeros, but tarfile accepts any garbage as its end.
                return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            except _DAMAGED:
                return False

    def _add(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, start: int, length: int, folder: str
    ) -> None:
        name = folder + member.name.removeprefix("./")
        offset, size = member.offset_data, member.size
        is_whole = offset + size <= length
        if is_leftover(name):
            return
        if is_image_name(name):
            reason = ""
            if not member.isreg() or member.issparse():
                reason = "is a link or a sparse member of the tar, which is not supported"
            elif not is_whole:
                reason = "is cut off: the tar ends within it"
            self._collector.add_image(name, Part(start + offset, size), reason)
        elif not member.isreg():
            return
        elif name.lower().endswith(".tar"):
            part = Part(start + offset, max(0, min(size, length - offset)))
            self._add_tar(name, part)
        else:
            content = tar.extractfile(member) if is_whole else None
            self._collector.add_other(name, size, content.read if content else bytes)

    def _add_tar(self, name: str, part: Part) -> None:
        inner = ContainerIO(self._file, part.offset, part.length)
        self._level += 1
        try:
            if self._level > LEVELS:
                reason = f"is a tar within {LEVELS} tars, which is not supported"
            elif self._walk(inner, part.offset, part.length, f"{name}/"):
                reason = ""
            else:
                reason = "is truncated or damaged"
        except _DAMAGED as error:
            reason = f"is not a tar: {error}"
        finally:
            self._level -= 1
        if reason:
            self._collector.add_image(name, part, reason)

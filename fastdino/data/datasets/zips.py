"""Images in zips: where each lies, so that any one can be read on its own.

The list at a zip's end is read, once; nothing is unpacked. A member that is stored lies in the file
as it is, one that is deflated is inflated when it is read.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import BinaryIO

from fastdino.data.datasets.archives import ArchiveIndex, Collector, is_hidden
from fastdino.data.image_files import Part, retrying
from fastdino.errors import DataError

_ENCRYPTED = 1  # a bit of a member's flags
_LOCAL = struct.Struct("<4s22xHH")  # of a member's own header: signature, lengths that follow it
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}


def is_zip(path: str) -> bool:
    """Whether the file is a zip by its name or first bytes; raises OSError."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(4)

    return retrying(read) in (b"PK\3\4", b"PK\5\6") or path.lower().endswith(".zip")


def index_zip(path: str, extensions: Sequence[str]) -> ArchiveIndex:
    """Reads the list of what a zip (ZIP64 too) holds, and the small members that hold labels.

    A member that is encrypted, cut off, or compressed by anything but Deflate has its reason.

    Args:
        extensions: which members are images, by the ends of their names, in small letters.
    Raises: DataError: it is no zip, or its end is not there. OSError: it cannot be read.
    """

    def read() -> ArchiveIndex:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return ArchiveIndex(note="is empty (0 bytes)")
            try:
                return _index(file, extensions)
            except zipfile.BadZipFile as error:
                raise DataError(
                    f"--data_path: {path} is no zip, or not all of one ({error}): the list of what "
                    "a zip holds is at its end. Copy it again, or move it away"
                ) from error

    return retrying(read)


def _index(file: BinaryIO, extensions: Sequence[str]) -> ArchiveIndex:
    members = Collector(extensions)
    length = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir() or is_hidden(member.filename):
                continue
            if members.is_image(member.filename):
                members.add(member.filename, *_part(file, member, length))
            else:
                content = _Content(archive, member)
                members.add_other(member.filename, member.file_size, content.read)
    if not members.found.members:
        members.found.note = "holds no images"
    return members.finish()


def _part(file: BinaryIO, member: zipfile.ZipInfo, length: int) -> tuple[Part, str]:
    """Where the bytes of a member lie, and why they are of no use; "" where they are."""
    nowhere = Part(member.header_offset, 0)
    if member.flag_bits & _ENCRYPTED:
        return nowhere, "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        name = _METHODS.get(member.compress_type, f"method {member.compress_type}")
        return nowhere, f"is compressed by {name}: of zips, Stored and Deflate can be read"
    wrong = "is not where the zip's list says: the zip is damaged"
    if member.header_offset < 0:  # what comes first in the file is missing
        return Part(0, 0), wrong
    # The list does not say how long the header before the bytes is.
    header = os.pread(file.fileno(), _LOCAL.size, member.header_offset)
    if len(header) < _LOCAL.size:
        return nowhere, "is cut off: the zip ends within it"
    signature, name_length, extra_length = _LOCAL.unpack(header)
    if signature != b"PK\3\4":
        return nowhere, wrong
    start = member.header_offset + _LOCAL.size + name_length + extra_length
    if start + member.compress_size > length:
        return nowhere, "is cut off: the zip ends within it"
    deflated = member.compress_type == zipfile.ZIP_DEFLATED and member.file_size
    stored = member.compress_size if deflated else member.file_size
    return Part(start, stored, member.file_size if deflated else 0), ""


class _Content:
    """What a small member holds; b"" where it cannot be read."""

    def __init__(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        self._archive, self._member = archive, member

    def read(self) -> bytes:
        try:
            return self._archive.read(self._member)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError):
            return b""  # damaged, encrypted, compressed in another way: no label then

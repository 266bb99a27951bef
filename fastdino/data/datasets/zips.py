"""Random access to the images of a zip, from its central directory. Nothing is unpacked."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from functools import partial
from typing import IO

from fastdino.data.datasets.webdataset import MemberCollector
from fastdino.data.image_files import Part, open_file, read_file, retrying
from fastdino.data.image_names import is_image_name, is_leftover
from fastdino.data.manifest import Manifest, unread_manifest
from fastdino.errors import DataError

_ENCRYPTED = 1  # bit of a member's flags
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and the extra field
_SUPPORTED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}

# What zipfile raises for damaged or crafted directories.
_DAMAGED = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error)


def is_zip(path: str) -> bool:
    """Return whether a file is a zip, by its name or first bytes; raise OSError on failure."""
    return read_file(path, length=4) in (b"PK\3\4", b"PK\5\6") or path.lower().endswith(".zip")


@retrying
def index_zip(path: str) -> Manifest:
    """Read the central directory of a zip (also ZIP64), and the small members that hold labels.

    A member that is encrypted, cut off, or compressed with anything but Deflate has a reason.

    Raises: DataError: the file is not a zip, or is truncated. OSError: it cannot be read.
    """
    length = os.stat(path).st_size
    if length == 0:
        return unread_manifest([path], [], note="is empty (0 bytes)")
    collector = MemberCollector()
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            images: list[tuple[str, Part, str]] = []
            for member in archive.infolist():
                name = member.filename
                if not name or member.is_dir() or is_leftover(name):
                    continue
                if is_image_name(name):
                    images.append((name, *_locate(file, member, length)))
                elif member.compress_type in _SUPPORTED:
                    collector.add_other(name, member.file_size, partial(_read, archive, member))
            for image in _without_overlaps(images):
                collector.add_image(*image)
    except _DAMAGED as error:
        raise DataError(
            f"--data_path: {path} is not a complete zip ({error}); its directory is at its end. "
            "Copy it again, or move it away"
        ) from error
    return collector.manifest(path, "" if collector.members else "contains no images")


def _locate(file: IO[bytes], member: zipfile.ZipInfo, length: int) -> tuple[Part, str]:
    """Return the bytes of a member, and why they cannot be used ("" if they can)."""
    nowhere = Part(max(0, member.header_offset), 0)
    if member.flag_bits & _ENCRYPTED:
        return nowhere, "is encrypted"
    if member.compress_type not in _SUPPORTED:
        name = _METHODS.get(member.compress_type, f"method {member.compress_type}")
        return nowhere, f"is compressed with {name}; supported are Stored and Deflate"
    header = b""
    if member.header_offset >= 0:  # else the beginning of the file is missing
        # The directory does not store the length of the local header.
        header = os.pread(file.fileno(), _LOCAL_HEADER.size, member.header_offset)
    signature, *lengths = _LOCAL_HEADER.unpack(header.ljust(_LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        return nowhere, "is not at the offset in the zip's directory: the zip is damaged"
    start = member.header_offset + _LOCAL_HEADER.size + sum(lengths)
    if start + member.compress_size > length:
        return nowhere, "is cut off: the zip ends within it"
    if member.compress_type == zipfile.ZIP_DEFLATED and member.file_size:
        return Part(start, member.compress_size, member.file_size), ""
    return Part(start, member.file_size), ""


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Return the content of a small member; b"" if it is damaged, encrypted or not supported."""
    try:
        return archive.read(member)
    except (*_DAMAGED, zlib.error, RuntimeError, EOFError):
        return b""


def _without_overlaps(images: list[tuple[str, Part, str]]) -> list[tuple[str, Part, str]]:
    """Give members a reason if their bytes are those of another one.

    Otherwise a small file could hold any number of large images, which all must be inflated.
    """
    checked, end = list(images), 0
    for i in sorted(range(len(images)), key=lambda i: images[i][1].offset):
        name, part, reason = images[i]
        if not reason and part.offset < end:
            checked[i] = name, part, "overlaps another member: the zip is damaged"
        elif not reason:
            end = part.offset + part.length
    return checked

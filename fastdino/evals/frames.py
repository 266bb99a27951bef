"""Video frames that are image files in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fastdino.data.image_files import EXTENSIONS, Header, quiet_pillow, read_header
from fastdino.errors import DataError


def frame_files(folder: Path) -> list[Path]:
    """List the images of a folder in the numeric order of their names (2.png before 10.png)."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    return sorted(files, key=lambda path: _numeric_order(path.name))


def _numeric_order(name: str) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def common_size(files: Iterable[Path]) -> tuple[int, int]:
    """Return the height and width in pixels that all images have, read from their headers.

    Raises: DataError: a header cannot be read, or a size differs from the first.
    """
    first: tuple[Path, tuple[int, int]] | None = None
    for path in files:
        with quiet_pillow():
            header = read_header(str(path))
        if not isinstance(header, Header):
            raise DataError(f"{path} {header.reason}")
        size = header.height, header.width
        first = first or (path, size)
        if size != first[1]:
            raise DataError(
                f"{path} is {size[0]} x {size[1]} px, but {first[0]} is "
                f"{first[1][0]} x {first[1][1]} px: resize frames and annotations to one size"
            )
    assert first is not None
    return first[1]

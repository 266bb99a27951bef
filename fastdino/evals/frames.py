"""Video frames that are image files in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastdino.data.image_files import Header, quiet_pillow, read_header
from fastdino.errors import DataError


def common_size(files: Iterable[Path]) -> tuple[int, int]:
    """Return the height and width in pixels that all images have, read from their headers.

    Raises: DataError: a header cannot be read, or a size differs from the first.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for path in files:
        with quiet_pillow():
            header = read_header(str(path))
        if not isinstance(header, Header):
            raise DataError(f"{path} {header.reason}")
        sizes.setdefault((header.height, header.width), path)
        if len(sizes) > 1:
            (height, width), first = next(iter(sizes.items()))
            raise DataError(
                f"{path} is {header.height} x {header.width} px, but {first} is "
                f"{height} x {width} px: resize frames and annotations to one size"
            )
    return next(iter(sizes))

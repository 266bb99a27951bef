"""Video frames that are image files in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastdino.data.image_files import AS_STORED, Conversion, Header
from fastdino.errors import DataError


def common_size(
    headers: Mapping[Path, Header], conversion: Conversion = AS_STORED
) -> tuple[int, int]:
    """Return the height and width in pixels that all images have.

    Raises: DataError: a size differs from the first.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for path, header in headers.items():
        sizes.setdefault(conversion.size_of(header), path)
        if len(sizes) > 1:
            (first_size, first), (size, _) = sizes.items()
            raise DataError(
                f"{path} is {size[0]} x {size[1]} px, but {first} is "
                f"{first_size[0]} x {first_size[1]} px: resize frames and annotations to one size"
            )
    return next(iter(sizes))

"""Image files as pictures on the grid of patches, for the commands that draw."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from fastdino.data import scan_images
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import count_deep, quiet_pillow, read_header, reason_of
from fastdino.data.manifest import unread_manifest
from fastdino.errors import CheckpointError, DataError
from fastdino.evals.attention_maps import fit_to_patches
from fastdino.files import explain_write_errors

# Errors of one output's name, which do not concern the others.
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EILSEQ)


class SkippedImageError(Exception):
    """An image cannot be drawn, but others may be; the message continues a sentence."""


def find_images(path: str, flag: str = "--image_path") -> tuple[ImageDataset, list[str]]:
    """List an image file, or the images that pretraining finds in a folder.

    Returns: the images, and a name for the output of each: its path in the folder without suffix,
        or with it if two have the same; "" for a file.

    Raises: DataError: the path does not exist, or has no image.
    """
    if os.path.isfile(path):
        sizes, labels = np.zeros((1, 2), np.int32), np.zeros(1, np.int64)  # not used
        deep = count_deep([read_header(path)])
        return ImageDataset("", unread_manifest([path]), labels, [""], sizes, deep=deep), [""]
    if not os.path.isdir(path):
        raise DataError(f"{flag} {path}: no such file or folder")
    # Unreadable images are skipped and reported; only a folder without any image is an error.
    images = scan_images(path, max_bad_share=1.0)
    names = [os.path.relpath(p, path) for p in images.paths]
    stems = [os.path.splitext(name)[0] for name in names]
    counts = Counter(stems)
    return images, [s if counts[s] == 1 else n for s, n in zip(stems, names, strict=True)]


def read_picture(
    images: ImageDataset, index: int, size: Sequence[int] | None, patch_size: int
) -> Image.Image:
    """Decode an image, resize it and crop it to whole patches, as fit_to_patches does.

    Raises: SkippedImageError: it cannot be decoded, or is smaller than a patch.
    """
    try:
        with quiet_pillow():
            image = images.read_rgb(index)
        return fit_to_patches(image, size, patch_size)
    except MemoryError:
        raise
    except DataError as error:
        raise SkippedImageError(f"cannot be drawn: {error}") from error
    except Exception as error:  # Pillow's plugins raise all kinds on broken files.
        raise SkippedImageError(reason_of(error)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain errors of writing the pictures of an image to `path`.

    Raises: SkippedImageError: the name of this output is impossible. CheckpointError: others.
    """
    try:
        with explain_write_errors(path):
            yield
    except CheckpointError as error:
        if getattr(error.__cause__, "errno", None) in _NAME_ERRORS:
            raise SkippedImageError(f"cannot be drawn: {error}") from error
        raise


def raise_if_none(drawn: int, skipped: dict[str, str], flag: str = "--image_path") -> None:
    """Raise DataError if no image was drawn.

    skipped: path -> reason.
    """
    if not drawn:
        reasons = "; ".join(f"{path} {reason}" for path, reason in list(skipped.items())[:3])
        raise DataError(f"{flag}: no image can be read: {reasons}")

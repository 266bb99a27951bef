"""File names: which ones are images, which ones a system leaves behind, and their natural order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from PIL import features

# File name extensions of images: those of torchvision.datasets.ImageFolder, and further ones that
# Pillow reads. It reads AVIF from version 11.3 on.
_HAS_AVIF = "avif" in features.modules and features.check_module("avif")
_AVIF = (".avif",) if _HAS_AVIF else ()
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".jpe", ".jfif", ".gif", ".jp2", *_AVIF,
)  # fmt: skip
# Images that Pillow does not read.
UNSUPPORTED = (".heic", ".heif", *(() if _HAS_AVIF else (".avif",)))

# Folders and files of macOS, Windows, Synology and QNAP, apart from those that start with a dot
# (AppleDouble's ._name, .DS_Store, .ipynb_checkpoints, .Trash).
_LEFTOVERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information",
    "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip


def is_leftover(name: str) -> bool:
    """Return True for a path, relative to its dataset, that a system made and not the user.

    Every part counts: a file in a hidden folder is a leftover too.
    """
    return any(
        part.lower() in _LEFTOVERS or (part.startswith(".") and part not in (".", ".."))
        for part in PurePosixPath(name).parts
    )


def is_image_name(name: str) -> bool:
    """Return True for a path, relative to its dataset, of an image by its extension."""
    return name.lower().endswith(EXTENSIONS) and not is_leftover(name)


def is_unsupported_image(name: str) -> bool:
    """Return True for a path, relative to its dataset, of an image that Pillow does not read."""
    return name.lower().endswith(UNSUPPORTED) and not is_leftover(name)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers by value: 2.png before 10.png."""
    parts = re.findall(r"\d+|\D+", name)
    # Names of equal value, as 1.png and 01.png, keep a fixed order.
    order = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return [*order, (-1, name)]


def image_files(folder: Path, *, below: bool = False) -> list[Path]:
    """List the images of a folder, or also of those below it, in the natural order of the paths."""
    files: Iterable[Path] = folder.rglob("*") if below else folder.iterdir()
    names = [str(path.relative_to(folder)) for path in files]
    return [folder / name for name in sorted(filter(is_image_name, names), key=natural_order)]

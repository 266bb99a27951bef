"""Features on disk in parts, so that a killed run continues, on any number of ranks.

A part has the features of consecutive images. Its batches are the same in each run, and so are its
bits, whichever rank computes it.

Shapes: N images, m usable images of a part.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdino.errors import CheckpointError, ConfigError
from fastdino.files import atomic_write, explain_write_errors
from fastdino.terminal import print_err

# Limits of a part: features in bytes, and images. A kill loses at most one part per rank.
PART_BYTES = 1 << 28
PART_IMAGES = 1024

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FeatureParts:
    """The parts of one set of features, in a folder.

    Attributes:
        key: hash of all that the features depend on.
        shapes: shape per image of each array.
        dtype: of the arrays.
        images: N.
        batch_size: images per forward pass; parts are whole batches.
    """

    folder: Path
    key: str
    shapes: Mapping[str, Shape]
    dtype: np.dtype[np.floating]
    images: int
    batch_size: int

    @property
    def bytes_per_image(self) -> int:
        """Size of an image's features."""
        return self.dtype.itemsize * sum(map(math.prod, self.shapes.values()))

    @cached_property
    def size(self) -> int:
        """Images per part."""
        images = min(PART_IMAGES, PART_BYTES // max(1, self.bytes_per_image))
        return max(1, images // self.batch_size) * self.batch_size

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def batches(self, part: int) -> list[range]:
        """Return the indices of the images of a part, in batches."""
        end = min((part + 1) * self.size, self.images)
        starts = range(part * self.size, end, self.batch_size)
        return [range(start, min(start + self.batch_size, end)) for start in starts]

    def images_in(self, part: int) -> int:
        """Return the number of images of a part."""
        return sum(map(len, self.batches(part)))

    def open(self, *, overwrite: bool) -> list[int]:
        """Create the folder, or continue in it; return the parts that are not finished.

        Args:
            overwrite: remove parts of another key.

        Raises: ConfigError: it has parts of another key. CheckpointError: it cannot be written.
        """
        key_file = self._key_file
        with explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            found = key_file.read_text(errors="replace") if key_file.exists() else ""
            if found and found != self.key and not overwrite:
                raise ConfigError(
                    f"{self.folder} has parts of a run with other weights, images or settings: use "
                    "another --output, or --overwrite to remove them"
                )
            if found != self.key:
                for path in self.folder.glob("part-*"):
                    path.unlink()
                with atomic_write(key_file) as file:
                    file.write(self.key.encode())
        return [part for part in range(len(self)) if not self._is_finished(part)]

    def remove(self) -> None:
        """Remove the parts, and the folder unless the user has files in it."""
        with suppress(OSError):
            for path in [*self.folder.glob("part-*"), self._key_file, *self.folder.glob(".*.lock")]:
                path.unlink()
            self.folder.rmdir()

    def write(
        self,
        part: int,
        arrays: Mapping[str, NDArray[np.floating]],
        indices: NDArray[np.int64],
        reasons: Mapping[int, str],
    ) -> None:
        """Write a part atomically.

        Args:
            arrays: [m, *shape] of each name in `shapes`.
            indices: [m], the usable images.
            reasons: why the others are not usable.

        Raises: CheckpointError: it cannot be written.
        """
        path = self._path(part)
        about = np.array(json.dumps(list(reasons.items())))
        with explain_write_errors(path), atomic_write(path) as file:
            np.savez(file, **arrays, indices=indices, reasons=about)  # type: ignore[arg-type]

    def read(self, part: int, name: str) -> NDArray[np.floating]:
        """Return an array of a part, [m, *shape]."""
        return self._read(part, name)

    def indices(self, part: int) -> NDArray[np.int64]:
        """Return the usable images of a part, [m]."""
        return self._read(part, "indices")

    def reasons(self, part: int) -> dict[int, str]:
        """Return why images of a part are not usable."""
        return dict(json.loads(str(self._read(part, "reasons"))))

    def _read(self, part: int, name: str) -> NDArray[Any]:
        """Read one array. A damaged part is removed, and the next run computes it again."""
        path = self._path(part)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return arrays[name]
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} is missing: all ranks must see one folder; run the same command again"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # numpy and zipfile raise many types on other bytes
            with suppress(OSError):
                path.unlink()
            raise CheckpointError(
                f"{path} is damaged ({error}) and was removed: run the same command again"
            ) from error

    @property
    def _key_file(self) -> Path:
        return self.folder / "key"

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06}.npz"

    def _is_finished(self, part: int) -> bool:
        """Return True if a part's file is there; warn of a file with other contents."""
        path = self._path(part)
        if not path.exists():
            return False
        try:
            problem = self._problem(part)
        except Exception as error:  # numpy and zipfile raise many types on other bytes
            problem = str(error).partition("\n")[0] or type(error).__name__
        if problem:
            print_err(f"warning: {path} is damaged ({problem}) and is computed again")
        return not problem

    def _problem(self, part: int) -> str:
        """Compare the headers of a part's arrays with the expected ones; read no features."""
        with zipfile.ZipFile(self._path(part)) as file:
            found = {name: _header(file, name) for name in file.namelist()}
        rows = found["indices.npy"][0][0]
        expected = {f"{name}.npy": (rows, *shape) for name, shape in self.shapes.items()}
        same = all(found.get(name) == (shape, self.dtype) for name, shape in expected.items())
        return "" if same and rows <= self.images_in(part) else "other arrays"


def _header(file: zipfile.ZipFile, name: str) -> tuple[Shape, np.dtype[np.generic]]:
    """Return shape and dtype of an array in an npz."""
    with file.open(name) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise ValueError(f"version {version} of the npy format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    return shape, dtype

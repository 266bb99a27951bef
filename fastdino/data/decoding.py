"""Decoded images of a batch; an unreadable file is replaced by the next readable one.

Pillow decodes image by image in threads. Alternatively a batch decoder, DALI's in
dali_decoding.py, decodes the JPEGs and Pillow the rest. Pillow alone decides which files are
unreadable: it opens every header, and retries each file that the batch decoder refuses. The samples
of a batch therefore do not depend on the decoder.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.augmentation import dali_problem, first_line
from fastdino.data.bad_images import BadImages
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import orientation, reason_of

T = TypeVar("T")
# uint8 [height, width, 3], RGB: an array on the CPU, a tensor on a GPU.
Picture = NDArray[np.uint8] | Tensor

# Modes that every decoder converts to RGB in the same way, unlike CMYK.
_MODES = ("RGB", "L")
_END, _SCAN = 0xD9, 0xDA
# A marker that cannot be part of a scan's data.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class Decoder(Protocol):
    """Decoder of JPEG batches; called from several threads."""

    name: str

    def decode(self, files: Sequence[bytes]) -> list[Picture | None]:
        """Decode each file without applying EXIF; the result of a refused file is None."""
        ...

    def close(self) -> None:
        """Stop the decoder's threads; decoded images stay valid."""
        ...


def dali_decode_problem() -> str | None:
    """Return why DALI cannot replace Pillow as the decoder on the CPU, or None if it can."""
    problem = dali_problem()
    if problem is not None:
        return problem
    try:
        decoding = importlib.import_module("fastdino.data.dali_decoding")
        problem = decoding.cpu_problem()
    except Exception as error:  # Libraries that do not fit the machine raise many types.
        problem = f"DALI does not work here: {first_line(error)}"
    return problem


def read_first_good(
    dataset: ImageDataset, bad: BadImages, index: int, read: Callable[[int], T]
) -> tuple[int, T]:
    """Read the first readable sample from `index` on, recording unreadable ones in `bad`.

    Returns: its index, and the result of read(index).

    Raises: DataError: too many unreadable files, or no readable one.
    """
    while True:
        index = bad.next_good(index)
        try:
            return index, read(index)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise many types for broken files.
            reason = reason_of(error)
        bad.add(index, dataset.path(index), reason)


class PictureReader:
    """Reader and decoder of the images of batches; safe to use from several threads.

    Args:
        pool: threads that read and decode.
        decoder: decodes the JPEGs; None: Pillow decodes them too.
    """

    def __init__(
        self, dataset: ImageDataset, bad: BadImages, pool: Executor, decoder: Decoder | None
    ) -> None:
        self._dataset, self._bad, self._pool, self._decoder = dataset, bad, pool, decoder
        self._refused: set[int] = set()  # samples that the decoder refused: Pillow decodes them

    def read(self, batch: Sequence[int]) -> tuple[list[int], list[Picture]]:
        """Read the first readable sample from each index of the batch on: indices and images.

        Raises: DataError: too many unreadable files, or no readable one.
        """
        done: dict[int, tuple[int, Picture]] = {}  # keyed by position in the batch
        pending = dict(enumerate(batch))
        while pending:
            loaded = zip(pending, self._pool.map(self._load, pending.values()), strict=True)
            encoded: dict[int, tuple[int, bytes]] = {}
            for position, (index, data) in loaded:
                if isinstance(data, bytes):
                    encoded[position] = index, data
                else:
                    done[position] = index, data
            pending = {}
            files = [data for _, data in encoded.values()]
            pictures = self._decoder.decode(files) if self._decoder and files else []
            for (position, (index, _)), picture in zip(encoded.items(), pictures, strict=True):
                if picture is None:
                    self._refused.add(index)
                    pending[position] = index
                else:
                    done[position] = index, picture
        in_order = [done[position] for position in range(len(batch))]
        return [index for index, _ in in_order], [picture for _, picture in in_order]

    def _load(self, index: int) -> tuple[int, bytes | Picture]:
        """Return the first readable sample from index on: its image, or a file for the decoder."""

        def load(index: int) -> bytes | Picture:
            data = self._dataset.read_bytes(index)
            with Image.open(io.BytesIO(data)) as image:
                if self._is_for_decoder(index, image, data):
                    return data
                return np.asarray(self._dataset.conversion.apply(image))

        return read_first_good(self._dataset, self._bad, index, load)

    def _is_for_decoder(self, index: int, image: Image.Image, data: bytes) -> bool:
        if self._decoder is None or index in self._refused:
            return False
        if image.format != "JPEG" or image.mode not in _MODES:
            return False
        upright_file = not self._dataset.conversion.exif or orientation(image) == 1
        return upright_file and is_one_whole_jpeg(data)


def is_one_whole_jpeg(data: bytes) -> bool:
    """Return whether the bytes are the segments and scans of exactly one complete JPEG.

    A marker inside a scan shows where a file was cut or overwritten. Pillow raises there, while
    other users of libjpeg silently stop at the last complete line. A file that passes may still be
    broken, but then all decoders agree on its pixels or the batch decoder refuses it.
    """
    position = 2
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == _END:
            return position + 2 == len(data)
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _SCAN:
            match = _MARKER.search(data, position)
            if match is None:
                return False
            position = match.start()
    return False

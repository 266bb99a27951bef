"""The pictures of a batch: read, decoded, and stood in for where a file is broken.

Pillow decodes image by image, in threads; or a decoder takes the JPEGs of a whole batch, as DALI
does (dali_decode.py), and Pillow all the rest. What counts as broken is in either case what Pillow
says, so that the samples of a batch do not depend on the decoder: it opens every header, and
decodes what the decoder refuses.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.data.bad_images import BadImages
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.image_files import orientation, reason_of, upright

# uint8 [height, width, 3], RGB: on the CPU an array, on a GPU a tensor.
Picture = NDArray[np.uint8] | Tensor

# Those that every decoder makes RGB of in the same way; of CMYK they do not.
_MODES = ("RGB", "L")
_END, _SCAN = 0xD9, 0xDA
# In a scan's data: a marker that is not part of it.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class Decoder(Protocol):
    """Decodes many JPEGs at once; called from several threads."""

    name: str

    def decode(self, files: Sequence[bytes]) -> list[Picture | None]:
        """A picture for each, not turned as EXIF says; None where the decoder refuses the file."""
        ...

    def close(self) -> None:
        """Ends its threads; pictures stay good."""
        ...


class PictureReader:
    """Reads and decodes batches; a broken file gives way to the next good one.

    Safe to use from several threads. `decoder`: for the JPEGs; None: Pillow decodes all.
    """

    def __init__(
        self, source: ImageDataset, bad: BadImages, pool: Executor, decoder: Decoder | None
    ) -> None:
        self._source, self._bad, self._pool, self._decoder = source, bad, pool, decoder
        self._refused: set[int] = set()  # samples that the decoder has refused: Pillow's

    def read(self, batch: Sequence[int]) -> tuple[list[int], list[Picture]]:
        """The first good sample from each of batch on, and its picture.

        Raises: DataError: too many broken files, or no good one.
        """
        found: dict[int, tuple[int, Picture]] = {}  # by place in the batch
        waiting = dict(enumerate(batch))
        while waiting:
            loaded = zip(waiting, self._pool.map(self._load, waiting.values()), strict=True)
            encoded: dict[int, tuple[int, bytes]] = {}
            for place, (index, data) in loaded:
                if isinstance(data, bytes):
                    encoded[place] = index, data
                else:
                    found[place] = index, data
            waiting = {}
            for place, picture in self._decode(encoded).items():
                index = encoded[place][0]
                if picture is None:
                    self._refused.add(index)
                    waiting[place] = index
                else:
                    found[place] = index, picture
        indices, pictures = zip(*(found[place] for place in range(len(batch))), strict=True)
        return list(indices), list(pictures)

    def _decode(self, encoded: dict[int, tuple[int, bytes]]) -> dict[int, Picture | None]:
        if not encoded:
            return {}
        assert self._decoder is not None
        pictures = self._decoder.decode([data for _, data in encoded.values()])
        return dict(zip(encoded, pictures, strict=True))

    def _load(self, index: int) -> tuple[int, bytes | Picture]:
        """The first good sample from index on, and its picture; for the decoder, its file."""
        while True:
            index = self._bad.next_good(index)
            try:
                data = self._source.read_bytes(index)
                with Image.open(io.BytesIO(data)) as image:
                    if self._is_for_decoder(index, image, data):
                        return index, data
                    exif = self._source.exif
                    return index, np.asarray(upright(image) if exif else image.convert("RGB"))
            except MemoryError:
                raise
            except Exception as error:  # Pillow's plugins raise all kinds on broken files.
                reason = reason_of(error)
            self._bad.add(index, self._source.path(index), reason)

    def _is_for_decoder(self, index: int, image: Image.Image, data: bytes) -> bool:
        if self._decoder is None or index in self._refused:
            return False
        if image.format != "JPEG" or image.mode not in _MODES:
            return False
        if self._source.exif and orientation(image) != 1:
            return False
        return is_one_whole_jpeg(data)


def is_one_whole_jpeg(data: bytes) -> bool:
    """Whether these are the segments and scans of one JPEG from the first byte to the last.

    A marker within a scan is where a file was cut or overwritten. There Pillow reads on and raises,
    and other users of libjpeg stop at the last line and do not. What passes here can still be
    broken, but then each of them says the same, or the decoder is the one that refuses.
    """
    place = 2
    while data[place : place + 1] == b"\xff" and place + 1 < len(data):
        marker = data[place + 1]
        if marker == _END:
            return place + 2 == len(data)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _SCAN:
            after = _MARKER.search(data, place)
            if after is None:
                return False
            place = after.start()
    return False

"""JPEGs decoded by NVIDIA DALI: Pillow's pixels on the CPU, nvJPEG's similar ones on a GPU.

Each batch runs a one-operator pipeline in the thread that prepares it. Those threads read ahead, so
the pipeline needs no prefetching and has no state to resume.

`fastdino bench --loader` compares the speed with Pillow; benchmarks/results/cpu/loader.md has the
results on a CPU.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali
import PIL
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastdino.augmentation.dali import GPU_DECODER

# uint8 [height, width, 3], RGB: an array on the CPU, a tensor on a GPU.
Picture = NDArray[np.uint8] | Tensor


class DaliDecoder:
    """A decoding.Decoder for up to `batch_size` JPEGs at once, in `threads` threads.

    Decoded images share DALI's memory without a copy. It is not reused while an image is held:
    DALI's default executor (exec_dynamic) allocates the outputs of every run anew.

    Args:
        stream: decode with nvJPEG on this stream's device, and return CUDA tensors for work on it.
            Drop an image only after that work: DALI frees memory in the order of its own streams.
        hw_decoder_load: share of the images decoded by the GPU's JPEG engine, if it has one,
            instead of its multiprocessors.
        exif: apply the EXIF orientation.
    """

    def __init__(
        self,
        batch_size: int,
        threads: int,
        *,
        stream: torch.cuda.Stream | None = None,
        hw_decoder_load: float = 0.65,
        exif: bool = False,
    ) -> None:
        self._stream = stream
        self.name = f"DALI {nvidia.dali.__version__} on CPU"
        options: dict[str, Any] = {"adjust_orientation": exif}
        if stream is not None:
            self.name = f"nvJPEG of DALI {nvidia.dali.__version__} on {stream.device}"
            options |= GPU_DECODER | {"hw_decoder_load": hw_decoder_load}
        self._build = functools.partial(
            _pipeline,
            options,
            batch_size=batch_size,
            num_threads=threads,
            device_id=None if stream is None else stream.device.index,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        self._pipeline = self._build()
        self._pipeline.build()
        self._lock = threading.Lock()

    def decode(self, files: Sequence[bytes]) -> list[Picture | None]:
        """Decode each file; the result of a file that DALI refuses is None."""
        with self._lock:
            return self._decode(files)

    def close(self) -> None:
        """Free the pipeline; decoded images stay valid."""
        with self._lock:
            self._pipeline = None  # Now: in a process forked later its destructor would hang.

    def _decode(self, files: Sequence[bytes]) -> list[Picture | None]:
        """Decode the files. One refused file fails the run, which is then repeated by halves."""
        try:
            return self._run(files)
        except RuntimeError as error:
            if "CUDA" in str(error).partition("Stacktrace")[0]:
                raise  # The files did not cause this.
            self._pipeline = self._build()  # "Current pipeline object is no longer valid."
        if len(files) == 1:
            return [None]
        middle = len(files) // 2
        return self._decode(files[:middle]) + self._decode(files[middle:])

    def _run(self, files: Sequence[bytes]) -> list[Picture | None]:
        # Without a stream argument, run() returns when the images are complete, on a GPU too. It
        # could not return much earlier: only then is it known which files are refused.
        (pictures,) = self._pipeline.run(encoded=[np.frombuffer(file, np.uint8) for file in files])
        if self._stream is None:
            return [_array(picture) for picture in pictures]
        # DLPack orders the images before further work on the current stream.
        with torch.cuda.stream(self._stream):
            return [from_dlpack(picture) for picture in pictures]


def _array(picture: Any) -> Picture:
    array = np.asarray(picture)
    array.flags.writeable = False  # as Pillow's arrays: Numba compiles for read-only ones
    return array


@pipeline_def
def _pipeline(options: dict[str, Any]) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8)
    return fn.decoders.image(encoded, output_type=types.RGB, **options)


@functools.cache
def cpu_problem() -> str | None:
    """Return why DALI cannot replace Pillow on the CPU, or None if a few test JPEGs match."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (37, 50, 3), dtype=np.uint8))
    kinds = ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True})
    files = []
    for options in kinds:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90, **options)
        files.append(file)
    decoder = DaliDecoder(len(files), 1)
    pictures = decoder.decode([file.getvalue() for file in files])
    decoder.close()
    for file, picture in zip(files, pictures, strict=True):
        if picture is None or not np.array_equal(np.asarray(Image.open(file)), picture):
            return (
                f"DALI {nvidia.dali.__version__} and Pillow {PIL.__version__} decode JPEGs "
                "to different pixels"
            )
    return None

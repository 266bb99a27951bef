"""JPEGs decoded by NVIDIA DALI: on the CPU to Pillow's pixels, on a GPU by nvJPEG to near ones.

A pipeline of one operator is run for each batch, by the thread that prepares it: reading ahead is
those threads' work, so that the pipeline has nothing to prefetch and no state to resume.

`fastdino bench --loader` times it beside Pillow; benchmarks/results/cpu/loader.md has what came of
it on a CPU.
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
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch.utils.dlpack import from_dlpack

from fastdino.data.decoding import Picture


class DaliDecoder:
    """A decode.Decoder: of up to `batch_size` JPEGs at once, in `threads` threads.

    Pictures are memory of DALI's, handed over without a copy. It is not used again as long as one
    of them is held: DALI's default executor (exec_dynamic) allocates the outputs of each run anew.

    Args:
        stream: where given, nvJPEG decodes on the stream's device, and the pictures are CUDA
            tensors for work on it. Whoever drops one has seen that work done: DALI gives memory
            back in the order of streams of its own.
        hw_decoder_load: the share of the images that goes to the device's JPEG engine, if it has
            one, and not to its multiprocessors.
    """

    def __init__(
        self,
        batch_size: int,
        threads: int,
        *,
        stream: torch.cuda.Stream | None = None,
        hw_decoder_load: float = 0.65,
    ) -> None:
        self._stream = stream
        self._build = functools.partial(
            _pipeline,
            None if stream is None else hw_decoder_load,
            batch_size=batch_size,
            num_threads=threads,
            device_id=None if stream is None else stream.device.index,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        self._pipeline = self._build()
        self._pipeline.build()
        self._lock = threading.Lock()
        version = f"DALI {nvidia.dali.__version__}"
        on_cpu, on_gpu = f"{version} on CPU", f"nvJPEG of {version}"
        self.name = on_cpu if stream is None else f"{on_gpu} on {stream.device}"

    def decode(self, files: Sequence[bytes]) -> list[Picture | None]:
        """A picture for each file; None for one that DALI refuses, though not for its batch."""
        with self._lock:
            return self._halves(files)

    def close(self) -> None:
        """Frees the pipeline; pictures stay good."""
        with self._lock:
            self._pipeline = None  # Freed now: in a process forked later its end would hang.

    def _halves(self, files: Sequence[bytes]) -> list[Picture | None]:
        """One refused file fails a run: then each half of it is run again."""
        try:
            return self._run(files)
        except RuntimeError as error:
            if "CUDA" in str(error).partition("Stacktrace")[0]:
                raise  # no fault of the files'
            self._pipeline = self._build()  # "Current pipeline object is no longer valid."
        if len(files) == 1:
            return [None]
        middle = len(files) // 2
        return self._halves(files[:middle]) + self._halves(files[middle:])

    def _run(self, files: Sequence[bytes]) -> list[Picture | None]:
        # With no stream named, run() returns when the pictures are there, on a GPU too. It could
        # not return much earlier: which files are refused is known only then.
        (pictures,) = self._pipeline.run(encoded=[np.frombuffer(file, np.uint8) for file in files])
        if self._stream is None:
            return [_array(picture) for picture in pictures]
        # For this stream, in which DALI would have to make itself waited for.
        with torch.cuda.stream(self._stream):
            return [from_dlpack(picture) for picture in pictures]


def _array(picture: Any) -> Picture:
    array = np.asarray(picture)
    array.flags.writeable = False  # as those of Pillow are, for which Numba compiles
    return array


@pipeline_def
def _pipeline(hw_decoder_load: float | None) -> Any:
    """hw_decoder_load: None: on the CPU."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8)
    # Turned as EXIF says the picture would be another than Pillow's.
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if hw_decoder_load is not None:
        options |= {
            "device": "mixed",
            "hw_decoder_load": hw_decoder_load,
            # As libjpeg upsamples the chroma; here it has to be asked for.
            "jpeg_fancy_upsampling": True,
            # Else the threads of all processes of a machine may be tied to the same few cores.
            "affine": False,
        }
    return fn.decoders.image(encoded, **options)


@functools.cache
def cpu_problem() -> str | None:
    """Why it cannot stand in for Pillow on the CPU; None where a few JPEGs come out the same."""
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
            return f"DALI {nvidia.dali.__version__} decodes otherwise than Pillow {PIL.__version__}"
    return None

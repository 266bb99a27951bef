"""DALI's pipelines on a simulated GPU: the pixels of Pillow or of DALI on the CPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.dlpack import to_dlpack

from fastdino.augmentation import dali
from tests.simulated_cuda.device import SimulatedCuda
from tests.simulated_cuda.streams import Timeline


class _Output:
    """A tensor in the memory of DALI's stream, with its side of the DLPack protocol."""

    def __init__(self, gpu: SimulatedCuda, timeline: Timeline, values: torch.Tensor) -> None:
        self._gpu, self._timeline = gpu, timeline
        self._tensor = gpu.adopt(values, torch.device("cuda", 0), gpu.start(timeline, "DALI"))

    def as_tensor(self) -> _Output:
        return self

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int | None = None, **_: Any) -> Any:
        """Order DALI's work before that of the stream; DALI frees the memory after that stream."""
        handle = 0 if stream in (None, 1) else stream  # 1 is the default stream
        consumer = next(s for s in self._gpu.streams if s.cuda_stream == handle)
        consumer.timeline.wait(self._timeline.clock)
        return to_dlpack(self._tensor)


class FakeNvjpeg:
    """Replaces dali_decoding._pipeline on a GPU: Pillow's pixels on the GPU.

    Its memory is freed in the order of DALI's stream, without regard to others.
    """

    def __init__(self, gpu: SimulatedCuda, options: dict[str, Any], **settings: Any) -> None:
        assert options["device"] == "mixed"
        assert settings["device_id"] == 0
        self._gpu, self._timeline = gpu, Timeline("DALI's stream")

    def build(self) -> None:
        pass

    def run(self, encoded: Sequence[np.ndarray]) -> tuple[list[_Output]]:
        images = [
            np.array(Image.open(io.BytesIO(file.tobytes())).convert("RGB")) for file in encoded
        ]
        return ([_Output(self._gpu, self._timeline, torch.from_numpy(x)) for x in images],)


class FakeCropPipeline:
    """Replaces dali.crop_pipeline on a GPU: the crops of DALI's CPU pipeline, on the GPU."""

    def __init__(
        self,
        gpu: SimulatedCuda,
        real: Callable[..., Any],
        feed: Callable[[], dali.Batch],
        sizes: Sequence[int],
        solarized: Sequence[int],
        on_gpu: bool,
        exif: bool,
        *,
        device_id: int | None,
        **settings: Any,
    ) -> None:
        assert on_gpu
        assert device_id == 0
        self._gpu, self._timeline = gpu, Timeline("DALI's stream")

        def feed_pixels() -> dali.Batch:
            files, *parameters = feed()
            pixels = [np.array(Image.open(io.BytesIO(f.tobytes())).convert("RGB")) for f in files]
            return (pixels, *parameters)

        self._pipeline = real(
            feed_pixels, sizes, solarized, False, exif, device_id=None, **settings
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def run(self, stream: Any = None) -> list[_Output]:
        outputs = self._pipeline.run()
        tensors = [torch.from_numpy(np.array(output.as_tensor())) for output in outputs]
        made = [_Output(self._gpu, self._timeline, tensor) for tensor in tensors]
        for output in made:
            self._gpu.record_stream(output._tensor, stream)
        return made

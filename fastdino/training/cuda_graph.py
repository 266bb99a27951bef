"""A training step captured as a CUDA graph: one launch instead of thousands.

A graph replays the recorded kernels at the same addresses. Crops are therefore copied to fixed
buffers, and values that change from step to step live on the device. Each combination of flags (a
frozen last layer, a measured entropy) has a graph of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdino.errors import UserError

# Eager steps per combination of flags before capture: they create the optimizer state, compile what
# compiles at its first call, and let libraries allocate their workspaces.
WARMUP_STEPS = 3

Outputs = tuple[Tensor | None, ...]
_Flags = tuple[tuple[str, bool], ...]


class GraphedStep:
    """A step that runs eagerly at first and is then captured and replayed, on a stream of its own.

    Args:
        step: takes a list of crops, and flags by keyword; returns tensors or None. It must not read
            from the device, and all state that it changes must be on the device.
        device: a CUDA device.
    """

    def __init__(self, step: Callable[..., Outputs], device: torch.device):
        self._step = step
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # shared, as one graph runs at a time
        self._crops: list[Tensor] = []
        self._eager_steps: Counter[_Flags] = Counter()
        self._graphs: dict[_Flags, tuple[torch.cuda.CUDAGraph, Outputs]] = {}

    def __call__(self, crops: Sequence[Tensor], **flags: bool) -> Outputs:
        """Run one step.

        Raises:
            ValueError: crops differ in shape or dtype from those of the first call.
            UserError: the step cannot be captured; no further step can run.
        """
        self._check(crops)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for own, crop in zip(self._crops, crops, strict=True):
                own.copy_(crop, non_blocking=True)
                if crop.is_cuda:
                    crop.record_stream(self._stream)
            # Cloned because the next replay overwrites the outputs.
            outputs = [None if output is None else output.clone() for output in self._run(flags)]
        current.wait_stream(self._stream)
        for output in outputs:
            if output is not None:
                output.record_stream(current)
        return tuple(outputs)

    def _run(self, flags: dict[str, bool]) -> Outputs:
        key = tuple(sorted(flags.items()))
        if key not in self._graphs:
            self._eager_steps[key] += 1
            if self._eager_steps[key] <= WARMUP_STEPS:
                return self._step(self._crops, **flags)
            self._graphs[key] = self._capture(flags)
        graph, outputs = self._graphs[key]
        graph.replay()
        return outputs

    def _capture(self, flags: dict[str, bool]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: data loading threads may meanwhile make calls that a capture forbids.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = self._step(self._crops, **flags)
        except RuntimeError as error:
            first: BaseException = error
            while first.__context__ is not None:  # ending a failed capture raises another error
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            # A failed capture leaves PyTorch's random generator unusable, so there is no fallback.
            reason = str(first).partition("\n")[0]
            raise UserError(
                f"--cuda_graph true: the step cannot be captured ({reason}); use --cuda_graph false"
            ) from error
        return graph, outputs

    def _check(self, crops: Sequence[Tensor]) -> None:
        if not self._crops:
            self._crops = [crop.new_empty(crop.shape, device=self._device) for crop in crops]
        for i, (crop, own) in enumerate(zip(crops, self._crops, strict=True)):
            if (crop.shape, crop.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"crop {i} must be {tuple(own.shape)} of {own.dtype}, got "
                    f"{tuple(crop.shape)} of {crop.dtype}: with --cuda_graph, all batches must "
                    "have the size of the first one"
                )

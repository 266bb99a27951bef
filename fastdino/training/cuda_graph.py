"""A whole training step as a CUDA graph: one launch in place of thousands.

A graph repeats what was recorded, at the same addresses: crops are copied to where it reads them,
and what changes from step to step is on the device. What it cannot branch on (a frozen last layer,
a measured entropy) makes a graph of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdino.errors import UserError

# Eager steps of each kind before it is recorded: they make the optimizer's state, compile what is
# compiled at its first call, and let libraries take their workspaces.
WARM_UPS = 3

Outputs = tuple[Tensor | None, ...]
_Kind = tuple[tuple[str, bool], ...]


class GraphedStep:
    """Calls a step eagerly at first, and from then on replays it; all on a stream of its own.

    Args:
        step: takes a list of crops and flags, by name; returns tensors or None. It reads nothing
            back to the host, and all that it changes is on the device.
        device: a CUDA device.
    """

    def __init__(self, step: Callable[..., Outputs], device: torch.device):
        self._step = step
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # one graph runs at a time: they share memory
        self._crops: list[Tensor] = []
        self._eager: Counter[_Kind] = Counter()
        self._graphs: dict[_Kind, tuple[torch.cuda.CUDAGraph, Outputs]] = {}

    def __call__(self, crops: Sequence[Tensor], **flags: bool) -> Outputs:
        """One step.

        Raises:
            ValueError: crops of other shapes or dtypes than the first call's.
            UserError: the step does what cannot be recorded; no other step can follow.
        """
        self._check(crops)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for own, crop in zip(self._crops, crops, strict=True):
                own.copy_(crop, non_blocking=True)
                if crop.is_cuda:
                    crop.record_stream(self._stream)
            # Clones, as the next replay writes over what this one returns.
            outputs = [None if output is None else output.clone() for output in self._run(flags)]
        current.wait_stream(self._stream)
        for output in outputs:
            if output is not None:
                output.record_stream(current)
        return tuple(outputs)

    def _run(self, flags: dict[str, bool]) -> Outputs:
        kind = tuple(sorted(flags.items()))
        if kind not in self._graphs:
            self._eager[kind] += 1
            if self._eager[kind] <= WARM_UPS:
                return self._step(self._crops, **flags)
            self._graphs[kind] = self._record(flags)
        graph, recorded = self._graphs[kind]
        graph.replay()
        return recorded

    def _record(self, flags: dict[str, bool]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads load data meanwhile, and may call what a capture forbids.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                recorded = self._step(self._crops, **flags)
        except RuntimeError as error:
            first = _first(error)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            # What was begun leaves PyTorch's random generator unusable: no eager step can follow.
            why = str(first).partition("\n")[0]
            raise UserError(
                f"--cuda_graph true: the step cannot be recorded ({why}); use --cuda_graph false"
            ) from error
        return graph, recorded

    def _check(self, crops: Sequence[Tensor]) -> None:
        got = [(tuple(crop.shape), crop.dtype) for crop in crops]
        if not self._crops:
            self._crops = [
                torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in got
            ]
        expected = [(tuple(crop.shape), crop.dtype) for crop in self._crops]
        for i, (new, old) in enumerate(zip(got, expected, strict=True)):
            if new != old:
                raise ValueError(
                    f"crop {i} must be {old[0]} of {old[1]}, got {new[0]} of {new[1]}: with "
                    "--cuda_graph every batch has the first one's size"
                )


def _first(error: BaseException) -> BaseException:
    """What went wrong first: the end of a recording that failed fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return error

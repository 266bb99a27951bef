"""The objects of torch.cuda on simulated devices: streams, events, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tests.simulated_cuda.streams import Memory, Timeline

if TYPE_CHECKING:
    from tests.simulated_cuda.device import SimulatedCuda


@dataclass(eq=False)
class Tape:
    """The operations of a captured CUDA graph."""

    operations: list[Callable[[], None]] = field(default_factory=list)
    accesses: list[tuple[Memory, bool]] = field(default_factory=list)
    before: dict[int, tuple[Memory, bytes]] = field(default_factory=dict)  # by address
    fresh: list[Tensor] = field(default_factory=list)  # memory that the graph allocated


class Stream:
    """Replaces torch.cuda.Stream."""

    def __init__(self, gpu: SimulatedCuda, device: Any = None, name: str | None = None) -> None:
        self.gpu = gpu
        self.device = gpu.resolve("cuda" if device is None else device)
        self.stream_id = len(gpu.streams)
        self.device_index, self.device_type = self.device.index, 1
        self.cuda_stream = 0 if name else 1000 + self.stream_id
        self.timeline = Timeline(name or f"stream {self.stream_id}")
        self.tape: Tape | None = None
        gpu.streams.append(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.gpu.wait("Stream.synchronize", self)

    def query(self) -> bool:
        return self.gpu.host.clock[self.timeline] >= self.timeline.clock[self.timeline]


class Event:
    """Replaces torch.cuda.Event. It has passed only once the host has waited for it."""

    gpu: SimulatedCuda  # set by the simulation

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.clock: dict[Timeline, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.gpu.current_stream()
        self.gpu = stream.gpu
        self.clock = dict(stream.timeline.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.current_stream()).timeline.wait(self.clock)

    def synchronize(self) -> None:
        self.gpu.wait("Event.synchronize", clock=self.clock)

    def query(self) -> bool:
        return all(self.gpu.host.clock[t] >= number for t, number in self.clock.items())

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    """Replaces torch.cuda.CUDAGraph: a replay runs the captured operations again."""

    gpu: SimulatedCuda  # set by the simulation

    def __init__(self, keep_graph: bool = False) -> None:
        self._stream: Stream | None = None
        self._tape: Tape | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(f"unknown capture_error_mode {capture_error_mode}")
        self._stream = self.gpu.current_stream()
        if self._stream in self.gpu.default_streams:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self.gpu.begin_capture(self._stream)

    def capture_end(self) -> None:
        assert self._stream is not None
        self._tape = self.gpu.end_capture(self._stream)

    def replay(self) -> None:
        if self._tape is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.gpu.replay(self._tape, self.gpu.current_stream())

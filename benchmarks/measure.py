"""Time, peak memory and copy bandwidth, on a GPU and on a CPU.

A kernel of a few microseconds is over before the host has queued the next one. So the GPU sleeps
until all calls wait in its queue, and events around them measure the work without the gaps.
Whether that came off is checked, and told by the samples.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Thunk = Callable[[], object]

# An H100's L2 cache: inputs are rotated until they are several times as large.
L2_BYTES = 50 << 20
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
# No GPU's clock is faster; on a slower one the sleep is longer.
_CYCLES_PER_SECOND = 2e9


class Sample(NamedTuple):
    """seconds a call; queued: the GPU never waited for the host."""

    seconds: float
    queued: bool


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(thunks: Sequence[Thunk], device: torch.device, *, wait: bool = True) -> float:
    """Seconds a call as the host sees it: queueing, gaps, and (with `wait`) the work itself."""
    synchronize(device)
    start = time.perf_counter()
    for thunk in thunks:
        thunk()
    if wait:
        synchronize(device)
    seconds = (time.perf_counter() - start) / len(thunks)
    synchronize(device)
    return seconds


def device_sample(thunks: Sequence[Thunk], device: torch.device, sleep: float) -> Sample:
    """Seconds a call of the device's work alone, queued behind a sleep of `sleep` seconds."""
    if device.type != "cuda":
        return Sample(host_seconds(thunks, device), True)
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(sleep * _CYCLES_PER_SECOND))
    begin.record()
    for thunk in thunks:
        thunk()
    end.record()
    queued = not begin.query()  # still asleep: all calls were in the queue before the first ran
    torch.cuda.synchronize(device)
    return Sample(begin.elapsed_time(end) * 1e-3 / len(thunks), queued)


def peak_bytes(thunk: Thunk, device: torch.device) -> int:
    """Most memory that one call holds at a time, beyond what was allocated before it.

    On the CPU the profiler reports every allocation of PyTorch's allocator, also those inside of
    custom operators and compiled code.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        thunk()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiled = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
    with profiled as profiler:
        thunk()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8"))
    return _peak_of(trace["traceEvents"])


def _peak_of(events: Sequence[dict[str, Any]]) -> int:
    held = peak = 0
    memory = [event for event in events if event.get("name") == "[memory]"]
    for event in sorted(memory, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second of a large copy, counting those read and those written."""
    size = size or _COPY_BYTES[device.type]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    thunks: list[Thunk] = [lambda: target.copy_(source)] * 5
    device_sample(thunks, device, 0.0)
    return (
        2 * size / statistics.median(device_sample(thunks, device, 1e-3).seconds for _ in range(5))
    )

"""Time, memory and bandwidth on a GPU or a CPU.

A kernel of a few microseconds ends before the host has queued the next one. The GPU therefore
sleeps until all calls are queued, and events measure the work without gaps. DeviceTime.queued
reports whether the sleep was long enough.
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
from torch import Tensor

Call = Callable[[], object]

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
# An upper bound of the GPU's clock rate; the sleep is longer on a slower clock.
_CYCLES_PER_SECOND = 2e9


class DeviceTime(NamedTuple):
    """Seconds per call; queued: the GPU never waited for the host."""

    seconds: float
    queued: bool


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Collect garbage and return cached device memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def host_seconds(calls: Sequence[Call], device: torch.device, *, wait: bool = True) -> float:
    """Return the host's seconds per call: launches, gaps and (with `wait`) the device's work."""
    synchronize(device)
    start = time.perf_counter()
    for call in calls:
        call()
    if wait:
        synchronize(device)
    seconds = (time.perf_counter() - start) / len(calls)
    synchronize(device)
    return seconds


def device_time(calls: Sequence[Call], device: torch.device, sleep: float) -> DeviceTime:
    """Measure the device's work per call, queued behind a sleep of `sleep` seconds."""
    if device.type != "cuda":
        return DeviceTime(host_seconds(calls, device), True)
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(sleep * _CYCLES_PER_SECOND))
    begin.record()
    for call in calls:
        call()
    end.record()
    queued = not begin.query()  # still asleep: all calls were queued before the first one ran
    torch.cuda.synchronize(device)
    return DeviceTime(begin.elapsed_time(end) * 1e-3 / len(calls), queued)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the peak memory of one call, beyond what was allocated before it.

    On a CPU the profiler reports every allocation of PyTorch's allocator, including those of custom
    operators and compiled code.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiled = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
    with profiled as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["traceEvents"]
    held = peak = 0
    allocations = [event for event in events if event.get("name") == "[memory]"]
    for event in sorted(allocations, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def saved_bytes(step: Call, excluded: Sequence[Tensor]) -> int:
    """Return the bytes that a step saves for its backward pass, without the `excluded` tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(saved.values())


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Return the bytes per second of a large copy, reads and writes counted."""
    size = size or _COPY_BYTES[device.type]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: list[Call] = [lambda: target.copy_(source)] * 5
    device_time(calls, device, 0.0)
    times = [device_time(calls, device, 1e-3).seconds for _ in range(5)]
    return 2 * size / statistics.median(times)

"""Tables of tensors in device memory, so that one launch serves a whole network, and their cache.

Chunks divide tensors among programs; they depend on sizes only:

    rows    int64 [n, 2]: the number of a tensor's first chunk, its number of elements
    owners  int64 [chunks]: the index of each chunk's tensor; an empty tensor has one chunk

Pointers hold one word per tensor and role: int64 [n, roles], address << 2 | dtype code, or 0
without a tensor. (Codes start at 1, as an empty tensor has address 0.)

A cache belongs to an optimizer or to a thread, so it needs no lock, and to the stream that filled
its tables, so nothing has to wait for an upload. It keeps no caller's tensor alive.

CUDA graphs: a call whose tables exist uploads nothing while it is captured, and the tables then
stay alive, as the graph reads them. A table made during capture (gradients have new addresses in
the graph's pool) is copied, at each replay too, from pinned memory that an earlier call reserved.
"""

from __future__ import annotations

import array
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CODE_BITS = 2
FP32, BF16, FP16, MIXED = range(1, 5)
CODE_OF = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

_CACHED = 8  # values of a cache
_PINNED_WORDS = 1 << 17  # 1 MiB: hundreds of captured calls


@dataclass(frozen=True, eq=False)
class Chunks:
    """Tensors divided among programs; see the module's text."""

    rows: Tensor
    owners: Tensor


@dataclass(frozen=True, eq=False)
class Pointers:
    """Words [n, roles], and the common dtype code of each role: MIXED, or None without tensors."""

    words: Tensor
    codes: tuple[int | None, ...]


def make_chunks(numels: Sequence[int], chunk: int, device: torch.device) -> Chunks:
    """Divide tensors of n >= 1 sizes into chunks of `chunk` elements."""
    counts = [max(1, -(-numel // chunk)) for numel in numels]
    firsts = itertools.accumulate(counts, initial=0)
    rows = upload(itertools.chain.from_iterable(zip(firsts, numels)), device)
    # Computed on the device, so that only n numbers are copied there.
    owners = torch.repeat_interleave(upload(counts, device), output_size=sum(counts))
    return Chunks(rows.view(-1, 2), owners)


def make_pointers(
    roles: Sequence[Sequence[Tensor | None]], device: torch.device, *columns: Sequence[int]
) -> Pointers:
    """Build the words of fp32/bf16/fp16 tensors or None, n per role, and of more columns of n."""
    words = [[0 if t is None else t.data_ptr() << 2 | CODE_OF[t.dtype] for t in r] for r in roles]
    flat = itertools.chain.from_iterable(zip(*words, *columns))
    codes = ({CODE_OF[tensor.dtype] for tensor in role if tensor is not None} for role in roles)
    table = upload(flat, device).view(-1, len(roles) + len(columns))
    return Pointers(table, tuple(c.pop() if len(c) == 1 else MIXED if c else None for c in codes))


def upload(values: Iterable[float], device: torch.device, typecode: str = "q") -> Tensor:
    """Copy at least one int64 ("q") or fp64 ("d") number to the device without synchronising.

    Raises: RuntimeError: a CUDA graph is being captured, and no earlier call reserved memory.
    """
    dtype = {"q": torch.int64, "d": torch.float64}[typecode]
    host = torch.frombuffer(array.array(typecode, values), dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    if _is_capturing(device):
        return _pinned.take(len(host)).view(dtype).copy_(host).to(device, non_blocking=True)
    return host.pin_memory().to(device, non_blocking=True)


class Cache:
    """The most recently used values by key, each for the stream that it was made on."""

    def __init__(self) -> None:
        self._entries: list[tuple[Hashable, int, Any]] = []

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
        """Return the cached value of a key or that of make(), for use on the current stream."""
        stream, capturing = _current_stream(device), _is_capturing(device)
        if stream and not capturing:
            _pinned.reserve()
        for index, (known, used_on, value) in enumerate(self._entries):
            # All earlier work was done before a capture began.
            if (used_on == stream or capturing) and known == key:
                if index > 0:
                    self._entries.insert(0, self._entries.pop(index))
                if capturing:
                    _in_graphs[id(value)] = value
                return value
        value = make()
        if not capturing:  # a value made during capture is filled only by replays
            self._entries.insert(0, (key, stream, value))
            del self._entries[_CACHED:]
        return value


class _Pinned:
    """Pinned memory for uploads during capture, when none can be allocated; never reused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.int64)

    def reserve(self) -> None:
        """Allocate a block unless half of one remains."""
        if len(self._free) < _PINNED_WORDS // 2:
            with self._lock:
                self._free = torch.empty(_PINNED_WORDS, dtype=torch.int64, pin_memory=True)

    def take(self, words: int) -> Tensor:
        """Return unused memory, [words] int64."""
        with self._lock:
            if len(self._free) < words:
                raise RuntimeError(
                    f"no pinned memory for {words} words of a pointer table during CUDA-graph "
                    "capture: call the function once, with tensors on the device, before capturing"
                )
            taken, self._free = self._free[:words], self._free[words:]
        _in_graphs[id(taken)] = taken
        return taken


_pinned = _Pinned()
_in_graphs: dict[int, Any] = {}  # what captured graphs read, kept forever
_local = threading.local()


def thread_cache(name: str) -> Cache:
    """Return this thread's cache of that name."""
    cache: Cache = _local.__dict__.setdefault(name, Cache())
    return cache


def forget_tables() -> None:
    """Empty this thread's caches."""
    _local.__dict__.clear()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _current_stream(device: torch.device) -> int:
    """Return a number of the device's current stream that is not 0; 0 without streams."""
    return torch.cuda.current_stream(device).cuda_stream + 1 if device.type == "cuda" else 0

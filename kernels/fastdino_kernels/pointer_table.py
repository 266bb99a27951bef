"""Lists of tensors as one table in device memory, so that one launch serves a whole network.

A table depends only on the addresses, dtypes, sizes and strides of its tensors. These are its cache
key, read again by each call (half a microsecond of host time per tensor). If they equal those of an
earlier call, its table and the results of its checks are reused, even for other tensor objects. The
key changes when storage moves (`.data =`, a reshard, new gradients). The cache is small and keeps
no caller's tensor alive. A table may be used on another stream than the one that filled it;
that stream then waits for the upload.

CUDA graphs: a call whose table exists uploads nothing while it is captured; the table then stays
alive, as the graph reads it. A table made during capture (gradients have new addresses in the
graph's pool) is copied, at each replay too, from pinned memory that an earlier call reserved, even
if that call did not make a table.

The rows, one per group of tensors that are processed together, are int64 [n, ROW]:

    FIRST_CHUNK   the number of its first chunk; chunks are numbered through the table
    NUMEL         elements; 0 if there is no tensor in role 0
    CODES         dtype codes, CODE_BITS for each role; ABSENT if there is no tensor
    POSITION      its index in the caller's list
    POINTER + r   the address in role r, of at most six; 0 if there is no tensor
"""

from __future__ import annotations

import array
import bisect
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROW = 10
FIRST_CHUNK, NUMEL, CODES, POSITION, POINTER = range(5)
CODE_BITS = 8
FP32, BF16, FP16, ABSENT = range(4)
MIXED = -1  # code of a role whose tensors differ in dtype
_CODE_OF = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

_PLAIN_TYPES = {Tensor, nn.Parameter}
_dtype_of = Tensor.dtype.__get__  # type: ignore[attr-defined]

_CACHED = 16  # plans; the least recently used is dropped first
_ARENA_WORDS = 1 << 17  # 1 MiB: about forty captured calls of 300 tensors


Ranges = Sequence[tuple[int, int]]  # sorted, disjoint address ranges (first, end)


@dataclass(frozen=True)
class PointerTable:
    """The tensors of one launch, in device memory."""

    rows: Tensor  # int64 [n, ROW]
    owners: Tensor  # int64 [chunks]: the index of the row that each chunk belongs to
    codes: tuple[int | None, ...]  # each role's dtype code, MIXED, or None without tensors


@dataclass(frozen=True, eq=False)
class Plan:
    """Implementation and tables of a checked call. Compared by identity, as part of a cache key."""

    impl: str
    table: PointerTable | None = None
    rest: tuple[int, ...] = ()  # indices, in the caller's lists, of tensors left to PyTorch
    gradients: PointerTable | None = None  # a second table, of the gradients
    ranges: Ranges = ()  # memory that a call writes to


def are_plain(tensors: Sequence[object]) -> bool:
    """Return True if all are plain tensors: no subclass (fake, distributed, ...)."""
    return set(map(type, tensors)) <= _PLAIN_TYPES


def plan_for(head: Hashable, tensors: Sequence[Tensor], make: Callable[[], Plan]) -> Plan:
    """Return the cached plan for these tensors and this head, or that of make().

    Args:
        head: everything else that the plan depends on.
        tensors: n >= 1 plain tensors, of all roles.
        make: checks its input and may raise, in which case nothing is cached.
    """
    key = _key_of(head, tensors)
    if key is None:
        return make()
    device = tensors[0].device
    stream = _current_stream(device)
    plan: Plan = _plans.get(key, make, device, stream)
    if stream is not None and plan.table is not None:
        if _arena.is_low() and not _is_capturing(device):
            _arena.reserve()
        for table in filter(None, (plan.table, plan.gradients)):
            # A table made on another stream must not be freed before this stream has used it.
            table.rows.record_stream(stream)
            table.owners.record_stream(stream)
    return plan


def _key_of(head: Hashable, tensors: Sequence[Tensor]) -> Hashable | None:
    """Return the cache key, or None if a tensor has no address, as a sparse tensor."""
    try:
        contiguous = tuple(map(Tensor.is_contiguous, tensors))
        return (
            head,
            tuple(map(Tensor.data_ptr, tensors)),
            tuple(map(_dtype_of, tensors)),
            tuple(map(Tensor.size, tensors)),
            None if all(contiguous) else tuple(map(Tensor.stride, tensors)),
        )
    except RuntimeError:
        return None


def build_table(
    roles: Sequence[Sequence[Tensor | None]],
    positions: Sequence[int],
    chunk: int,
    device: torch.device | None = None,
) -> PointerTable:
    """Build the table of n tensors in each of 1 to 6 roles, in chunks of `chunk` elements.

    Args:
        roles: lists of n >= 1 fp32/bf16/fp16 tensors or None. The i-th tensors of all lists are
            flat together (see are_flat).
        positions: n numbers, for the column POSITION.
        chunk: elements of one program.
        device: the table's device; by default that of the first tensor of the first role.

    Raises: RuntimeError: a CUDA graph is being captured, and no earlier call reserved memory.
    """
    device = device or next(tensor.device for tensor in roles[0] if tensor is not None)
    numels = [0 if tensor is None else tensor.numel() for tensor in roles[0]]
    counts = tuple(-(-numel // chunk) for numel in numels)
    codes = [
        [ABSENT if tensor is None else _CODE_OF[tensor.dtype] for tensor in role] for role in roles
    ]
    packed = (
        sum(code << (CODE_BITS * role) for role, code in enumerate(group))
        for group in zip(*codes, strict=True)
    )
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in role] for role in roles]
    unused = [itertools.repeat(0)] * (ROW - POINTER - len(roles))
    firsts = itertools.accumulate(counts, initial=0)
    rows = zip(firsts, numels, packed, positions, *addresses, *unused, strict=False)

    def make_owners() -> Tensor:
        # Computed on the device, so that only n numbers are copied there.
        return torch.repeat_interleave(_upload(counts, device), output_size=sum(counts))

    return PointerTable(
        _upload(itertools.chain.from_iterable(rows), device).view(-1, ROW),
        _owners.get((counts, device), make_owners, device, _current_stream(device)),
        tuple(_common_code(role) for role in codes),
    )


def _common_code(codes: Sequence[int]) -> int | None:
    present = set(codes) - {ABSENT}
    if len(present) > 1:
        return MIXED
    return present.pop() if present else None


def are_flat(tensors: Sequence[Tensor]) -> bool:
    """Return True if tensors of one shape can be treated as 1-D: dense, with equal strides."""
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    shape = tensors[0].shape
    strides = [
        [stride for stride, size in zip(tensor.stride(), shape, strict=True) if size != 1]
        for tensor in tensors
    ]
    return tensors[0].numel() == 0 or (
        is_dense(tensors[0]) and all(other == strides[0] for other in strides)
    )


def is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill one range of memory, each once, in any dimension order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Return True if two elements may share memory, as in an expanded tensor.

    This is False for every view made by slicing, selecting, transposing or splitting a dimension.
    It can be True for an as_strided view with interleaved dimensions whose elements are distinct.
    """
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    extent = 1  # elements spanned by the dimensions so far, from the innermost
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def find_overlap(tensors: Sequence[Tensor], written: int) -> tuple[int, int] | None:
    """Return the indices of two tensors that share memory, one of the first `written`, or None.

    Exact for dense tensors. A tensor with gaps counts as its first element, so that interleaved
    views are accepted.
    """
    ranges = sorted(
        (tensor.data_ptr(), index, _extent(tensor))
        for index, tensor in enumerate(tensors)
        if tensor.numel() > 0
    )
    end, other = -1, -1  # end and index of the range that reaches furthest so far
    for start, index, size in ranges:
        # If that one is only read, an overlap with a written range was already returned.
        if start < end and min(index, other) < written:
            return min(index, other), max(index, other)
        end, other = max((end, other), (start + size, index))
    return None


def ranges_of(tensors: Iterable[Tensor]) -> Ranges:
    """Return the memory of tensors that share none, with find_overlap's rule for gaps."""
    return sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor))
        for tensor in tensors
        if tensor.numel() > 0
    )


def overlaps_ranges(tensor: Tensor, ranges: Ranges) -> bool:
    """Return True if a tensor shares memory with a range, with find_overlap's rule for gaps."""
    if tensor.numel() == 0:
        return False
    start = tensor.data_ptr()
    after = bisect.bisect_left(ranges, (start + _extent(tensor),))  # the first range after it
    return after > 0 and ranges[after - 1][1] > start


def _extent(tensor: Tensor) -> int:
    """Return the bytes of a dense tensor, or of one element of a tensor with gaps."""
    return tensor.nbytes if is_dense(tensor) else tensor.element_size()


@dataclass
class _Entry:
    value: Any
    used: int  # time of the last use
    stream: torch.cuda.Stream | None  # the last stream that waited for `filled`
    filled: torch.cuda.Event | None


class _Cache:
    """A small cache; values that a captured CUDA graph reads are kept forever."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._clock = itertools.count()
        self._in_graphs: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self,
        key: Hashable,
        make: Callable[[], Any],
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> Any:
        """Return the cached value or that of make(), ready for the device's current stream."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.used = next(self._clock)
            if _is_capturing(device):  # earlier work was done before capture began
                self._in_graphs[id(entry.value)] = entry.value
            elif stream is not None and stream != entry.stream:
                assert entry.filled is not None
                stream.wait_event(entry.filled)
                entry.stream = stream
            return entry.value
        value = make()
        # A value made during capture is filled only by replays: no later call may use it.
        if not _is_capturing(device):
            if len(self._entries) >= _CACHED:
                del self._entries[min(self._entries, key=lambda k: self._entries[k].used)]
            filled = None if stream is None else stream.record_event()
            self._entries[key] = _Entry(value, next(self._clock), stream, filled)
        return value


class _Arena:
    """Pinned memory for uploads during capture, when none can be allocated; never reused."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._used = _ARENA_WORDS

    def is_low(self) -> bool:
        """Return True if less than half a block remains."""
        return self._used > _ARENA_WORDS // 2

    def reserve(self) -> None:
        """Reserve a block."""
        self._blocks.append(torch.empty(_ARENA_WORDS, dtype=torch.int64, pin_memory=True))
        self._used = 0

    def take(self, words: int) -> Tensor:
        """Return unused memory, [words] int64."""
        if self._used + words > _ARENA_WORDS:
            raise RuntimeError(
                f"no pinned memory for {words} words of a pointer table during CUDA-graph "
                "capture: call the function once, with tensors on the device, before capturing"
            )
        self._used += words
        return self._blocks[-1][self._used - words : self._used]


_plans, _owners, _arena = _Cache(), _Cache(), _Arena()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _upload(values: Iterable[int], device: torch.device) -> Tensor:
    """Copy at least one integer to a 1-D int64 tensor on `device` without synchronising."""
    host = torch.frombuffer(array.array("q", values), dtype=torch.int64)
    if device.type != "cuda":
        return host.to(device)
    capturing = _is_capturing(device)
    pinned = _arena.take(len(host)).copy_(host) if capturing else host.pin_memory()
    return pinned.to(device, non_blocking=True)

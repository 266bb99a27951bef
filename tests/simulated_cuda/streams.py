"""The order of work on streams, and the faults of code that relies on an order it did not ask for.

Each timeline (a stream, or the host) counts its operations and knows, by events that it waited for,
how many operations of each other timeline come before its next one (a vector clock). Work on the
simulated device is done at once, so a missing wait never changes a result: it is reported instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


class CudaError(RuntimeError):
    """A use of CUDA that is wrong or slow on a GPU, though it works on the simulated one."""


class Timeline:
    """A stream or the host. clock[t]: operations of timeline t that precede its next operation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Counter[Timeline] = Counter()

    def advance(self) -> int:
        """Start an operation; return its number, from 1."""
        self.clock[self] += 1
        return self.clock[self]

    def wait(self, clock: Mapping[Timeline, int]) -> None:
        """Put all operations of `clock` before the next one."""
        self.clock |= clock  # type: ignore[operator]


@dataclass(frozen=True)
class Access:
    """An operation that read or wrote memory."""

    stream: Timeline
    number: int
    operation: str

    def precedes(self, timeline: Timeline) -> bool:
        return self.stream is timeline or timeline.clock[self.stream] >= self.number

    def __str__(self) -> str:
        return f"{self.operation} on {self.stream.name}"


@dataclass(eq=False)
class Memory:
    """Device memory: the stream that allocated it, and the last accesses to it."""

    home: Timeline
    size: int  # bytes
    written: Access | None = None
    reads: dict[Timeline, Access] = field(default_factory=dict)
    recorded: set[Timeline] = field(default_factory=set)  # by record_stream

    def access(self, access: Access, *, write: bool) -> str | None:
        """Note an access; return the problem if it may run before one that it depends on."""
        earlier = [self.written, *(self.reads.values() if write else ())]
        races = [e for e in earlier if e is not None and not e.precedes(access.stream)]
        if write:
            self.written, self.reads = access, {}
        else:
            self.reads[access.stream] = access
        if not races:
            return None
        verb = "writes memory that may still be in use by" if write else "may read before"
        return f"{access} {verb} {races[0]}: wait_stream or wait_event is missing"

    def problem_when_freed(self, host: Timeline) -> str | None:
        """Return the problem if the allocator may reuse the memory while a stream still uses it."""
        for use in filter(None, (self.written, *self.reads.values())):
            known = use.precedes(self.home) or use.precedes(host)
            if not known and use.stream not in self.recorded:
                return (
                    f"memory allocated on {self.home.name} was freed while {use} may still run: "
                    "record_stream is missing"
                )
        return None

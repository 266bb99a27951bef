"""Host memory that a process may still use."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastdino import distributed

MEMINFO, OWN_CGROUPS, CGROUPS = "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"
# Files of a cgroup with memory: its limits, its use, and the prefix in memory.stat of the sums over
# the cgroups in it. Version 2, then version 1. Above memory.high the kernel slows processes down.
_FILES = (
    (("memory.max", "memory.high"), "memory.current", ""),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
)


def available_memory() -> float:
    """Return the bytes of host memory that can be used without swapping.

    It is the least of what the machine and the cgroups of this process have left, such as those of
    a container or a Slurm job. Cached files count as available. Infinite if the system reports
    nothing.
    """
    return min([_machine_memory(), *map(_cgroup_memory, _own_cgroups())])


def memory_per_rank() -> float:
    """Return the least share of a rank in the available memory of its machine.

    The ranks on a machine have equal shares. All ranks must call it, and get the same number.
    """
    memories = distributed.gather((socket.gethostname(), available_memory()))
    ranks = Counter(host for host, _ in memories)
    return min(memory / ranks[host] for host, memory in memories)


def _machine_memory() -> float:
    try:
        fields = dict(line.partition(":")[::2] for line in _lines(Path(MEMINFO)))
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError, IndexError):
        return float("inf")


def _own_cgroups() -> Iterator[Path]:
    """Yield the folders of the cgroups of this process and those around them.

    In a container, the path may be that of the host, and only the outermost folder exists.
    """
    try:
        lines = _lines(Path(OWN_CGROUPS))
    except OSError:
        return
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path(CGROUPS, "memory") if controllers else Path(CGROUPS)
        folder = root / path.strip("/")
        yield from (folder, *folder.parents[: len(folder.parts) - len(root.parts)])


def _lines(file: Path) -> list[str]:
    """Read lines whose names may have any bytes."""
    return os.fsdecode(file.read_bytes()).split("\n")


def _cgroup_memory(folder: Path) -> float:
    """Return limit - use + cached files of a cgroup; infinite without a limit.

    A use that is not reported counts as 0, and so do cached files.
    """
    for limits, use, prefix in _FILES:
        limit = min(_number(folder / name, float("inf")) for name in limits)
        if limit < float("inf"):
            remaining = limit - _number(folder / use, 0) + _cached_files(folder, prefix)
            return min(limit, max(0, remaining))
    return float("inf")


def _number(file: Path, default: float) -> float:
    """Read a number; `default` without one, such as for "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return default


def _cached_files(folder: Path, prefix: str) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(stat[f"{prefix}{state}_file"]) for state in ("active", "inactive"))
    except (OSError, ValueError, KeyError):
        return 0

"""Host memory that a process may still use."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastdino import distributed

MEMINFO, OWN_CGROUPS, CGROUPS = "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"
# Files of a cgroup with memory: its limit, its use, and the prefix in memory.stat of the sums over
# the cgroups in it. Version 2, then version 1.
_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
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
    found = distributed.gather((socket.gethostname(), available_memory()))
    ranks = Counter(host for host, _ in found)
    return min(memory / ranks[host] for host, memory in found)


def _machine_memory() -> float:
    try:
        lines = dict(line.split(":") for line in Path(MEMINFO).read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return float("inf")


def _own_cgroups() -> Iterator[Path]:
    """Yield the folders of the cgroups of this process and those around them.

    In a container, the path may be that of the host, and only the outermost folder exists.
    """
    try:
        lines = Path(OWN_CGROUPS).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path(CGROUPS, "memory") if controllers else Path(CGROUPS)
        folder = root / path.strip("/")
        yield from (folder, *folder.parents[: len(folder.parts) - len(root.parts)])


def _cgroup_memory(folder: Path) -> float:
    """Return limit - use + cached files of a cgroup; infinite without a limit."""
    for limit, use, prefix in _FILES:
        try:
            most = int((folder / limit).read_text())  # fails for "max"
            used = int((folder / use).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(stat[f"{prefix}{state}_file"]) for state in ("active", "inactive"))
        except (OSError, ValueError, KeyError):
            continue
        return max(0, most - used + cached)
    return float("inf")

"""Lines of a log.txt: one JSON object per epoch."""

from __future__ import annotations

import json
from pathlib import Path

from fastdino.files import append, atomic_write


def drop_log_lines(log: Path, epoch: int) -> None:
    """Remove the lines of `epoch` and later epochs, and incomplete lines, from a log.txt.

    Lines that are not a log's are moved to the end of log.old.txt.
    """
    *lines, last = log.read_bytes().split(b"\n")
    if epoch_of(last) is not None:  # else empty, or cut off when the run was killed
        lines.append(last)
    kept, foreign = [], []
    for line in lines:
        of = epoch_of(line)
        if of is None:
            foreign.append(line + b"\n")
        elif of < epoch:
            kept.append(line + b"\n")
    if foreign:
        append(b"".join(foreign), log.with_name("log.old.txt"))
    with atomic_write(log) as file:
        file.write(b"".join(kept))


def epoch_of(line: bytes) -> int | None:
    """Return the epoch of a line of a log; None if it is not one."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return None
    return epoch if isinstance(epoch, int) else None

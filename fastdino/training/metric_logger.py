"""The interface of a logger of metrics (--logger), and what its implementations share.

All loggers log the values of a step under its iteration. A resumed run continues their curves: what
an interrupted run logged after its last checkpoint is removed, or not logged a second time.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastdino.files import explain_write_errors

Pixels = NDArray[np.uint8]


class MetricLogger(Protocol):
    """A logger; its methods may raise any exception.

    Attributes: problem: "... cannot be written", for a warning.
    """

    problem: str

    def restart(self, iteration: int, *, new: bool) -> None:
        """Start or continue; values of `iteration` and later ones will be logged again.

        new: the values belong to another run than those that are there.
        """

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Log a value for each of the named curves; names are KIND/NAME."""

    def add_image(self, name: str, pixels: Pixels, iteration: int) -> None:
        """Log a picture [height, width, 3]."""

    def flush(self, iteration: int) -> None:
        """Write buffered values; `iteration` is the next one."""

    def close(self) -> None:
        """Write buffered values and end."""


class Origin(NamedTuple):
    """The run that a logger belongs to.

    Attributes:
        folder: of the run, an existing one.
        settings: what the logger attaches to its run: the config, versions, the git commit.
        info: prints a line.
    """

    folder: Path
    settings: Mapping[str, Any]
    info: Callable[[str], None]


class Position:
    """The identity of a run in a service, and what it has been sent, in a file of the run's folder.

    A service keeps what it was sent, so a resumed run must not send an iteration a second time.

    Args: path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.run_id = ""
        self._sent: dict[str, int] = {}  # the last iteration of each kind of values

    def load(self) -> None:
        """Read the file, if there is one that can be read."""
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
            self.run_id = str(state["run_id"])
            self._sent = {str(kind): int(i) for kind, i in state["sent"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.run_id, self._sent = "", {}

    def begin(self, run_id: str = "") -> None:
        """Begin a new run, with a random id if none is given.

        Raises: CheckpointError: the file cannot be written.
        """
        self.run_id, self._sent = run_id or secrets.token_hex(6), {}
        with explain_write_errors(self._path):
            self._save()

    def advance(self, kind: str, iteration: int) -> bool:
        """Return True, once, for each iteration of a kind: it is to be sent now."""
        if iteration <= self._sent.get(kind, -1):
            return False
        self._sent[kind] = iteration
        self._save()
        return True

    def _save(self) -> None:
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(
            json.dumps({"run_id": self.run_id, "sent": self._sent}) + "\n", encoding="utf-8"
        )
        os.replace(part, self._path)


def new_values(position: Position, values: Mapping[str, float], iteration: int) -> dict[str, float]:
    """Return the values that were not sent yet; names are KIND/NAME."""
    kinds = {name.partition("/")[0] for name in values}
    unsent = {kind for kind in sorted(kinds) if position.advance(kind, iteration)}
    return {name: value for name, value in values.items() if name.partition("/")[0] in unsent}

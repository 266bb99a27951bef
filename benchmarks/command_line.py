"""The command of a benchmark, for its page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

# Environment variables that change the figures.
VARIABLES = ("OMP_NUM_THREADS", "TRITON_INTERPRET")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """Return the command that runs a module of this folder, with the VARIABLES that are set."""
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES if _is_set(name)]
    return " ".join([*variables, "python -m", f"benchmarks.{module}", *map(shlex.quote, arguments)])


def _is_set(name: str) -> bool:
    return bool(os.environ.get(name))

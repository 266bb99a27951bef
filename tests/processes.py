"""Two processes that know of each other, as torchrun starts them, the imports done once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

# What takes long to import: once, by the process that all others are forked off.
EVALS = ("davis", "linear", "retrieval")
PRELOADED = [
    "fastdino.cli",
    "fastdino.training.loop",
    *(f"fastdino.evals.{name}" for name in EVALS),
]


def run_two(function: Callable[..., None], *args: Any) -> None:
    """Runs function(*args), picklable, in two processes on one port; raises what one raises."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _one_of_two,
        (port, dict(os.environ), function, args),
        nprocs=2,
        start_method="forkserver",
    )


def run_commands_in_two(*lines: list[str]) -> None:
    """Runs command lines of `fastdino` one after the other, each in two processes; all end well."""
    run_two(_run_commands, lines)


def _one_of_two(
    rank: int, port: int, environment: dict[str, str], function: Callable[..., None], args: Any
) -> None:
    # The server's environment is that of the test which started it.
    os.environ.clear()
    os.environ.update(environment)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    function(*args)


def _run_commands(lines: tuple[list[str], ...]) -> None:
    from fastdino import cli

    for line in lines:
        assert cli.main(line) == 0


def is_running(pid: int) -> bool:
    """Return True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

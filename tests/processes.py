"""Functions and commands in several ranks, like torchrun, with shared imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.local_ranks import free_port, rank_variables
from fastdino import cpu_speed

# Modules with slow imports, imported once by the fork server.
EVALS = ("davis", "linear", "retrieval")
PRELOADED = [
    "fastdino.cli",
    "fastdino.training.loop",
    *(f"fastdino.evals.{name}" for name in EVALS),
]


def make_measurements_ties(patch: pytest.MonkeyPatch) -> None:
    """Let every measurement of this CPU be a tie, so that runs choose the same everywhere."""
    patch.setattr(cpu_speed, "bf16_speedup", lambda: 1.0)
    patch.setattr(cpu_speed, "matmul_speedup", lambda inputs: 1.0)
    patch.setattr(cpu_speed, "onednn_speedup", lambda rows, dim: 1.0)


def run_two(function: Callable[..., None], *args: Any) -> None:
    """Run the picklable function(*args) in two ranks; raise the error of a rank."""
    run_ranks(2, function, *args)


def run_ranks(ranks: int, function: Callable[..., None], *args: Any) -> None:
    """Run the picklable function(*args) in several ranks; raise the error of a rank."""
    port = _prepare()
    torch.multiprocessing.start_processes(
        _run_rank,
        (ranks, port, dict(os.environ), function, args),
        nprocs=ranks,
        start_method="forkserver",
    )


def start_ranks(ranks: int, function: Callable[..., None], *args: Any) -> list[Any]:
    """Start the picklable function(*args) in several ranks; return the processes."""
    port, context = _prepare(), multiprocessing.get_context("forkserver")
    environment = dict(os.environ)
    processes = [
        context.Process(target=_run_rank, args=(i, ranks, port, environment, function, args))
        for i in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def end_ranks(processes: list[Any], seconds: float) -> list[int]:
    """Return the exit statuses of processes; those that do not end in time are killed."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _prepare() -> int:
    """Start the fork server; return a free port."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return free_port()


@contextmanager
def locked_elsewhere(path: Path, seconds: float = 60) -> Iterator[None]:
    """Hold a file_lock in another process until the end of the block, `seconds` at most."""
    code = (
        "import pathlib, select, sys; from fastdino.files import file_lock\n"
        "with file_lock(pathlib.Path(sys.argv[1]), wait=True):\n"
        "    print('locked', flush=True); select.select([sys.stdin], [], [], float(sys.argv[2]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        yield
        other.communicate(b"\n")


def run_commands_in_two(*lines: list[str]) -> None:
    """Run each command line of `fastdino` in two ranks and assert exit status 0."""
    run_two(_run_commands, lines)


def _run_rank(
    rank: int,
    ranks: int,
    port: int,
    environment: dict[str, str],
    function: Callable[..., None],
    args: Any,
) -> None:
    # The fork server has the environment of the test that started it.
    os.environ.clear()
    os.environ.update(environment)
    os.environ |= rank_variables(rank, ranks, port)
    torch.set_num_threads(1)
    make_measurements_ties(pytest.MonkeyPatch())  # as in conftest.py
    gc.freeze()  # collections would visit, and so copy, all that the fork server has imported
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

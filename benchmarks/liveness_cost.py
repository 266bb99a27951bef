"""Measure what the signs of life between ranks cost a step: two ranks, with and without the thread.

    python -m benchmarks.liveness_cost --write benchmarks/results/cpu

Rounds with and without the thread alternate, each in a process group of its own. The ratio is that
of the two medians of a round. The CPU time of the thread is measured apart, because it does not
depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.spawn import start_processes

from benchmarks.command_line import command_line
from benchmarks.local_ranks import free_port, rank_variables
from fastdino import TrainConfig, Trainer, distributed
from fastdino.bench.report import facts_table, log, quartiles, wrap, write_report
from fastdino.environment import environment
from fastdino.liveness import Liveness

RANKS, WARMUP_STEPS = 2, 3
CONFIG = TrainConfig(
    arch="vit_nano", out_dim=1024, global_crops_size=32, local_crops_size=16, local_crops_number=2,
    batch_size_per_gpu=2, epochs=1, warmup_epochs=0, device="cpu",
)  # fmt: skip


def measure(seconds: float, *, watched: bool) -> dict[str, float]:
    """Return the median seconds of a step in a process group, and the thread's share of a core."""
    sizes = (CONFIG.global_crops_size,) * 2 + (CONFIG.local_crops_size,) * CONFIG.local_crops_number
    crops = [torch.randn(CONFIG.batch_size_per_gpu, 3, size, size) for size in sizes]
    watch = Liveness._watch if watched else lambda liveness: None
    with (
        mock.patch.object(Liveness, "_watch", watch),
        distributed.process_group(torch.device("cpu"), "env://"),
    ):
        trainer, steps = Trainer(CONFIG, 1 << 20), []
        for _ in range(WARMUP_STEPS):
            trainer.train_step(crops)
        begin, used = time.perf_counter(), _thread_seconds()
        while distributed.from_main(lambda: time.perf_counter() - begin < seconds):
            before = time.perf_counter()
            trainer.train_step(crops)
            steps.append(time.perf_counter() - before)
        share = (_thread_seconds() - used) / (time.perf_counter() - begin)
    return {"step": median(steps), "share": share}


def _thread_seconds() -> float:
    """Return the CPU seconds of the thread that gives the signs of life; 0 if it does not run."""
    assert distributed._exchange is not None
    thread = distributed._exchange.liveness._thread
    if not thread.is_alive() or thread.ident is None:
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def run_rank(rank: int, port: int, rounds: int, seconds: float, folder: Path) -> None:
    """Measure all rounds on a rank, and write them to a file."""
    os.environ |= rank_variables(rank, RANKS, port)
    torch.set_num_threads(1)
    results = []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        results.append({watched: measure(seconds, watched=watched) for watched in order})
        if rank == 0:
            log(f"round {number}: {results[-1]}")
    (folder / f"{rank}.json").write_text(json.dumps([[r[False], r[True]] for r in results]))


def report(rounds: Sequence[Any], command: str, facts: dict[str, str]) -> str:
    """Return liveness_cost.md."""
    ratios = [watched["step"] / without["step"] for of in rounds for without, watched in of]
    low, high = quartiles(ratios)
    shares = [median(watched["share"] for _, watched in of) for of in rounds]
    step = median(without["step"] for of in rounds for without, _ in of)
    text = (
        f"{CONFIG.arch}, {RANKS} ranks (gloo) on one machine, {len(rounds[0])} rounds. By "
        f"`{command}`. Step with the signs of life / step without them: {median(ratios):.3f} "
        f"({low:.3f} to {high:.3f}; median and quartiles over rounds and ranks; a step without "
        f"them takes {1e3 * step:.0f} ms). CPU time of the thread: {1e3 * shares[0]:.2f} ms per "
        f"second on rank 0, {1e3 * shares[1]:.2f} on rank 1. Load of the machine in the last "
        f"minute: {os.getloadavg()[0]:.1f}."
    )
    return "\n\n".join(["# Cost of the signs of life", wrap(text), facts_table(facts)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round, with or without")
    parser.add_argument("--write", type=Path, help="folder of liveness_cost.md and .json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start_processes(
            run_rank, (free_port(), options.rounds, options.seconds, folder), nprocs=RANKS,
            start_method="fork",
        )  # fmt: skip
        rounds = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    facts = environment(torch.device("cpu"), ("torch",), {})
    command = command_line("liveness_cost", arguments)
    text = report(rounds, command, facts)
    print(text)
    if options.write:
        record = {"command": command, "environment": facts, "rounds": rounds}
        write_report(options.write, "liveness_cost", text, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

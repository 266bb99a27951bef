"""Measure how long a save of a checkpoint stops the training, with and without a writer thread.

    python -m benchmarks.save_times --write benchmarks/results/cpu

In each round, and for both modes: a step, a direct save, and a save in a thread during which steps
are taken until it is written. The former check of the values made several passes over each tensor.
Times in which a thread waits for a core are not counted (/proc/thread-self/schedstat), so that
other processes of the machine matter less.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.command_line import command_line
from fastdino import TrainConfig, Trainer, checkpoint
from fastdino.bench.report import facts_table, log, quartiles, table, wrap, write_report
from fastdino.environment import environment
from fastdino.errors import CheckpointError
from fastdino.training.checkpoint_writer import CheckpointWriter
from fastdino.training.host_copy import tensors_of

MODES = ("parity", "fast")
PARTS = (
    "former check", "check", "write", "stopped by a direct save, before",
    "stopped by a save in the thread", "thread", "step", "step during a write",
)  # fmt: skip


COPY_BYTES = 1 << 28
SCHEDULER = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, and waiting for one


def clock() -> float:
    """Return seconds without those in which this thread waited for a core."""
    waited = int(SCHEDULER.read_text().split()[1]) if SCHEDULER.exists() else 0
    return time.perf_counter() - waited * 1e-9


def seconds_of(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = clock()
    call()
    return clock() - started


def copy_bandwidth() -> float:
    """Return the bytes per second of a large copy, reads and writes counted."""
    source, target = torch.ones(2, COPY_BYTES // 4)
    return 2 * COPY_BYTES / median(seconds_of(lambda: target.copy_(source)) for _ in range(5))


def former_check(tensors: Sequence[Tensor]) -> None:
    """Check the values as before: isfinite makes five passes over a tensor and its copies."""
    assert all(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).tolist())


def measure_round(trainer: Trainer, step: Callable[[], object], path: Path) -> dict[str, float]:
    """Return the seconds of each of PARTS once."""
    state = trainer.state_dict()
    floats = [tensor for _, tensor in tensors_of(state) if tensor.is_floating_point()]
    seconds = {"step": seconds_of(step), "former check": seconds_of(lambda: former_check(floats))}
    seconds["check"] = seconds_of(lambda: checkpoint.check_finite(state))
    seconds["write"] = seconds_of(lambda: checkpoint.write(state, path))
    seconds[PARTS[3]] = seconds["former check"] + seconds["write"]
    return seconds


def measure_background(
    trainer: Trainer, step: Callable[[], object], path: Path, writer: CheckpointWriter
) -> dict[str, float]:
    """Return the seconds of a save in the thread, and the mean of the steps during its write."""
    written: list[float] = []
    ended = threading.Event()

    def write(copied: dict[str, Any]) -> None:
        try:
            written.append(seconds_of(lambda: checkpoint.write(copied, path)))
        finally:
            ended.set()

    def save() -> None:
        state = trainer.state_dict()
        checkpoint.check_finite(state)
        writer.start(state, write, again=write)

    stopped = seconds_of(save)
    steps: list[float] = []
    while not (steps and ended.is_set()):
        steps.append(seconds_of(step))
    if not writer.finish():
        raise CheckpointError(f"{path} was not written: see the warning")
    # The write ends during the last step.
    during = sum(steps[:-1]) / (len(steps) - 1) if len(steps) > 1 else steps[0]
    return {PARTS[4]: stopped, "thread": written[0], "step during a write": during}


def measure(config: TrainConfig, rounds: int, folder: Path) -> tuple[list[dict[str, float]], int]:
    """Return the seconds of all rounds, after one that does not count, and the bytes of a state."""
    trainer, path = Trainer(config, 10_000), folder / "checkpoint.pth"
    writer = CheckpointWriter(log)
    size, images = config.global_crops_size, config.batch_size_per_gpu
    crops = [torch.randn(images, 3, size, size) for _ in range(config.ncrops)]

    def step() -> float:
        return trainer.train_step(crops).item()

    step()
    results = []
    for number in range(rounds + 1):
        seconds = measure_round(trainer, step, path)
        seconds |= measure_background(trainer, step, path, writer)
        log(f"{config.mode} {number}: " + ", ".join(f"{k} {v:.3f}" for k, v in seconds.items()))
        results.append(seconds)
    return results[1:], sum(tensor.nbytes for _, tensor in tensors_of(trainer.state_dict()))


def markdown(
    results: dict[str, list[dict[str, float]]], size: int, bandwidth: float, about: str
) -> str:
    """Return the table, with the prediction of a stop from the bytes and the bandwidth."""
    heads = ["seconds", *(f"--mode {mode}" for mode in results)]
    rows = []
    for part in PARTS:
        row = [part]
        for rounds in results.values():
            values = [seconds[part] for seconds in rounds]
            low, high = quartiles(values)
            row.append(f"{median(values):.3f} ({low:.3f} to {high:.3f})")
        rows.append(row)
    ratios = ["step during a write / step"]
    for rounds in results.values():
        ratios.append(f"{median(r['step during a write'] / r['step'] for r in rounds):.2f}")
    # The check reads the state, the copy reads and writes it; bandwidth counts reads and writes.
    predicted = 3 * size / bandwidth
    text = (
        f"{about} A state has {size / 1e9:.3f} GB, and a copy of 0.27 GB {bandwidth / 1e9:.1f} "
        f"GB/s (bytes read and written): predicted stop of a save in the thread "
        f"{predicted:.2f} s (check: 1 read; copy: 1 read, 1 write). Median and quartiles."
    )
    return "\n\n".join(["# Time of a save", wrap(text), table(heads, [*rows, ratios])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--batch_size_per_gpu", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="of the files (default: a temporary one)")
    parser.add_argument("--write", type=Path, help="folder of save_times.md and .json")
    options = parser.parse_args(arguments)
    results, size = {}, 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for mode in MODES:
            config = TrainConfig(
                arch=options.arch,
                out_dim=options.out_dim,
                batch_size_per_gpu=options.batch_size_per_gpu,
                local_crops_number=0,
                freeze_last_layer=0,
                drop_path_rate=0.0,
                device="cpu",
                mode=mode,
            )
            results[mode], size = measure(config, options.rounds, Path(temporary))
    bandwidth = copy_bandwidth()
    command = command_line("save_times", arguments)
    about = (
        f"{options.arch}, K = {options.out_dim}, 2 global crops of {options.batch_size_per_gpu} "
        f"images per step, {options.rounds} rounds. By `{command}`."
    )
    facts = environment(torch.device("cpu"), ("torch", "numpy"), {})
    text = markdown(results, size, bandwidth, about) + "\n\n" + facts_table(facts) + "\n"
    print(text)
    if options.write:
        record = {"command": command, "environment": facts, "bytes": size, "rounds": results}
        record |= {"copy_bytes_per_second": bandwidth}
        write_report(options.write, "save_times", text, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

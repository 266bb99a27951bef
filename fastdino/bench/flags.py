"""The flags of `fastdino bench`, and the choice between its two benchmarks."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import ModuleType
from typing import Any

from fastdino.bench import loader_benchmark, step_benchmark
from fastdino.bench.baselines import loaders, steps
from fastdino.config import add_arguments, user_path
from fastdino.errors import ConfigError

# Settings of a run that both benchmarks share; the batch size has a default in each.
SHARED = (
    "num_workers", "global_crops_size", "local_crops_size", "local_crops_number", "seed", "device",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastdino bench`."""
    batch = {kind: values["batch_size_per_gpu"] for kind, values in step_benchmark.DEFAULTS.items()}
    parser.add_argument(
        "--loader",
        action="store_true",
        help="measure data loaders and decoding (images/s, cores used) instead of the training "
        "step",
    )
    parser.add_argument(
        "--data_path",
        type=user_path,
        help="images, as for `fastdino train` (default: noise for the step, generated JPEGs for "
        "the loaders)",
    )
    parser.add_argument(
        "--baselines",
        "--arms",
        help="comma-separated baselines (default: all that can run). For the step: "
        f"{', '.join(steps.BASELINES)}; for the loaders: {', '.join(loaders.BASELINES)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds per baseline (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds per round of a baseline (default: 3)"
    )
    parser.add_argument("--output", type=user_path, help="folder for the tables as .md and .json")
    parser.add_argument(
        "--batch_size_per_gpu",
        type=int,
        help=f"images per step (default: {batch['cuda']} on a GPU, {batch['cpu']} on a CPU) or per "
        f"batch of a loader (default: {loader_benchmark.BATCH})",
    )
    add_arguments(parser, SHARED)
    step_benchmark.configure(parser)
    loader_benchmark.configure(parser)


def main(args: argparse.Namespace) -> int:
    """Run the requested benchmark and return the exit status.

    Raises: ConfigError: a flag of the other benchmark, a number out of range, or an --output that
        cannot be created.
    """
    for flag, default in _flags_of(step_benchmark if args.loader else loader_benchmark).items():
        if getattr(args, flag) != default:
            raise ConfigError(f"--{flag} {'does not go' if args.loader else 'goes'} with --loader")
    for flag in ("seconds", "timeout", "time_limit", "step_ms", "backward_ms"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{flag} must be a finite number above 0, got {value}")
    if args.output:
        try:
            Path(args.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output {args.output} cannot be created ({error.strerror}): use another folder"
            ) from error
    return loader_benchmark.main(args) if args.loader else step_benchmark.main(args)


def _flags_of(benchmark: ModuleType) -> dict[str, Any]:
    """Return the flags of one benchmark alone, with their defaults."""
    parser = argparse.ArgumentParser()
    benchmark.configure(parser)
    return vars(parser.parse_args([]))

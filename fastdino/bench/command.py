"""The flags of `fastdino bench`, and which benchmark they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

from fastdino.bench import arms, loaders
from fastdino.bench.step import arms as step_arms
from fastdino.bench.step import run as step
from fastdino.config import add_arguments
from fastdino.errors import ConfigError

# Settings of a run that both benchmarks take; the batch has a default of its own in each.
SHARED = (
    "num_workers", "global_crops_size", "local_crops_size", "local_crops_number", "seed", "device",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino bench`."""
    parser.add_argument(
        "--loader",
        action="store_true",
        help="the loaders, not the training step: images/s and cores used, others' and ours, and "
        "of decoding alone",
    )
    parser.add_argument(
        "--data_path",
        help="images, whatever `fastdino train` takes; without it the step takes noise, and the "
        "loaders JPEGs that are generated for the while",
    )
    parser.add_argument(
        "--arms",
        help="which to compare, by comma (default: all that can run here). Of the step: "
        f"{', '.join(step_arms.ARMS)}; of the loaders: {', '.join(arms.ARMS)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each arm (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds of a round of an arm (default: 3)"
    )
    parser.add_argument("--output", help="folder that gets the tables as .md and .json")
    parser.add_argument(
        "--batch_size_per_gpu",
        type=int,
        help=f"images a step (default: {step.DEFAULTS['cuda']['batch_size_per_gpu']} on a GPU, "
        f"{step.DEFAULTS['cpu']['batch_size_per_gpu']} on a CPU), or of a loader's batch "
        f"(default: {loaders.BATCH})",
    )
    add_arguments(parser, SHARED)
    step.configure(parser)
    loaders.configure(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark that was asked for.

    Raises: ConfigError: flags of the other one, an --output that cannot be made.
    """
    for flag, default in _flags_of(step if args.loader else loaders).items():
        if getattr(args, flag) != default:
            raise ConfigError(f"--{flag} {'does not go' if args.loader else 'goes'} with --loader")
    if args.output:  # before anything is measured
        try:
            Path(args.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output {args.output} cannot be made ({error.strerror}): name another folder"
            ) from error
    return loaders.main(args) if args.loader else step.main(args)


def _flags_of(part: ModuleType) -> dict[str, Any]:
    """The flags that are one benchmark's alone, with their defaults."""
    parser = argparse.ArgumentParser()
    part.configure(parser)
    return vars(parser.parse_args([]))

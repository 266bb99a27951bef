"""The flags of `fastdino bench`, and which benchmark they ask for."""

from __future__ import annotations

import argparse

from fastdino.bench.step import run


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino bench`."""
    parser.add_argument("--data_path")
    parser.add_argument("--arms")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output")
    run.configure(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark that was asked for."""
    return run.main(args)

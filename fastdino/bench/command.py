"""The flags of `fastdino bench`, and which benchmark they ask for."""

from __future__ import annotations

import argparse

from fastdino.bench import loaders
from fastdino.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastdino bench`."""
    parser.add_argument(
        "--loader",
        action="store_true",
        help="the loaders: images/s and cores used, others' and ours, and of decoding alone",
    )
    loaders.configure(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark that was asked for."""
    if not args.loader:
        raise ConfigError("say what to measure: --loader (images/s of the loaders)")
    return loaders.main(args)

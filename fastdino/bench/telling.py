"""What both benchmarks tell in the same way: progress, tables, the machine; mistakes in numbers."""

from __future__ import annotations

import argparse
import math
import platform
import sys
import textwrap
from collections.abc import Mapping, Sequence

from fastdino.environment import commit, processor, version
from fastdino.errors import ConfigError


def say(line: str) -> None:
    """Progress, beside the report."""
    print(line, file=sys.stderr, flush=True)


def wrapped(text: str) -> str:
    """In lines of at most 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def facts_table(facts: Mapping[str, str]) -> str:
    """Names and values, in Markdown, without heads."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {v} |" for name, v in facts.items())])


def environment(cores: str, facts: Mapping[str, str], packages: Sequence[str]) -> dict[str, str]:
    """What figures are measured on: the machine, more `facts`, versions of what is installed."""
    machine = {
        "processor": processor(),
        "cores": cores,
        "commit": commit(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    versions = {package: version(package) for package in packages}
    return {
        **machine,
        **facts,
        **{name: found for name, found in versions.items() if found != "not installed"},
    }


def check_numbers(
    args: argparse.Namespace, *, at_least_one: Sequence[str], above_zero: Sequence[str]
) -> None:
    """Raises ConfigError for flags whose numbers cannot be; one that is None was not given."""
    for flag in at_least_one:
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} must be at least 1, got {value}")
    for flag in above_zero:
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{flag} must be a finite number above 0, got {value}")

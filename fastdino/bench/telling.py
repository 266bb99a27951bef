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


def check_above_zero(args: argparse.Namespace, *names: str) -> None:
    """Raises ConfigError where one of these flags is no finite number above 0; None passes."""
    for flag in names:
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{flag} must be a finite number above 0, got {value}")

"""Markdown tables and report files, shared by all benchmarks."""

from __future__ import annotations

import json
import statistics
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def log(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def wrap(text: str) -> str:
    """Wrap text at 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def facts_table(facts: Mapping[str, str]) -> str:
    """Return a Markdown table of names and values, without heads."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {v} |" for name, v in facts.items())])


def cell(form: str, value: float | None) -> str:
    """Format a value; "-" for None."""
    return "-" if value is None else form.format(value)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def write_report(folder: Path, name: str, markdown: str, record: Any) -> None:
    """Write NAME.md and NAME.json into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

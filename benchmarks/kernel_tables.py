"""Convert pytest-benchmark's JSON to Markdown tables and a short JSON.

python -m benchmarks.kernel_tables bench.json [more.json ...] [--write FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fastdino.bench.report import table, write_report

STATISTICS = ("median", "iqr", "rounds")  # of pytest-benchmark
RATIOS = {"paper": "x paper's code", "compile": "x torch.compile"}
EXPLANATION = """\
Medians. GB/s: the bytes that the operation must move, equal for all baselines of a table, per
second; `of copy`: that relative to the bandwidth of a copy in the same run. Peak MB: peak memory of
a call beyond its inputs, its result included. The last columns: speedups over that baseline. *: the
GPU waited for the host; such a baseline is compared by the time of a whole call."""


@dataclass(frozen=True)
class Row:
    """One baseline of a group: seconds, and the bytes that the operation must move."""

    group: str
    baseline: str
    role: str
    median: float
    iqr: float
    rounds: int
    call_seconds: float
    queued: bool
    bytes: int
    note: str
    peak_bytes: int
    copy_gbps: float

    @property
    def gbps(self) -> float:
        return self.bytes / self.median / 1e9

    @property
    def share_of_copy(self) -> float:
        return self.gbps / self.copy_gbps


def read_rows(files: Iterable[Path]) -> list[Row]:
    """Read the rows of pytest-benchmark's JSON files in the order in which they ran."""
    return [
        Row(**{name: record["stats"][name] for name in STATISTICS}, **record["extra_info"])
        for file in files
        for record in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    ]


def read_row_lines(file: Path) -> list[Row]:
    """Read the rows that the suites appended with --rows; none without a file."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # without an incomplete line
    return [Row(**json.loads(line)) for line in lines]


def speedup(row: Row, base: Row) -> float:
    """Compare device times; whole calls if the GPU waited for the host in either."""
    if row.queued and base.queued:
        return base.median / row.median
    return base.call_seconds / row.call_seconds


def speedup_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the speedups over each role of RATIOS that is in the group, by heading."""
    columns = {}
    for role, heading in RATIOS.items():
        base = next((row for row in rows if row.role == role), None)
        if base is not None:
            columns[heading] = [f"{speedup(row, base):.2f}" for row in rows]
    return columns


def format_seconds(seconds: float) -> str:
    """Format with three digits in us, ms or s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1e3 * size else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.2g} us"


def group_table(rows: Sequence[Row]) -> str:
    """Return the table of one group."""
    columns = {
        "baseline": [row.baseline for row in rows],
        "median": [format_seconds(row.median) + ("" if row.queued else "*") for row in rows],
        "IQR": [format_seconds(row.iqr) for row in rows],
    }
    if any(abs(row.call_seconds - row.median) > 1e-3 * row.median for row in rows):
        columns["per call, host and gaps included"] = [format_seconds(r.call_seconds) for r in rows]
    if rows[0].bytes:
        columns["GB/s"] = [f"{row.gbps:.3g}" for row in rows]
        columns["of copy"] = [f"{row.share_of_copy:.0%}" for row in rows]
        columns["peak MB"] = [f"{row.peak_bytes / 1e6:.3g}" for row in rows]
    columns |= speedup_columns(rows)
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def tables(rows: Sequence[Row]) -> str:
    """Return the tables of all groups with an explanation."""
    if not rows:
        return "No benchmark was measured.\n"
    sections = [EXPLANATION]
    for group, members in groupby(rows, key=lambda row: row.group):
        listed = list(members)
        first = listed[0]
        counted = (
            f"{first.bytes / 1e6:.1f} MB: {first.note}; copy: {first.copy_gbps:.0f} GB/s."
            if first.bytes
            else first.note
        )
        sections.append(f"### {group}\n\n{counted}\n\n{group_table(listed)}")
    return "\n\n".join(sections) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows with the values derived in the tables."""
    return [asdict(row) | {"gbps": row.gbps, "share_of_copy": row.share_of_copy} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, help="folder for benchmarks.md and .json")
    options = parser.parse_args(arguments)
    rows = read_rows(options.files)
    print(tables(rows))
    if options.write:
        write_report(options.write, "benchmarks", f"# Benchmarks\n\n{tables(rows)}", as_json(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

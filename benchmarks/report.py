"""Turns the JSON of pytest-benchmark into tables, in Markdown, and into one short JSON.

python -m benchmarks.report bench.json [more.json ...] [--write FOLDER]
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

RATIOS = {"paper": "x paper's code", "compile": "x torch.compile"}


@dataclass(frozen=True)
class Row:
    """One variant of one group; times in seconds, `bytes` what the operation must move."""

    group: str
    variant: str
    role: str
    median: float
    iqr: float
    rounds: int
    call_seconds: float
    queued: bool
    bytes: int
    words: str
    peak_bytes: int
    copy_gbps: float

    @property
    def gbps(self) -> float:
        return self.bytes / self.median / 1e9

    @property
    def share_of_copy(self) -> float:
        return self.gbps / self.copy_gbps


def read_rows(files: Iterable[Path]) -> list[Row]:
    """The rows of pytest-benchmark's JSON files, in the order in which they ran."""
    rows = []
    for file in files:
        for record in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]:
            stats, info = record["stats"], record["extra_info"]
            rows.append(
                Row(median=stats["median"], iqr=stats["iqr"], rounds=stats["rounds"], **info)
            )
    return rows


def times_faster(row: Row, base: Row) -> float:
    """Device time by device time; where the host set the pace of either, whole calls."""
    if row.queued and base.queued:
        return base.median / row.median
    return base.call_seconds / row.call_seconds


def ratios(rows: Sequence[Row]) -> dict[str, list[str]]:
    """For each heading of RATIOS whose role is in the group: how many times faster each row is."""
    columns = {}
    for role, heading in RATIOS.items():
        base = next((row for row in rows if row.role == role), None)
        if base is not None:
            columns[heading] = [f"{times_faster(row, base):.2f}" for row in rows]
    return columns


def format_seconds(seconds: float) -> str:
    """Three digits, in us, ms or s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1e3 * size else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.2g} us"


def table(rows: Sequence[Row]) -> str:
    """One group."""
    columns = {
        "variant": [row.variant for row in rows],
        "median": [format_seconds(row.median) + ("" if row.queued else "*") for row in rows],
        "IQR": [format_seconds(row.iqr) for row in rows],
    }
    if any(abs(row.call_seconds - row.median) > 1e-3 * row.median for row in rows):
        columns["a call, host and gaps included"] = [format_seconds(r.call_seconds) for r in rows]
    if rows[0].bytes:
        columns["GB/s"] = [f"{row.gbps:.3g}" for row in rows]
        columns["of copy"] = [f"{row.share_of_copy:.0%}" for row in rows]
        columns["peak MB"] = [f"{row.peak_bytes / 1e6:.3g}" for row in rows]
    columns |= ratios(rows)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


def tables(rows: Sequence[Row]) -> str:
    """All groups, and how to read them."""
    if not rows:
        return "No benchmark was measured.\n"
    sections = [
        "Medians. GB/s: the bytes that the operation must move at least, the same for every\n"
        "variant of a table, by its time; `of copy`: that by the bandwidth of a copy in the same\n"
        "run. Peak MB: what a call holds at most beyond its inputs, its result included. The last\n"
        "columns: how many times faster than that variant. *: the GPU waited for the host; such a\n"
        "variant is compared by the time of a whole call."
    ]
    for group, members in groupby(rows, key=lambda row: row.group):
        listed = list(members)
        first = listed[0]
        counted = (
            f"{first.bytes / 1e6:.1f} MB: {first.words}; copy: {first.copy_gbps:.0f} GB/s."
            if first.bytes
            else first.words
        )
        sections.append(f"### {group}\n\n{counted}\n\n{table(listed)}")
    return "\n\n".join(sections) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, with what the tables derive from them."""
    return [asdict(row) | {"gbps": row.gbps, "share_of_copy": row.share_of_copy} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, help="folder for benchmarks.md and .json")
    options = parser.parse_args(arguments)
    rows = read_rows(options.files)
    print(tables(rows))
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "benchmarks.md").write_text(f"# Benchmarks\n\n{tables(rows)}", "utf-8")
        text = json.dumps(as_json(rows), indent=1)
        (options.write / "benchmarks.json").write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

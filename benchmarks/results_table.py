"""Set measurements next to predictions, and write the measured rows of the README's first table.

    python -m benchmarks.results_table                      # predictions, for each measured device
    python -m benchmarks.results_table --readme README.md   # replace the measured rows

Measurements are the JSON files in benchmarks/results/<device>/: report.json and more.json of
`make gpu-report`, or benchmarks.json, step.json and loader.json of the single commands. Predicted
ranges, floors and goals are in benchmarks/results/targets.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastdino.bench.report import table

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
Values = dict[str, float]
Measurements = dict[tuple[str, str], Values]  # (group, baseline) -> quantity -> value


@dataclass(frozen=True)
class Prediction:
    """A quantity of one baseline: predicted range, floor that physics sets, goal.

    group: title of a comparison; may contain `*`. unit: shown after the numbers; times are in its
    unit, everything else is as measured.
    """

    name: str
    group: str
    baseline: str
    quantity: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    goal: float | None = None
    source: str = ""

    @property
    def predicted(self) -> str:
        """Return the range as text."""
        ends = list(dict.fromkeys(_number(x) for x in (self.low, self.high) if x is not None))
        return " - ".join(ends) or "-"

    def measured(self, measurements: Measurements) -> float | None:
        """Return the measured value; None without one."""
        for (group, baseline), values in measurements.items():
            if fnmatchcase(group, self.group) and baseline == self.baseline:
                return values.get(self.quantity)
        return None


def read_predictions(file: Path = RESULTS / "targets.json") -> list[Prediction]:
    """Read the predictions."""
    return [Prediction(**record) for record in json.loads(file.read_text(encoding="utf-8"))]


def prediction_table(record: Mapping[str, Any]) -> str:
    """Return the table of all predictions next to the measurements of a report."""
    measurements = measurements_of(record)
    rows = []
    for one in read_predictions():
        value = one.measured(measurements)
        cells = [f"{one.name}, {one.unit}" if one.unit else one.name]
        cells += ["-" if x is None else _number(x) for x in (one.floor,)]
        cells += [one.predicted, "-" if one.goal is None else _number(one.goal)]
        cells += [NOT_MEASURED if value is None else _number(value), _verdict(one, value)]
        rows.append([*cells, one.source])
    heads = ("", "floor", "predicted", "goal", "measured", "against the prediction", "source")
    return table(heads, rows)


def _verdict(one: Prediction, value: float | None) -> str:
    if value is None or one.low is None or one.high is None:
        return "-"
    if one.low <= value <= one.high:
        return "within"
    return f"{value / (one.low if value < one.low else one.high):.2f} x"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# Measurements


def measurements_of(record: Any) -> Measurements:
    """Collect the measurements of one JSON file of any kind."""
    if isinstance(record, list):
        return _kernels(record)
    found: Measurements = {}
    if "rates" in record:
        found["device", ""] = dict(record["rates"])
    found |= _kernels(record.get("benchmarks", []))
    for bench in [*record.get("benches", []), record]:
        if "arms" in bench:
            found |= _loaders(bench) if isinstance(bench["arms"], dict) else _steps(bench)
    return found


def _kernels(rows: Sequence[Mapping[str, Any]]) -> Measurements:
    found: Measurements = {}
    for row in rows:
        values = {
            "us": 1e6 * row["median"],
            "host_us": 1e6 * row["call_seconds"],
            "gbps": row["gbps"],
            "percent_of_copy": 100 * row["share_of_copy"],
            "peak_mb": row["peak_bytes"] / 1e6,
        }
        for other in rows:
            if other["group"] == row["group"] and other["role"] in ("paper", "compile"):
                whole = not (row["queued"] and other["queued"])
                time = "call_seconds" if whole else "median"
                values[f"x_{other['role']}"] = other[time] / row[time]
        found[row["group"], row["baseline"]] = values
    return found


def _steps(record: Mapping[str, Any]) -> Measurements:
    s = record["settings"]
    group = f"Step, {s['arch']}/{s['patch_size']}, B = {s['batch_size_per_gpu']}"
    found: Measurements = {}
    for arm in record["arms"]:
        if "images_per_second" in arm:
            rate = arm["images_per_second"]
            values = {"images_per_second": rate, "ms": 1e3 * arm["images"] / rate}
            values |= {"mfu_percent": 100 * arm["mfu"], "x_paper": arm["times_paper"]}
            found[group, arm["name"]] = _known(values)
    return found


def _loaders(record: Mapping[str, Any]) -> Measurements:
    group = f"Loaders, B = {record['settings']['batch_size_per_gpu']}"
    keys = {
        "images_per_second": "images_per_second",
        "times_paper": "x_paper",
        "times_less_cpu_than_paper": "x_paper_cpu",
    }
    return {
        (group, name): _known({new: arm.get(old) for old, new in keys.items()})
        for name, arm in record["arms"].items()
    }


def _known(values: Mapping[str, float | None]) -> Values:
    return {name: value for name, value in values.items() if value is not None}


def read_folder(folder: Path) -> Measurements:
    """Collect the measurements of all JSON files of one device."""
    found: Measurements = {}
    for file in sorted(folder.glob("*.json")):
        found |= measurements_of(json.loads(file.read_text(encoding="utf-8")))
    return found


# The README


@dataclass(frozen=True)
class Claim:
    """A row of the README's first table; text formats the values of one baseline."""

    title: str
    group: str
    baseline: str
    text: Callable[[Values], str]
    command: str
    page: str


CPU_CLAIMS = (
    Claim(
        "loader speed, CPU",
        "Loaders, B = 32",
        "fused",
        lambda v: f"{v['x_paper_cpu']:.1f} times less CPU time per image than the paper's loader",
        "fastdino bench --loader",
        "loader.md",
    ),
    Claim(
        "loss speed, CPU",
        "DINO loss, forward + backward, B16 V10 K65536 float32",
        "fastdino_kernels",
        lambda v: (
            f"forward and backward {v['x_paper']:.1f} times faster than the paper's code, B = 16, "
            "V = 10, K = 65536, fp32"
        ),
        "make bench",
        "benchmarks.md",
    ),
    Claim(
        "step speed, CPU",
        "Step, vit_tiny/16, B = 8",
        "ours-fast",
        lambda v: f"{v['x_paper']:.2f} times the paper's step, ViT-Ti/16, fp32",
        "fastdino bench",
        "step.md",
    ),
)


def _step_claim(title: str, baseline: str, what: str) -> Claim:
    return Claim(
        title,
        "Step, vit_tiny/16, B = 8",
        baseline,
        lambda v: f"{v['x_paper']:.2f} times the paper's fp32 step, in {what}, ViT-Ti/16",
        "fastdino bench",
        "step.md",
    )


# Folders of the kinds of processors.
ON_CPUS = {
    "cpu": CPU_CLAIMS,
    "cpu/amd_epyc_avx512": (
        _step_claim("step speed, CPU with AVX-512", "ours-fast", "bf16"),
        _step_claim("fp32 step speed, AMD CPU with AVX-512", "ours-fp32", "fp32"),
    ),
    "cpu/intel_xeon_amx": (_step_claim("step speed, CPU with AMX", "ours-fast", "bf16"),),
}
GPU_CLAIMS = (
    Claim(
        "loss speed",
        "DINO loss, forward + backward, B64 V10 K65536 bfloat16",
        "fastdino_kernels",
        lambda v: (
            f"forward and backward in {v['us']:.0f} us, {v['x_paper']:.1f} times faster than the "
            "paper's code, B = 64, V = 10, K = 65536, bf16"
        ),
        "make gpu-report",
        "report.md",
    ),
    Claim(
        "step speed",
        "Step, vit_small/16, B = 64",
        "ours-graph",
        lambda v: (
            f"{v['images_per_second']:.0f} images/s, {v['x_paper']:.2f} times the paper's step, "
            "ViT-S/16, B = 64"
        ),
        "make gpu-report",
        "report.md",
    ),
    Claim(
        "optimizer speed",
        "Clip, AdamW, EMA, vit_small K65536",
        "fastdino_kernels.AdamWEMA",
        lambda v: (
            f"clip, AdamW and EMA of ViT-S in {v['us']:.0f} us, {v['percent_of_copy']:.0f} % of "
            "the copy bandwidth"
        ),
        "make gpu-report",
        "report.md",
    ),
    Claim(
        "crop speed",
        "Loaders, B = 64",
        "kernel",
        lambda v: f"{v['images_per_second']:.0f} images/s of 2 + 8 exact crops",
        "make gpu-report",
        "report.md",
    ),
)
UNMEASURED = "| speed on a GPU | needs a GPU to be measured | `make gpu-report` |"


def readme_rows(results: Path = RESULTS) -> list[str]:
    """Return the measured rows: those of the CPUs, then those of every GPU."""
    rows = [
        row
        for folder, claims in ON_CPUS.items()
        for row in _claim_rows(claims, results, folder, "")
    ]
    gpus = sorted(file.parent for file in results.glob("*/report.json"))
    gpu_rows = [
        row
        for gpu in gpus
        for row in _claim_rows(GPU_CLAIMS, results, gpu.name, f", {_device(gpu)}")
    ]
    return rows + (gpu_rows or [UNMEASURED])


def _device(folder: Path) -> str:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return str(report["environment"].get("device", folder.name))


def _claim_rows(claims: Sequence[Claim], results: Path, folder: str, device: str) -> Iterator[str]:
    measurements = read_folder(results / folder)
    for claim in claims:
        values = measurements.get((claim.group, claim.baseline))
        if values is not None:
            link = f"[table](benchmarks/results/{folder}/{claim.page})"
            yield f"| {claim.title}{device} | {claim.text(values)} | `{claim.command}` ({link}) |"


def replace_rows(readme: str, rows: Sequence[str]) -> str:
    """Replace the rows of the first table that start with one of the claims' titles."""
    titles = [claim.title for claims in (*ON_CPUS.values(), GPU_CLAIMS) for claim in claims]
    starts = tuple(f"| {title}" for title in [*titles, "speed on a GPU"])
    lines: list[str] = []
    first = math.inf
    for line in readme.splitlines():
        if line.startswith(starts):
            first = min(first, len(lines))
        else:
            lines.append(line)
    if first == math.inf:
        raise ValueError(f"expected a table with a row that starts with one of {starts}")
    return "\n".join([*lines[: int(first)], *rows, *lines[int(first) :]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, help="file whose measured rows are replaced")
    options = parser.parse_args(arguments)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(replace_rows(text, readme_rows()), encoding="utf-8")
        return 0
    reports = sorted(RESULTS.glob("*/report.json"))
    for report in reports:
        print(f"## {_device(report.parent)}\n")
        print(prediction_table(json.loads(report.read_text(encoding="utf-8"))), "\n")
    if not reports:
        print(prediction_table({}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

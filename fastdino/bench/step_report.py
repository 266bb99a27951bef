"""The results of the step benchmark as Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastdino.bench.correctness import Verdict
from fastdino.bench.flops import ModelFlops, Peak
from fastdino.bench.harness import Outcome
from fastdino.bench.report import cell, facts_table, median, quartiles, table, wrap
from fastdino.bench.scaling import Scaling
from fastdino.bench.step_profile import PARTS, Breakdown

BASE = "paper"
EXPLANATION = """\
Medians and quartiles of interleaved rounds, synchronized at their ends only. `x paper`: images/s
relative to `paper` in the same round, likewise. MFU: the model's FLOPs per second as a share of the
peak in the step's precision; executed: the same with the FLOPs that the step executed. First steps:
of the correctness check and after it, compilation included. Memory: {memory}. Launches: {launches}.
Reads: values read back to the host per step."""
MEMORY = {
    "cuda": "peak allocation during a step, with networks and optimizer",
    "cpu": "saved for the backward pass, without parameters and crops",
}
LAUNCHES = {
    "cuda": "kernels, copies and graphs per step",
    "cpu": "operators per step, without those that only create a view or allocate",
}
PARTS_EXPLANATION = """\
Milliseconds of one step under the profiler, which slows it down: {time}. Rest: time outside all
parts, the host's work and waiting. The kernels of a CUDA graph are not separated."""
TIME = {"cuda": "time on the GPU", "cpu": "time on the CPU"}


@dataclass
class StepResult:
    """Results of one training step.

    note: about its check and its settings. images: per step. first_steps: seconds, compilation
    included. memory: bytes. executed: FLOPs per image.
    """

    name: str
    title: str
    verdict: Verdict
    outcome: Outcome
    images: int
    note: str = ""
    precision: str = ""
    first_steps: float = 0.0
    memory: int = 0
    executed: float = 0.0
    breakdown: Breakdown | None = None

    @property
    def seconds(self) -> list[float]:
        """Return the seconds per step of each round."""
        return [self.images / rate for rate in self.outcome.rates]


@dataclass(frozen=True)
class DiskFeed:
    """Throughput on images from the disk; wait: seconds per step spent waiting for crops."""

    name: str
    loader: str
    images_per_second: float
    wait: float
    of_synthetic: float


@dataclass(frozen=True)
class StepReport:
    """The report of a run.

    kind: cuda or cpu. peaks: of the timed steps' precisions. problem: why it is incomplete, or "".
    """

    environment: dict[str, str]
    settings: dict[str, Any]
    kind: str
    results: Sequence[StepResult]
    missing: dict[str, str]
    flops: ModelFlops
    peaks: Mapping[str, Peak]
    problem: str = ""
    feed: DiskFeed | None = None
    scaling: Scaling | None = None

    @property
    def failed(self) -> bool:
        """Return True if the run is incomplete or a baseline failed."""
        return bool(self.problem) or any(result.outcome.reason for result in self.results)

    @property
    def base(self) -> Outcome:
        """Return the outcome of the paper's step; one without samples if it was left out."""
        return next((r.outcome for r in self.results if r.name == BASE), Outcome())

    def summary(self) -> str:
        """Return one line with the throughputs and the failures."""
        rates = [
            f"{result.name} {statistics.median(result.outcome.rates):.4g}"
            for result in self.results
            if result.outcome.samples
        ]
        failed = [result.name for result in self.results if result.outcome.reason]
        parts = [f"images/s: {', '.join(rates) or 'none'}"]
        parts += [f"not timed: {', '.join(failed)}"] if failed else []
        return "; ".join([*parts, *([self.problem] if self.problem else [])])

    def markdown(self) -> str:
        """Return step.md."""
        s = self.settings
        about = (
            f"{s['arch']}/{s['patch_size']}, B = {s['batch_size_per_gpu']} images of 2 crops of "
            f"{s['global_crops_size']} px and {s['local_crops_number']} of "
            f"{s['local_crops_size']} px, K = {s['out_dim']}, drop path {s['drop_path_rate']:g}; "
            f"{s['rounds']} rounds. The model takes {self.flops.total / 1e9:.4g} GFLOP per image."
        )
        for precision, peak in self.peaks.items():
            about += f" Peak in {precision}: {peak.flops / 1e12:.3g} TFLOP/s, {peak.source}."
        explanation = EXPLANATION.format(memory=MEMORY[self.kind], launches=LAUNCHES[self.kind])
        parts = ["# Training step", "Written by `fastdino bench`.", facts_table(self.environment)]
        parts += [f"**{self.problem}**"] if self.problem else []
        parts += [wrap(about), self._results_table(), wrap(explanation)]
        parts += ["## Parts", wrap(PARTS_EXPLANATION.format(time=TIME[self.kind]))]
        parts += [self._parts_table(), "## Correctness", self._verdict_table()]
        if self.feed is not None:
            line = (
                f"`{self.feed.name}`, crops from {self.feed.loader}: "
                f"{self.feed.images_per_second:.4g} images/s, {self.feed.of_synthetic:.0%} of the "
                f"rate with crops in memory; {1e3 * self.feed.wait:.3g} ms per step waiting for "
                "data."
            )
            parts += ["## Images from the disk", wrap(line)]
        return "\n\n".join([*parts, *([self.scaling.markdown()] if self.scaling else [])])

    def _results_table(self) -> str:
        heads = (
            "baseline", "images/s", "quartiles", "x paper", "precision", "MFU", "executed",
            "memory, MB", "launches", "reads", "first steps, s", "what",
        )  # fmt: skip
        rows = [self._row(result) for result in self.results]
        rows += [[name, "left out", *["-"] * 9, why] for name, why in self.missing.items()]
        return table(heads, rows)

    def _row(self, result: StepResult) -> list[str]:
        rates, parts = result.outcome.rates, result.breakdown
        if not rates:
            return [result.name, "not timed", *["-"] * 9, result.title]
        speedups = result.outcome.speedups(self.base)
        executed = self.utilization(result, result.executed) if result.executed else None
        return [
            result.name,
            f"{statistics.median(rates):.4g}",
            "{:.4g} - {:.4g}".format(*quartiles(rates)),
            _spread(speedups) if speedups else "-",
            result.precision,
            f"{self.utilization(result, self.flops.total):.1%}",
            cell("{:.1%}", executed),
            f"{result.memory / 1e6:.0f}",
            cell("{}", parts.launches if parts else None),
            cell("{}", parts.reads if parts else None),
            f"{result.first_steps:.1f}",
            result.title,
        ]

    def utilization(self, result: StepResult, flops: float) -> float:
        """Return the share of its precision's peak that a step reaches with `flops` per image."""
        peak = self.peaks[result.precision].flops
        return statistics.median(result.outcome.rates) * flops / peak

    def _parts_table(self) -> str:
        rows = []
        for result in self.results:
            profile = result.breakdown
            if profile is None:
                continue
            seconds: list[float | None] = [*(profile.parts[part] for part in PARTS), profile.rest]
            if not profile.backward:  # a CUDA graph
                seconds = [None] * len(seconds)
            seconds += [profile.seconds, profile.backward or None]
            rows.append([result.name, *(cell("{:.3g}", s and 1e3 * s) for s in seconds)])
        return table(["baseline", *PARTS, "rest", "step", "backward pass"], rows)

    def _verdict_table(self) -> str:
        rows = [
            [r.name, str(r.verdict), r.note or "-", r.outcome.reason or "-"] for r in self.results
        ]
        return table(["baseline", "against the paper's step", "note", "problem"], rows)

    def as_json(self) -> dict[str, Any]:
        """Return step.json: all results, with the values derived in the tables."""
        return {
            "environment": self.environment,
            "settings": self.settings,
            "model_flops_an_image": self.flops.total,
            "peaks": {precision: asdict(peak) for precision, peak in self.peaks.items()},
            "arms": [self._record(result) for result in self.results],
            "missing": self.missing,
            "problem": self.problem,
            "fed": self.feed and asdict(self.feed),
            "scaling": self.scaling and asdict(self.scaling),
        }

    def _record(self, result: StepResult) -> dict[str, Any]:
        record = asdict(result)
        del record["verdict"], record["outcome"]
        record |= {
            "gate": {"verdict": str(result.verdict), "green": result.verdict.passed},
            "problem": result.outcome.reason,
            "seconds": result.seconds,
        }
        if result.seconds:
            record |= {
                "images_per_second": statistics.median(result.outcome.rates),
                "quartiles": quartiles(result.outcome.rates),
                "times_paper": median(result.outcome.speedups(self.base)),
                "mfu": self.utilization(result, self.flops.total),
                "executed_mfu": self.utilization(result, result.executed),
            }
        return record


def _spread(values: Sequence[float]) -> str:
    """Format the median and the quartiles."""
    low, high = quartiles(values)
    return f"{statistics.median(values):.2f} ({low:.2f} - {high:.2f})"

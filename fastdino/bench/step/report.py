"""What the benchmark of the step found: tables in Markdown, and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdino.bench.step.breakdown import PARTS, Breakdown
from fastdino.bench.step.flops import ModelFlops, Peak
from fastdino.bench.step.gate import Verdict
from fastdino.bench.step.scaling import Scaled, scaling_table
from fastdino.bench.telling import facts_table, table, wrapped

BASE = "paper"
HOW_TO_READ = """\
Medians and quartiles of interleaved rounds, synchronised at their ends alone. `x paper`: images/s
by those of the arm `paper` in the same round, likewise. MFU: the model's FLOPs a second as a
share of the peak; executed: with the FLOPs that the arm ran, counted. First steps: of the gate and
after it, compilation included. Memory: {memory}. Launches: {launches}. Reads: values read back to
the host in a step."""
MEMORY = {
    "cuda": "most that was allocated during a step, the arm's networks and optimizer included",
    "cpu": "what a step keeps for its backward pass, but parameters and crops",
}
LAUNCHES = {
    "cuda": "kernels, copies and graphs a step",
    "cpu": "operators a step, but those that only make a view or memory",
}
HOW_TO_READ_PARTS = """\
Milliseconds of one step under the profiler, which slows it: {time}. Rest: what falls in no part,
the host's work and waiting. A CUDA graph's kernels are not known apart."""
TIME = {"cuda": "time on the GPU", "cpu": "time on the CPU"}
HOW_TO_READ_SCALING = """\
A model, not a measurement: a step of {step:.4g} ms with a backward pass of {backward:.4g} ms
({source}), {messages} buckets of {gradients:.4g} MB of fp32 gradients in all, 400 GB/s in a node of
8 GPUs and 300 across."""
NO_PREDICTION = "The step's parts are those of a CPU: these figures are no prediction for GPUs."


@dataclass
class ArmResult:
    """What became of an arm. `problem`: why it was not timed, or ""; then the rest is empty.

    note: about its gate. seconds: of a step, in each round. first_steps: seconds, compilation
    included. memory: bytes. executed: FLOPs an image.
    """

    name: str
    title: str
    gate: Verdict
    note: str = ""
    problem: str = ""
    precision: str = ""
    images: int = 0
    seconds: list[float] = field(default_factory=list)
    first_steps: float = 0.0
    memory: int = 0
    executed: float = 0.0
    breakdown: Breakdown | None = None

    @property
    def rates(self) -> list[float]:
        """Images/s of each round."""
        return [self.images / seconds for seconds in self.seconds]

    def times(self, base: ArmResult | None) -> list[float]:
        """How many times faster than `base`, in each round that both took."""
        pairs = zip(self.seconds, base.seconds if base else [], strict=False)
        return [theirs / own for own, theirs in pairs]


@dataclass(frozen=True)
class Fed:
    """A run of an arm on images from the disk. wait: seconds a step spent waiting for crops."""

    name: str
    loader: str
    images_per_second: float
    wait: float
    of_synthetic: float


@dataclass(frozen=True)
class Scaling:
    """The model of many GPUs; see scaling.py. source: where the step's time is from."""

    scaled: Sequence[Scaled]
    step: float
    backward: float
    source: str
    messages: int
    gradients: int
    on_cpu: bool

    def markdown(self) -> str:
        """The section of the report."""
        about = HOW_TO_READ_SCALING.format(
            step=1e3 * self.step,
            backward=1e3 * self.backward,
            source=self.source,
            messages=self.messages,
            gradients=self.gradients / 1e6,
        )
        lines = ["## Many GPUs", "", *([NO_PREDICTION, ""] if self.on_cpu else [])]
        lines += [wrapped(about), ""]
        return "\n".join([*lines, scaling_table(self.scaled)])


@dataclass(frozen=True)
class Report:
    """All that is told. kind: cuda or cpu. problem: why it is not whole, or ""."""

    environment: dict[str, str]
    settings: dict[str, Any]
    kind: str
    arms: Sequence[ArmResult]
    missing: dict[str, str]
    flops: ModelFlops
    peak: Peak
    problem: str = ""
    fed: Fed | None = None
    scaling: Scaling | None = None

    @property
    def failed(self) -> bool:
        """Whether it is not whole, or an arm is red or broke."""
        return bool(self.problem) or any(arm.problem for arm in self.arms)

    def write(self, folder: Path) -> None:
        """step.md and step.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.md").write_text(self.markdown() + "\n", encoding="utf-8")
        text = json.dumps(self.as_json(), indent=1)
        (folder / "step.json").write_text(text + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """The whole as text."""
        lines = ["# Training step", "", "Written by `fastdino bench`.", ""]
        lines += [
            facts_table(self.environment),
            "",
            *([f"**{self.problem}**", ""] if self.problem else []),
        ]
        lines += [wrapped(self._about()), "", self._table(), "", self._how_to_read(), ""]
        lines += ["## Parts", "", wrapped(HOW_TO_READ_PARTS.format(time=TIME[self.kind])), ""]
        lines += [self._parts_table(), "", "## Gate", "", self._gate_table()]
        if self.fed is not None:
            lines += ["", "## Images from the disk", "", wrapped(self._fed_line(self.fed))]
        if self.scaling is not None:
            lines += ["", self.scaling.markdown()]
        return "\n".join(lines)

    def summary(self) -> str:
        """One line."""
        timed = [arm for arm in self.arms if arm.seconds]
        rates = [f"{arm.name} {statistics.median(arm.rates):.4g}" for arm in timed]
        broken = [arm.name for arm in self.arms if arm.problem]
        return "; ".join(
            [
                f"images/s: {', '.join(rates) or 'none'}",
                *([f"not timed: {', '.join(broken)}"] if broken else []),
                *([self.problem] if self.problem else []),
            ]
        )

    def _about(self) -> str:
        s = self.settings
        return (
            f"{s['arch']}/{s['patch_size']}, B = {s['batch_size_per_gpu']} images of 2 crops of "
            f"{s['global_crops_size']} px and {s['local_crops_number']} of "
            f"{s['local_crops_size']} px, K = {s['out_dim']}, drop path {s['drop_path_rate']:g}; "
            f"{s['rounds']} rounds. The model takes {self.flops.total / 1e9:.4g} GFLOP an image; "
            f"peak: {self.peak.flops / 1e12:.3g} TFLOP/s, {self.peak.source}."
        )

    def _how_to_read(self) -> str:
        text = HOW_TO_READ.format(memory=MEMORY[self.kind], launches=LAUNCHES[self.kind])
        return wrapped(text)

    def _table(self) -> str:
        base = next((arm for arm in self.arms if arm.name == BASE), None)
        heads = (
            "arm", "images/s", "quartiles", "x paper", "precision", "MFU", "executed",
            "memory, MB", "launches", "reads", "first steps, s", "what",
        )  # fmt: skip
        rows = []
        for arm in self.arms:
            if not arm.seconds:
                rows.append([arm.name, "not timed", *["-"] * 9, arm.title])
                continue
            rate, (low, high) = statistics.median(arm.rates), quartiles(arm.rates)
            times, of = arm.times(base), arm.breakdown
            rows.append(
                [
                    arm.name,
                    f"{rate:.4g}",
                    f"{low:.4g} - {high:.4g}",
                    _spread(times) if times else "-",
                    arm.precision,
                    f"{self.utilisation(arm, self.flops.total):.1%}",
                    f"{self.utilisation(arm, arm.executed):.1%}" if arm.executed else "-",
                    f"{arm.memory / 1e6:.0f}",
                    "-" if of is None else str(of.launches),
                    "-" if of is None else str(of.reads),
                    f"{arm.first_steps:.1f}",
                    arm.title,
                ]
            )
        rows += [[name, "left out", *["-"] * 9, why] for name, why in self.missing.items()]
        return table(heads, rows)

    def utilisation(self, arm: ArmResult, flops: float) -> float:
        """The share of the peak that an arm reaches with so many FLOPs an image."""
        return statistics.median(arm.rates) * flops / self.peak.flops

    def _parts_table(self) -> str:
        rows = []
        for arm in self.arms:
            if arm.breakdown is not None:
                of = arm.breakdown
                parts = [*(of.parts[part] for part in PARTS), of.rest]
                if not of.backward:  # a graph's kernels are not known apart
                    rows.append([arm.name, *["-"] * len(parts), f"{1e3 * of.seconds:.3g}", "-"])
                    continue
                seconds = [*parts, of.seconds, of.backward]
                rows.append([arm.name, *(f"{1e3 * s:.3g}" for s in seconds)])
        return table(["arm", *PARTS, "rest", "step", "backward pass"], rows)

    def _gate_table(self) -> str:
        rows = [[arm.name, str(arm.gate), arm.note or "-", arm.problem or "-"] for arm in self.arms]
        return table(["arm", "against the paper's step", "note", "problem"], rows)

    def _fed_line(self, fed: Fed) -> str:
        return (
            f"`{fed.name}`, crops from {fed.loader}: {fed.images_per_second:.4g} images/s, "
            f"{fed.of_synthetic:.0%} of the rate with crops in memory; {1e3 * fed.wait:.3g} ms a "
            "step waiting for data."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, with what the tables derive from it."""
        base = next((arm for arm in self.arms if arm.name == BASE), None)
        arms = []
        for arm in self.arms:
            record = asdict(arm) | {"gate": {"verdict": str(arm.gate), "green": arm.gate.green}}
            if arm.seconds:
                times = arm.times(base)
                record |= {
                    "images_per_second": statistics.median(arm.rates),
                    "quartiles": quartiles(arm.rates),
                    "times_paper": statistics.median(times) if times else None,
                    "mfu": self.utilisation(arm, self.flops.total),
                    "executed_mfu": self.utilisation(arm, arm.executed),
                }
            arms.append(record)
        return {
            "environment": self.environment,
            "settings": self.settings,
            "model_flops_an_image": self.flops.total,
            "peak": asdict(self.peak),
            "arms": arms,
            "missing": self.missing,
            "problem": self.problem,
            "fed": self.fed and asdict(self.fed),
            "scaling": self.scaling and asdict(self.scaling),
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _spread(values: Sequence[float]) -> str:
    """The median, and the quartiles."""
    low, high = quartiles(values)
    return f"{statistics.median(values):.2f} ({low:.2f} - {high:.2f})"

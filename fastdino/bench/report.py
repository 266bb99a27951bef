"""What the benchmark of loaders found: tables in Markdown, and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastdino.bench.arms import ARMS, BASE
from fastdino.bench.stages import STAGES, StageTimes
from fastdino.bench.telling import facts_table, table
from fastdino.bench.timing import Outcome

HOW_TO_READ = """\
Medians of interleaved rounds. Every arm has a process of its own, kept to the same processors, and
delivers whole batches. `x paper`: images/s by those of the paper's loader in the same round. Cores
used: CPU seconds of all its processes by wall seconds. CPU ms: those of an image; `x paper, CPU`:
how many times less that is than the paper's loader takes, which holds on a busy machine too. Crops:
equal to the paper's bit for bit for the same draws, or near."""
HOW_TO_READ_STAGES = """\
CPU milliseconds of an image on one thread, medians of {rounds} rounds of {images} images, the two
ways in turn. `x`: times faster than Pillow. `x C`: what a throw-away C function reached, beside
Pillow, on another machine. `of C`: our time by what it would be with that function's share of
Pillow's. Without the clocks in between, fused takes {whole:.2f} ms for the crops of an image."""


@dataclass(frozen=True)
class Report:
    """All that is told. stages: None where they were not asked for, or why there are none."""

    environment: dict[str, str]
    settings: dict[str, Any]
    images: dict[str, Any]
    arms: dict[str, Outcome]
    stages: StageTimes | str | None = None

    def markdown(self) -> str:
        """The whole as text."""
        images, settings = self.images, self.settings
        crops = (
            f"2 crops of {settings['global_crops_size']} px and "
            f"{settings['local_crops_number']} of {settings['local_crops_size']} px an image, "
            f"batches of {settings['batch_size_per_gpu']}, {settings['num_workers']} workers or "
            f"threads, delivered on {settings['device']}; {settings['rounds']} rounds of "
            f"{settings['seconds']:g} s."
        )
        about = (
            f"{images['number']} images, {images['width']} x {images['height']} px (median), "
            f"{images['mean_bytes'] / 1e3:.0f} KB (mean); {images['kind']}."
        )
        lines = ["# Loaders", "", "Written by `fastdino bench --loader`.", ""]
        lines += [facts_table(self.environment), "", about, "", crops, "", HOW_TO_READ, ""]
        lines.append(self._table())
        if self.stages is not None:
            lines += ["", "## Stages", "", *self._stage_lines(self.stages)]
        return "\n".join(lines) + "\n"

    def _table(self) -> str:
        heads = (
            "arm", "images/s", "range", "x paper", "cores used", "CPU ms", "x paper, CPU",
            "crops", "what",
        )  # fmt: skip
        rows: list[tuple[str, ...]] = []
        base = self._base()
        for name, outcome in self.arms.items():
            arm = ARMS[name]
            if outcome.status != "measured":
                rows.append((name, outcome.status, *["-"] * 6, f"{arm.what}: {outcome.reason}"))
                continue
            low, high = outcome.range
            rows.append(
                (
                    name,
                    f"{outcome.images_per_second:.4g}",
                    f"{low:.4g} - {high:.4g}",
                    _or_dash("{:.2f}", outcome.times(base)),
                    _or_dash("{:.2f}", outcome.cores),
                    _or_dash("{:.2f}", outcome.cpu_ms),
                    _or_dash("{:.2f}", outcome.times_less_cpu(base)),
                    arm.pixels or "-",
                    arm.what,
                )
            )
        return table(heads, rows)

    def _base(self) -> Outcome:
        """The paper's loader; one without rounds where it was left out."""
        return self.arms.get(BASE, Outcome())

    @staticmethod
    def _stage_lines(stages: StageTimes | str) -> list[str]:
        if isinstance(stages, str):
            return [f"Not measured: {stages}."]
        how = HOW_TO_READ_STAGES.format(
            rounds=stages.rounds, images=stages.images, whole=stages.whole
        )
        rows = [
            (
                stage,
                f"{stages.pillow[stage]:.2f}",
                f"{stages.fused[stage]:.2f}",
                _or_dash("{:.1f}", stages.times(stage)),
                f"{stages.recorded_times(stage):.1f}",
                _or_dash("{:.2f}", stages.of_c(stage)),
            )
            for stage in STAGES
        ]
        return [how, "", table(("stage", "Pillow", "fused", "x", "x C", "of C"), rows)]

    def as_json(self) -> dict[str, Any]:
        """The same for machines, with every round."""
        stages = self.stages
        return {
            "environment": self.environment,
            "settings": self.settings,
            "images": self.images,
            "arms": {name: self._arm_as_json(name) for name in self.arms},
            "stages": stages.as_json() if isinstance(stages, StageTimes) else stages,
        }

    def _arm_as_json(self, name: str) -> dict[str, Any]:
        outcome = self.arms[name]
        about = {"what": ARMS[name].what, "crops": ARMS[name].pixels, "status": outcome.status}
        if outcome.status != "measured":
            return about | {"reason": outcome.reason}
        return about | {
            "images_per_second": outcome.images_per_second,
            "range": outcome.range,
            "times_paper": outcome.times(self._base()),
            "times_less_cpu_than_paper": outcome.times_less_cpu(self._base()),
            "cores_used": outcome.cores,
            "cpu_ms_an_image": outcome.cpu_ms,
            "rounds": [asdict(sample) for sample in outcome.samples],
        }

    def write(self, folder: Path) -> None:
        """loader.md and loader.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "loader.md").write_text(self.markdown(), encoding="utf-8")
        text = json.dumps(self.as_json(), indent=1)
        (folder / "loader.json").write_text(text + "\n", encoding="utf-8")


def _or_dash(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)

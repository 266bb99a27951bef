"""One command for a machine with a GPU: environment, tests on the GPU, benchmarks, one report.

    python3 -m benchmarks.gpu.gpu_report [--more] [--output FOLDER] [--reduced]

With --more a second report: compute-sanitizer, other sizes of the step, a short training.

It needs no network and installs nothing. Each part has a time of its own, and all together stay
below nine minutes; one that fails or hangs is reported, and the others still run. Without a GPU, or
with --reduced, a small form of each runs on the CPU: that shows that the command works, no more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.gpu.subprocesses import ROOT, Part, Result, run_part
from benchmarks.report import Row, as_json, read_rows, tables

TAIL = 60  # lines of the output of what failed
# Seconds. With the grace that a part gets after its time, below nine minutes.
ENVIRONMENT_TIME = 20
TESTS_TIME = 100
SUITES = {"dino_loss": 75, "ema": 20, "clip": 20, "adamw_ema": 30, "overhead": 10}
# The training step and the loaders: the flags of `fastdino bench`, and seconds. Of a step's,
# torch.compile takes most.
BENCHES = {
    "step vit_small": (
        "--arch vit_small --batch_size_per_gpu 64 --rounds 5 --seconds 0.6 --scaling",
        120,
    ),
    "step vit_base": (
        "--arch vit_base --batch_size_per_gpu 64 --rounds 3 --seconds 0.6 "
        "--arms paper,ours,ours-fast",
        45,
    ),
    "loaders": ("--loader --batch_size_per_gpu 64 --rounds 2 --seconds 1", 40),
}
# Of --more: the same, and what compute-sanitizer and compare_modes are given.
MORE_BENCHES = {
    "step vit_small, B = 16": (
        "--arch vit_small --batch_size_per_gpu 16 --rounds 5 --seconds 0.6 "
        "--arms paper,lightly,ours-fast,ours-graph",
        70,
    ),
    "step vit_small, B = 128": (
        "--arch vit_small --batch_size_per_gpu 128 --rounds 3 --seconds 0.6 "
        "--arms paper,ours-fast,compiled",
        60,
    ),
    "step vit_small, patches of 8": (
        "--arch vit_small --patch_size 8 --batch_size_per_gpu 64 --rounds 3 --seconds 0.6 "
        "--arms paper,ours-fast",
        70,
    ),
}
SANITIZER = (
    "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "9",
    "--tool",
)  # fmt: skip
SANITIZER_TIME = 60
TRAINING = ("--arch vit_small --batch_size_per_gpu 64 --images 356 --epochs 10", 120)
REDUCED_MORE_BENCHES = {
    "step vit_nano, B = 1": (
        "--arch vit_nano --batch_size_per_gpu 1 --out_dim 1024 --global_crops_size 64 "
        "--local_crops_size 32 --rounds 1 --steps 1 --arms paper,ours-fast --device cpu",
        60,
    ),
}
REDUCED_TRAINING = ("--batch_size_per_gpu 8 --images 2 --epochs 1 --val_images 1 --device cpu", 120)
# Kernels under the interpreter, which takes long for the largest sizes.
REDUCED_TESTS = (
    "-k", "triton-cpu and not 4096 and not 6553 and not own_size and not accurate",
    "tests/test_ema.py", "tests/test_clip.py", "tests/test_dino_loss.py",
)  # fmt: skip
REDUCED_SUITES = {"dino_loss": 120, "ema": 40, "clip": 40, "adamw_ema": 40, "overhead": 40}
REDUCED_BENCHES = {
    "step vit_nano": (
        "--arch vit_nano --batch_size_per_gpu 2 --out_dim 1024 --global_crops_size 64 "
        "--local_crops_size 32 --rounds 2 --steps 1 --arms paper,ours --device cpu",
        60,
    ),
    "loaders": (
        "--loader --arms paper,fused --batch_size_per_gpu 4 --images 8 --rounds 1 --seconds 0.5 "
        "--global_crops_size 64 --local_crops_size 32 --device cpu",
        90,
    ),
}


@dataclass
class Report:
    """All that is told; written anew after every part, so that nothing measured is lost."""

    environment: dict[str, str]
    reduced: bool
    name: str = "report"
    results: list[Result] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    benches: list[Path] = field(default_factory=list)  # what `fastdino bench` wrote, without suffix

    def markdown(self) -> str:
        lines = [f"# {self.environment.get('device', 'unknown')}", ""]
        if self.reduced:
            lines += ["Reduced: small sizes, to see that all of it runs. These times mean nothing."]
        lines += ["Written by `make gpu-report`.", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self.environment.items()]
        lines += ["", "| part | seconds | result | its last line |", "|---|---|---|---|"]
        for result in self.results:
            verdict = f"**{result.problem}**" if result.problem else "passed"
            last = "" if result is self.results[0] else result.last_line.replace("|", "/")
            lines.append(f"| {result.name} | {result.seconds:.0f} | {verdict} | {last} |")
        lines += ["", *([tables(self.rows)] if self.rows or not self.benches else [])]
        for written in self.benches:  # one heading lower
            text = written.with_suffix(".md").read_text(encoding="utf-8")
            lines += [re.sub("^#", "##", text, flags=re.MULTILINE), ""]
        for result in self.results:
            if result.problem:
                tail = "\n".join(result.output.splitlines()[-TAIL:])
                lines += [f"## {result.name}: {result.problem}", "", f"```\n{tail}\n```", ""]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """<name>.md and <name>.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        record = {
            "reduced": self.reduced,
            "environment": self.environment,
            "parts": [
                {"name": r.name, "seconds": round(r.seconds, 1), "problem": r.problem}
                for r in self.results
            ],
            "benchmarks": as_json(self.rows),
            "benches": [
                json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
                for written in self.benches
            ],
        }
        (folder / f"{self.name}.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )


def environment_of(result: Result) -> dict[str, str]:
    """What benchmarks.environment printed, its last line; {} where it failed."""
    try:
        return dict(json.loads(result.last_line))
    except ValueError:
        return {}


def plan(raw: Path, *, reduced: bool) -> list[Part]:
    """The tests, then a part for each suite and each of BENCHES, which write into `raw`."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    workers = "2" if reduced else "8"
    parallel = ("-n", workers) if importlib.util.find_spec("xdist") else ()
    selection = (
        REDUCED_TESTS if reduced else ("-m", "gpu", "--continue-on-collection-errors", "tests")
    )
    planned = [Part("tests", (*pytest, *parallel, *selection), TESTS_TIME)]
    for name, seconds in (REDUCED_SUITES if reduced else SUITES).items():
        options = [f"--benchmark-json={raw / name}.json", "--benchmark-quiet"]
        quick = ["--quick"] if reduced else []
        command = (*pytest, f"benchmarks/bench_{name}.py", *options, *quick)
        planned.append(Part(f"benchmark {name}", command, seconds))
    return planned + _benches(REDUCED_BENCHES if reduced else BENCHES, raw)


def plan_more(raw: Path, *, reduced: bool) -> list[Part]:
    """The parts of --more; `reduced` without compute-sanitizer, which is for GPUs."""
    small = (sys.executable, "-m", "benchmarks.gpu.sanitize")
    if reduced:
        planned = [Part("each kernel", ("env", "TRITON_INTERPRET=1", *small), SANITIZER_TIME)]
    else:
        planned = [
            Part(tool, (*SANITIZER, tool, *small), SANITIZER_TIME)
            for tool in ("memcheck", "racecheck")
        ]
    planned += _benches(REDUCED_MORE_BENCHES if reduced else MORE_BENCHES, raw)
    flags, seconds = REDUCED_TRAINING if reduced else TRAINING
    command = (sys.executable, "-m", "benchmarks.compare_modes", *flags.split())
    return [*planned, Part("training", (*command, "--write", str(raw / "training")), seconds)]


def _benches(flags_of: Mapping[str, tuple[str, int]], raw: Path) -> list[Part]:
    command = (sys.executable, "-m", "fastdino", "bench")
    return [
        Part(name, (*command, *flags.split(), "--output", str(raw / name)), seconds)
        for name, (flags, seconds) in flags_of.items()
    ]


def read_whole(raw: Path) -> list[Row]:
    """The rows of all suites that have written their JSON, even if interrupted."""
    rows = []
    for name in SUITES:
        try:
            rows += read_rows([raw / f"{name}.json"])
        except (OSError, ValueError):
            continue
    return rows


def slug(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def run_and_report(report: Report, planned: Sequence[Part], raw: Path, folder: Path) -> int:
    """Run the parts; 1 if any had a problem, else 0. What one leaves of its time the next may take.

    torch.compile's time is hard to foresee; the sum of all stays what it is.
    """
    spare = 0.0
    for part in planned:
        part = replace(part, timeout=part.timeout + spare)
        print(f"{part.name}, at most {part.timeout:.0f} s", flush=True)
        result = run_part(part)
        spare = max(0.0, part.timeout - result.seconds)
        print(f"    {result.problem or 'passed'} after {result.seconds:.0f} s", flush=True)
        report.results.append(result)
        report.rows = read_whole(raw)
        report.benches = sorted(file.with_suffix("") for file in raw.glob("*/*.json"))
        report.write(folder)
        for picture in raw.glob("*/*.png"):
            shutil.copy(picture, folder)
    return int(any(result.problem for result in report.results))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder that gets one named after the device")
    parser.add_argument("--more", action="store_true", help="the second report")
    parser.add_argument("--reduced", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)

    command = (sys.executable, "-m", "benchmarks.environment")
    first = run_part(Part("environment", command, ENVIRONMENT_TIME))
    environment = environment_of(first)
    device = environment.get("device", "unknown")
    reduced = options.reduced or device in ("cpu", "unknown")
    report = Report(environment, reduced, "more" if options.more else "report", [first])
    make_plan = plan_more if options.more else plan
    default = ROOT / ("runs/gpu-report" if reduced else "benchmarks/results")
    folder = (options.output or default).resolve() / slug(device)
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary)
        status = run_and_report(report, make_plan(raw, reduced=reduced), raw, folder)
        print(f"\n{report.markdown()}\nWritten to {folder}")
    return status


if __name__ == "__main__":
    sys.exit(main())

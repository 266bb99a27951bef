"""One command for a machine with a GPU: environment, GPU tests, benchmarks, one report.

    python3 -m benchmarks.gpu.gpu_report [--more] [--output FOLDER] [--reduced]

--more writes a second report: compute-sanitizer, other sizes of the step, a short training.

It needs no network and installs nothing. Each task has a time limit, all together below nine
minutes; one that fails or hangs is reported, and the others still run. Without a GPU, or with
--reduced, a small form of each runs on the CPU, which only shows that the command works.
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

from benchmarks.gpu.subprocesses import ROOT, Result, Task, run_task
from benchmarks.kernel_tables import Row, as_json, read_rows, tables
from fastdino.bench.report import facts_table, table, write_report

TAIL = 60  # lines of output of a failed task
# Time limits in seconds. With the grace after each, the sum is below nine minutes.
ENVIRONMENT_TIME = 20
ENVIRONMENT = """
import json, torch
from fastdino.environment import environment
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(json.dumps(environment(device, ("torch", "triton"))))
"""
TESTS_TIME = 100
SUITES = {"dino_loss": 75, "ema": 20, "clip": 20, "adamw_ema": 30, "overhead": 10}
# Flags of `fastdino bench`, and seconds; torch.compile takes most of the first step benchmark.
BENCHES = {
    "step vit_small": (
        "--arch vit_small --batch_size_per_gpu 64 --rounds 5 --seconds 0.6 --scaling",
        120,
    ),
    "step vit_base": (
        "--arch vit_base --batch_size_per_gpu 64 --rounds 3 --seconds 0.6 "
        "--baselines paper,ours,ours-fast",
        45,
    ),
    "loaders": ("--loader --batch_size_per_gpu 64 --rounds 2 --seconds 1", 40),
}
MORE_BENCHES = {
    "step vit_small, B = 16": (
        "--arch vit_small --batch_size_per_gpu 16 --rounds 5 --seconds 0.6 "
        "--baselines paper,lightly,ours-fast,ours-graph",
        70,
    ),
    "step vit_small, B = 128": (
        "--arch vit_small --batch_size_per_gpu 128 --rounds 3 --seconds 0.6 "
        "--baselines paper,ours-fast,compiled",
        60,
    ),
    "step vit_small, patches of 8": (
        "--arch vit_small --patch_size 8 --batch_size_per_gpu 64 --rounds 3 --seconds 0.6 "
        "--baselines paper,ours-fast",
        70,
    ),
}
SANITIZER = (
    "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "9",
    "--tool",
)  # fmt: skip
SANITIZER_TIME = 60
TRAINING = ("--arch vit_small --batch_size_per_gpu 64 --images 356 --epochs 10", 120)
TINY_STEP = (
    "--arch vit_nano --out_dim 1024 --global_crops_size 64 --local_crops_size 32 --steps 1 "
    "--device cpu"
)
REDUCED_MORE_BENCHES = {
    "step vit_nano, B = 1": (
        f"{TINY_STEP} --batch_size_per_gpu 1 --rounds 1 --baselines paper,ours-fast",
        60,
    ),
}
REDUCED_TRAINING = ("--batch_size_per_gpu 8 --images 2 --epochs 1 --val_images 1 --device cpu", 120)
# Kernels under the interpreter, which is slow for the largest sizes.
REDUCED_TESTS = (
    "-k", "triton-cpu and not 4096 and not 6553 and not own_size and not accurate",
    "tests/test_ema.py", "tests/test_clip.py", "tests/test_dino_loss.py",
)  # fmt: skip
REDUCED_TIME = 120  # per suite
REDUCED_BENCHES = {
    "step vit_nano": (
        f"{TINY_STEP} --batch_size_per_gpu 2 --rounds 2 --baselines paper,ours",
        60,
    ),
    "loaders": (
        "--loader --baselines paper,fused --batch_size_per_gpu 4 --images 8 --rounds 1 "
        "--seconds 0.5 --global_crops_size 64 --local_crops_size 32 --device cpu",
        90,
    ),
}


@dataclass
class GpuReport:
    """The results so far, written again after every task, so that nothing measured is lost."""

    environment: dict[str, str]
    reduced: bool
    name: str = "report"
    results: list[Result] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    benches: list[Path] = field(default_factory=list)  # reports of `fastdino bench`, no suffix

    def markdown(self) -> str:
        lines = [f"# {self.environment.get('device', 'unknown')}", ""]
        if self.reduced:
            lines += ["Reduced: small sizes, to see that all of it runs. These times mean nothing."]
        lines += ["Written by `make gpu-report`.", "", facts_table(self.environment), ""]
        rows = []
        for index, result in enumerate(self.results):
            verdict = f"**{result.problem}**" if result.problem else "passed"
            last_line = result.last_line.replace("|", "/") if index else ""
            rows.append([result.name, f"{result.seconds:.0f}", verdict, last_line])
        lines += [table(["task", "seconds", "result", "last line of output"], rows), ""]
        lines += [tables(self.rows)] if self.rows or not self.benches else []
        for written in self.benches:  # headings one level lower
            text = written.with_suffix(".md").read_text(encoding="utf-8")
            lines += [re.sub("^#", "##", text, flags=re.MULTILINE), ""]
        for result in self.results:
            if result.problem:
                tail = "\n".join(result.output.splitlines()[-TAIL:])
                lines += [f"## {result.name}: {result.problem}", "", f"```\n{tail}\n```", ""]
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        return {
            "reduced": self.reduced,
            "environment": self.environment,
            "parts": [
                {"name": r.name, "seconds": round(r.seconds, 1), "problem": r.problem}
                for r in self.results
            ],
            "benchmarks": as_json(self.rows),
            "benches": [
                json.loads(file.with_suffix(".json").read_text("utf-8")) for file in self.benches
            ],
        }


def environment_of(result: Result) -> dict[str, str]:
    """Parse the last line that ENVIRONMENT printed; {} if it failed."""
    try:
        return dict(json.loads(result.last_line))
    except ValueError:
        return {}


def plan(raw: Path, *, reduced: bool) -> list[Task]:
    """Plan the tests, the suites and BENCHES, which write into `raw`."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    workers = "2" if reduced else "8"
    parallel = ("-n", workers) if importlib.util.find_spec("xdist") else ()
    selection = (
        REDUCED_TESTS if reduced else ("-m", "gpu", "--continue-on-collection-errors", "tests")
    )
    tasks = [Task("tests", (*pytest, *parallel, *selection), TESTS_TIME)]
    for name, seconds in SUITES.items():
        options = [f"--benchmark-json={raw / name}.json", "--benchmark-quiet"]
        quick = ["--quick"] if reduced else []
        command = (*pytest, f"benchmarks/bench_{name}.py", *options, *quick)
        limit = REDUCED_TIME if reduced else seconds
        tasks.append(Task(f"benchmark {name}", command, limit))
    return tasks + _bench_tasks(REDUCED_BENCHES if reduced else BENCHES, raw)


def plan_more(raw: Path, *, reduced: bool) -> list[Task]:
    """Plan the tasks of --more; `reduced` leaves out compute-sanitizer, which needs a GPU."""
    kernels = (sys.executable, "-m", "benchmarks.gpu.sanitize")
    if reduced:
        tasks = [Task("each kernel", ("env", "TRITON_INTERPRET=1", *kernels), SANITIZER_TIME)]
    else:
        tasks = [
            Task(tool, (*SANITIZER, tool, *kernels), SANITIZER_TIME)
            for tool in ("memcheck", "racecheck")
        ]
    tasks += _bench_tasks(REDUCED_MORE_BENCHES if reduced else MORE_BENCHES, raw)
    flags, seconds = REDUCED_TRAINING if reduced else TRAINING
    command = (sys.executable, "-m", "benchmarks.compare_modes", *flags.split())
    return [*tasks, Task("training", (*command, "--write", str(raw / "training")), seconds)]


def _bench_tasks(flags_of: Mapping[str, tuple[str, int]], raw: Path) -> list[Task]:
    command = (sys.executable, "-m", "fastdino", "bench")
    return [
        Task(name, (*command, *flags.split(), "--output", str(raw / name)), seconds)
        for name, (flags, seconds) in flags_of.items()
    ]


def read_suites(raw: Path) -> list[Row]:
    """Read the rows of all suites that have written their JSON, complete or not."""
    rows = []
    for name in SUITES:
        try:
            rows += read_rows([raw / f"{name}.json"])
        except (OSError, ValueError):
            continue
    return rows


def slug(device: str) -> str:
    """Turn a device's name into a folder's: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def run_and_report(report: GpuReport, tasks: Sequence[Task], raw: Path, folder: Path) -> int:
    """Run the tasks; returns 1 if one has a problem, else 0.

    Unused time goes to the next task, because the duration of torch.compile is hard to predict.
    """
    spare = 0.0
    for task in tasks:
        task = replace(task, timeout=task.timeout + spare)
        print(f"{task.name}, at most {task.timeout:.0f} s", flush=True)
        result = run_task(task)
        spare = max(0.0, task.timeout - result.seconds)
        print(f"    {result.problem or 'passed'} after {result.seconds:.0f} s", flush=True)
        report.results.append(result)
        report.rows = read_suites(raw)
        report.benches = sorted(file.with_suffix("") for file in raw.glob("*/*.json"))
        write_report(folder, report.name, report.markdown(), report.as_json())
        for picture in raw.glob("*/*.png"):
            shutil.copy(picture, folder)
    return int(any(result.problem for result in report.results))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for one named after the device")
    parser.add_argument("--more", action="store_true", help="write the second report")
    parser.add_argument("--reduced", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)

    first = run_task(Task("environment", (sys.executable, "-c", ENVIRONMENT), ENVIRONMENT_TIME))
    environment = environment_of(first)
    device = environment.get("device", "unknown")
    reduced = options.reduced or device in ("cpu", "unknown")
    report = GpuReport(environment, reduced, "more" if options.more else "report", [first])
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

"""One command for a machine with a GPU: correctness, benchmarks, GPU tests, one report.

    python3 -m benchmarks.gpu.gpu_report [--more] [--output FOLDER] [--reduced]

The first report takes at most 7.5 minutes, --more at most 3.5: what the first report showed broken,
other sizes of the step, compute-sanitizer. Parts run in order of their value. Each has a time
limit, and what it does not use goes to the next one. A part that fails or hangs is killed with all
its processes and reported; the others still run. The report is written again after every part.

It needs no network and installs nothing; lightly, xformers and DALI are used if installed. Without
a GPU, or with --reduced, a small form runs on the CPU, which only shows that the command works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from benchmarks.gpu.subprocesses import GRACE, ROOT, Result, Task, run_tasks
from benchmarks.kernel_tables import Row, as_json, read_row_lines, tables
from benchmarks.results_table import prediction_table
from fastdino.bench.report import facts_table, table, write_report

TAIL = 60  # lines of output of a failed task in the Markdown; the .log file has all of it
TOTAL, TOTAL_MORE = 440, 205  # seconds; imports and the last report need a few more
LEAST = 3  # seconds below which a part is not started

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=40")
BENCH = (PYTHON, "-m", "fastdino", "bench")
# The first suites are the most valuable; each runs its first size before any runs its second one.
FIRST_SUITES = tuple(
    f"benchmarks/bench_{name}.py" for name in ("dino_loss", "adamw_ema", "ema", "clip", "overhead")
)
STEP = "--arch vit_small --batch_size_per_gpu 64 --seconds 0.6"
STEP_BASELINES = "paper,ours-fast,ours-graph,compiled,lightly"
TINY_STEP = (
    "--arch vit_nano --out_dim 1024 --global_crops_size 64 --local_crops_size 32 --steps 1 "
    "--device cpu --batch_size_per_gpu 2 --rounds 2"
)
TINY_LOADER = (
    "--batch_size_per_gpu 4 --images 8 --rounds 1 --seconds 0.5 --global_crops_size 64 "
    "--local_crops_size 32 --device cpu"
)
REDUCED_DEVICE = (PYTHON, "-m", "benchmarks.gpu.device_facts", "--reduced")
SANITIZE = (PYTHON, "-m", "benchmarks.gpu.sanitize")
SANITIZER = (
    "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "9",
    "--tool",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Tasks that run at the same time, and the seconds planned for them.

    Only tasks whose duration is not measured may run next to others.
    """

    name: str
    seconds: float
    tasks: Sequence[Task]


def part(name: str, seconds: float, **commands: Sequence[str]) -> Part:
    """Build a part of commands; `_` in a task's name stands for a space."""
    tasks = [Task(task.replace("_", " "), line, seconds) for task, line in commands.items()]
    return Part(name, seconds, tasks)


def plan(raw: Path) -> list[Part]:
    """Plan the first report; the parts write into `raw`."""
    step = f"{STEP} --rounds 5 --time_limit 115"
    gpu_tests = (*PYTEST, "--continue-on-collection-errors", *workers(8), "tests", "-m")
    warm = f"{STEP} --baselines ours-fast,ours-graph,compiled --rounds 1 --steps 1"
    loaders = "--baselines kernel,fused,paper --batch_size_per_gpu 64 --rounds 2 --seconds 1"
    return [
        device_part(20),
        part(
            "correctness", 60,
            one_case_per_kernel_and_dtype=(
                *PYTEST, *workers(8), "--one-per-dtype", "-m", "accuracy and gpu", *kernel_tests()
            ),
            compile_the_step=(*BENCH, *warm.split()),
            compile_the_loss=(*PYTEST, FIRST_SUITES[0], "-k", "B64 and V10 and compile"),
        ),
        part("kernels", 90, suites=(*PYTEST, *suites(), f"--rows={raw / 'rows.jsonl'}")),
        part("step", 120, vit_small=bench(raw / "step", step, STEP_BASELINES)),
        part("loader", 45, loaders=bench(raw / "loader", f"--loader {loaders}")),
        part("GPU tests", 95, one_case_per_test_and_dtype=(*gpu_tests, "gpu_quick")),
        part("other GPU tests", 10, other_cases=(*gpu_tests, "gpu and not gpu_quick")),
    ]  # fmt: skip


def plan_more(raw: Path, before: dict[str, object]) -> list[Part]:
    """Plan the second report; `before` is the JSON of the first one, {} without."""
    small, base = (
        f"--arch vit_{arch} --batch_size_per_gpu {images} --seconds 0.6"
        for arch, images in (("small", 16), ("base", 64))
    )
    warm = "--rounds 1 --steps 1 --baselines"
    timed = "--rounds 5 --time_limit 60"
    return [
        device_part(15),
        part(
            "checks", 60,
            **failed_before(before),
            memcheck=(*SANITIZER, "memcheck", *SANITIZE),
            racecheck=(*SANITIZER, "racecheck", *SANITIZE),
            compile_vit_small=(*BENCH, *f"{small} {warm} ours-fast,ours-graph".split()),
            compile_vit_base=(*BENCH, *f"{base} {warm} ours-fast".split()),
        ),
        *broken_parts(raw, before),
        part(
            "step, B = 16", 65,
            vit_small=bench(
                raw / "step-16", f"{small} {timed}", "paper,ours-fast,ours-graph,lightly"
            ),
        ),
        part(
            "step, ViT-B/16", 65,
            vit_base=bench(raw / "step-base", f"{base} {timed}", "paper,ours-fast"),
        ),
    ]  # fmt: skip


def device_part(seconds: float) -> Part:
    """Measure the device while the kernels are compiled on all cores."""
    return part(
        "device", seconds,
        device=(PYTHON, "-m", "benchmarks.gpu.device_facts"),
        compile_the_kernels=(PYTHON, "-m", "benchmarks.gpu.compile_ahead"),
    )  # fmt: skip


def failed_before(before: dict[str, object]) -> dict[str, tuple[str, ...]]:
    """Return the task that repeats the failed tests of the first report, if there are any."""
    failed = before.get("failed_tests", [])
    assert isinstance(failed, list)
    return {"tests_that_failed": (*PYTEST, *workers(4), *failed[:100])} if failed else {}


def broken_parts(raw: Path, before: dict[str, object]) -> Iterator[Part]:
    """Yield the measuring parts that had a problem in the first report."""
    parts = before.get("parts", [])
    assert isinstance(parts, list)
    names = [one["name"] for one in parts if one["problem"]]
    for one in plan(raw):
        if one.name in names and one.name in ("kernels", "step", "loader"):
            yield one


def reduced_plan(raw: Path) -> list[Part]:
    """Plan the small form of the first report, which runs on a CPU."""
    one_each = (*PYTEST, *workers(2), "--one-per-dtype", "-m", "accuracy", "-k", "triton-cpu")
    loaders = bench(raw / "loader", f"--loader {TINY_LOADER}", "paper,fused")
    rows = f"--rows={raw / 'rows.jsonl'}"
    return [
        part("device", 60, device=REDUCED_DEVICE),
        part(
            "correctness", 240,
            one_case_per_kernel_and_dtype=(*one_each, "tests/test_clip.py"),
        ),
        part("kernels", 400, suites=(*PYTEST, *suites(), rows, "--quick")),
        part("step", 120, vit_nano=bench(raw / "step", TINY_STEP, "paper,ours")),
        part("loader", 120, loaders=loaders),
        part("GPU tests", 60, tests=(*one_each, "tests/test_ema.py")),
    ]  # fmt: skip


def reduced_plan_more(raw: Path) -> list[Part]:
    """Plan the small form of the second report."""
    return [
        part("device", 60, device=REDUCED_DEVICE),
        part("each kernel", 200, sanitize=("env", "TRITON_INTERPRET=1", *SANITIZE)),
        part("step, B = 2", 120, vit_nano=bench(raw / "step-2", TINY_STEP, "paper,ours-fast")),
    ]


def bench(output: Path, flags: str, baselines: str = "") -> tuple[str, ...]:
    """Return a command of `fastdino bench`."""
    chosen = ("--baselines", baselines_here(baselines)) if baselines else ()
    return (*BENCH, *flags.split(), *chosen, "--output", str(output))


def baselines_here(names: str) -> str:
    """Leave out lightly, which would be an error, if it is not installed."""
    missing = importlib.util.find_spec("lightly") is None
    return ",".join(name for name in names.split(",") if not (missing and name == "lightly"))


def kernel_tests() -> list[str]:
    """Return the files with tests that are marked as the first check of a kernel."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = (file for file in files if "@pytest.mark.accuracy" in file.read_text("utf-8"))
    return [str(file.relative_to(ROOT)) for file in marked]


def suites() -> list[str]:
    """Return the benchmark suites, the most valuable first."""
    files = [str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks").glob("bench_*.py")]
    return [*FIRST_SUITES, *sorted(set(files) - set(FIRST_SUITES))]


def workers(number: int) -> tuple[str, ...]:
    """Return pytest's flags for processes that share the GPU."""
    return ("-n", str(number), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()


@dataclass
class GpuReport:
    """The results so far, written again after every part, so that nothing measured is lost."""

    reduced: bool
    raw: Path
    name: str = "report"
    results: list[tuple[str, Result]] = field(default_factory=list)  # name of the part
    seconds: float = 0.0

    @property
    def device(self) -> dict[str, dict[str, str | float]]:
        """Return the environment and the rates of device_facts; empty if it failed."""
        for _, result in self.results:
            if result.name == "device" and result.last_line.startswith('{"environment"'):
                facts: dict[str, dict[str, str | float]] = json.loads(result.last_line)
                return facts
        return {"environment": {}, "rates": {}}

    @property
    def rows(self) -> list[Row]:
        """Return what the suites have measured, complete or not."""
        return read_row_lines(self.raw / "rows.jsonl")

    @property
    def benches(self) -> list[dict[str, object]]:
        """Return the JSON of the runs of `fastdino bench`, without files that a killed run left."""
        records = (read_json(file) for file in sorted(self.raw.glob("*/*.json")))
        return [record for record in records if record]

    def write(self, folder: Path) -> None:
        """Write NAME.md, NAME.json, and NAME.log with the whole output of the tasks."""
        write_report(folder, self.name, self.markdown(), self.as_json())
        log = [f"#### {part}: {one.name}\n{one.output}\n" for part, one in self.results]
        (folder / f"{self.name}.log").write_text("\n".join(log), encoding="utf-8")

    def markdown(self) -> str:
        environment = {key: str(value) for key, value in self.device["environment"].items()}
        lines = [f"# {environment.get('device', 'unknown')}", ""]
        if self.reduced:
            lines += ["Reduced: small sizes, to see that all of it runs. These times mean nothing."]
        lines += [f"Written by `make gpu-report` in {self.seconds:.0f} s.", ""]
        lines += [facts_table(environment), "", *self._rates(), self._parts_table(), ""]
        measured = {} if self.reduced else self.as_json()
        lines += ["## Predictions", "", prediction_table(measured), ""]
        for file in sorted(self.raw.glob("*/*.md")):  # headings one level lower
            text = file.read_text(encoding="utf-8")
            lines += [re.sub("^#", "##", text, flags=re.MULTILINE), ""]
        lines += ["## Kernels", "", tables(self.rows)] if self.rows else []
        for _, result in self.results:
            if result.problem:
                tail = "\n".join(result.output.splitlines()[-TAIL:])
                lines += [f"## {result.name}: {result.problem}", "", f"```\n{tail}\n```", ""]
        return "\n".join(lines)

    def _rates(self) -> list[str]:
        rates = self.device["rates"]
        if not rates:
            return ["Copy bandwidth and matrix product: not measured.", ""]
        copy, product = (float(rates[name]) for name in ("copy_gbps", "product_tflops"))
        return [f"Copy: {copy:.0f} GB/s. Matrix product: {product:.3g} TFLOP/s.", ""]

    def _parts_table(self) -> str:
        rows = []
        for name, result in self.results:
            verdict = f"**{result.problem}**" if result.problem else "passed"
            last_line = "" if result.name == "device" else result.last_line.replace("|", "/")
            rows.append([name, result.name, f"{result.seconds:.0f}", verdict, last_line])
        return table(["part", "task", "seconds", "result", "last line of output"], rows)

    def as_json(self) -> dict[str, object]:
        return {
            "reduced": self.reduced,
            "seconds": round(self.seconds, 1),
            **self.device,
            "parts": [
                {"name": part, "task": r.name, "seconds": round(r.seconds, 1), "problem": r.problem}
                for part, r in self.results
            ],
            "failed_tests": failed_tests([result for _, result in self.results]),
            "benchmarks": as_json(self.rows),
            "benches": self.benches,
        }


def failed_tests(results: Sequence[Result]) -> list[str]:
    """Return the ids of the tests that pytest -v reported as failed, also by interrupted runs."""
    verdict, test = "(?:FAILED|ERROR)", r"(tests/\S+::\S+)"
    pattern = re.compile(rf"(?:^|\] ){verdict} {test}|^{test} {verdict}")
    matches = (pattern.search(line) for r in results for line in r.output.splitlines())
    return list(dict.fromkeys(match[1] or match[2] for match in matches if match))


def slug(device: str) -> str:
    """Turn a device's name into a folder's: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def run_parts(
    report: GpuReport,
    parts: Sequence[Part],
    folder: Path,
    total: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Path:
    """Run the parts within `total` seconds and write the report after each; return its folder.

    A part ends when the sum of the planned seconds so far has passed, at the latest.
    """
    start = clock()
    ends = accumulate(part.seconds for part in parts)
    written = folder
    for part, end in zip(parts, ends, strict=True):
        left = start + min(end, total) - clock()
        print(f"{part.name}, at most {left:.0f} s", flush=True)
        if left < LEAST + GRACE:
            results = [Result(task.name, 0.0, "not run: no time left", "") for task in part.tasks]
        else:
            results = run_tasks([replace(task, seconds=left) for task in part.tasks])
        for result in results:
            line = f"{result.name}: {result.problem or 'passed'} after {result.seconds:.0f} s"
            print(f"    {line}", flush=True)
        report.results += [(part.name, result) for result in results]
        report.seconds = clock() - start
        written = folder / slug(str(report.device["environment"].get("device", "unknown")))
        try:
            report.write(written)
        except Exception:  # the parts that remain are worth more than this version of the report
            traceback.print_exc()
    return written


def read_first_report(folder: Path) -> dict[str, object]:
    """Return the JSON of the newest first report in the folder's folders, {} without one."""
    files = sorted(folder.glob("*/report.json"), key=lambda file: file.stat().st_mtime)
    return read_json(files[-1]) if files else {}


def read_json(file: Path) -> dict[str, object]:
    """Read an object; {} if the file is incomplete."""
    try:
        record: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return record


def has_gpu() -> bool:
    """Return True if PyTorch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for one named after the device")
    parser.add_argument("--more", action="store_true", help="write the second report")
    parser.add_argument("--reduced", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)

    reduced = options.reduced or not has_gpu()
    default = ROOT / ("runs/gpu-report" if reduced else "benchmarks/results")
    folder = (options.output or default).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary)
        report = GpuReport(reduced, raw, "more" if options.more else "report")
        if reduced:
            parts = reduced_plan_more(raw) if options.more else reduced_plan(raw)
            total = sum(part.seconds for part in parts)
        else:
            parts = plan_more(raw, read_first_report(folder)) if options.more else plan(raw)
            total = TOTAL_MORE if options.more else TOTAL
        written = run_parts(report, parts, folder, total)
        print(f"\n{report.markdown()}\nWritten to {written}")
    return int(any(result.problem for _, result in report.results))


if __name__ == "__main__":
    sys.exit(main())

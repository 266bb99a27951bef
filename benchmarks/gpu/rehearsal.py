"""Measure without a GPU what the GPU report costs before its GPU works, and write its time budget.

    python3 -m benchmarks.gpu.rehearsal [--write FOLDER]

Each task of the report is started with everything that it imports, collects or compiles on the CPU,
and ends before its first measurement. Kernels are compiled for sm_90, into an empty cache and again
into the filled one. Graphs of torch.compile are those of a small step on the CPU, which has as many
graphs as the step on a GPU. CPU seconds are reported: they are also valid on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu.gpu_report import (
    BENCH,
    PYTEST,
    PYTHON,
    TINY_STEP,
    Part,
    plan,
    plan_more,
)
from benchmarks.gpu.subprocesses import Task, run_task
from fastdino.bench.report import table, write_report
from fastdino.environment import environment

CORES = 16  # of the machine that the report is planned for
LIMIT = 1800.0  # seconds per command
COMPILED_STEP = f"{TINY_STEP} --baselines compiled"


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a command; those in `parallel` are spread over the cores."""

    name: str
    single: float
    parallel: float = 0.0
    problem: str = ""

    @property
    def on_cores(self) -> float:
        """Return the wall seconds on CORES cores."""
        return self.single + self.parallel / CORES


def start_command(task: Task) -> tuple[str, ...]:
    """Return the command that does what a task does before its first measurement."""
    command = tuple(task.command)
    if command[: len(PYTEST)] == PYTEST:
        words = [word for word in command[len(PYTEST) :] if not word.startswith("--rows")]
        for flag in ("-n", "--dist"):
            if flag in words:
                at = words.index(flag)
                del words[at : at + 2]
        return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *words)
    module = "fastdino.bench.flags" if command[: len(BENCH)] == BENCH else _module(command)
    return (PYTHON, "-c", f"import torch, {module}")


def _module(command: Sequence[str]) -> str:
    return command[list(command).index("-m") + 1]


def cpu_seconds(command: Sequence[str], variables: Mapping[str, str]) -> tuple[float, str]:
    """Run a command; return the CPU seconds of all its processes, and the problem or ""."""
    words = ("env", *(f"{name}={value}" for name, value in variables.items()), *command)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_task(Task("", words, LIMIT))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    failed = result.problem not in ("", "exit status 5")  # 5: no GPU test can be collected here
    return seconds, f"{result.problem}: {result.last_line}" if failed else ""


def compile_costs(folder: Path) -> list[Cost]:
    """Measure the compilation of kernels and of a step's graphs, cold and warm."""
    caches = {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    kernels = Task("", (PYTHON, "-m", "benchmarks.gpu.compile_ahead"), LIMIT)
    one_process = (*kernels.command, "--processes", "1", "--arch", "90")
    start, _ = cpu_seconds(start_command(kernels), {})
    costs = [
        Cost(f"kernels, {state}", start, max(seconds - start, 0.0), problem)
        for state, (seconds, problem) in _twice(one_process, caches)
    ]
    (_, (cold, problem)), (_, (warm, _)) = _twice((*BENCH, *COMPILED_STEP.split()), caches)
    costs.append(Cost("graphs of a step, cold", warm, max(cold - warm, 0.0), problem))
    return [*costs, Cost("graphs of a step, cached", warm)]


def _twice(
    command: Sequence[str], caches: Mapping[str, str]
) -> list[tuple[str, tuple[float, str]]]:
    return [(state, cpu_seconds(command, caches)) for state in ("cold", "cached")]


def start_cost(part: Part) -> Cost:
    """Measure the start of a part's tasks, which start at the same time: the slowest counts."""
    measured = [cpu_seconds(start_command(task), {}) for task in part.tasks]
    problems = [problem for _, problem in measured if problem]
    return Cost(part.name, max(seconds for seconds, _ in measured), problem="; ".join(problems))


def budget_table(parts: Sequence[Part], costs: Mapping[str, Cost]) -> str:
    """Return the seconds of each part that are left for the GPU."""
    rows = []
    for part in parts:
        start = costs[part.name].on_cores
        rows.append(
            [part.name, f"{part.seconds:.0f}", f"{start:.1f}", f"{part.seconds - start:.0f}"]
        )
    total, start = sum(part.seconds for part in parts), sum(float(row[2]) for row in rows)
    rows.append(["**all**", f"{total:.0f}", f"{start:.1f}", f"{total - start:.0f}"])
    return table(["part", "at most, s", "start, s", "left, s"], rows)


def markdown(facts: Mapping[str, str], costs: Sequence[Cost], plans: Sequence[str]) -> str:
    """Return rehearsal.md."""
    rows = [
        [one.name, f"{one.single + one.parallel:.1f}", f"{one.on_cores:.1f}", one.problem or "-"]
        for one in costs
    ]
    about = (
        "# Rehearsal of the GPU report\n\nWritten by `make gpu-report REHEARSE=1`, without a GPU: "
        f"{facts['processor']}, {facts['cores']} cores, torch {facts['torch']}, Triton "
        f"{facts['triton']}.\n"
    )
    budget = (
        "Start: imports and pytest's collection, one process of each part. They are CPU seconds of "
        "this machine. What a part does not use goes to the next one.\n"
    )
    compiled = (
        f"CPU seconds of compilation, and wall seconds on {CORES} cores if what is compiled is "
        "spread over them. Graphs: a small step compiled for the CPU stands for one on a GPU; the "
        "compilation of its kernels for a GPU is not measured.\n"
    )
    heads = ["", "CPU s", f"on {CORES} cores, s", "problem"]
    first, second = plans
    return "\n".join(
        [
            about, "## Time budget\n", budget, "First report:\n", first, "",
            "Second report (`MORE=1`):\n", second, "", "## Compilation\n", compiled,
            table(heads, rows), "",
        ]
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="folder for rehearsal.md and .json")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary)
        parts = plan(raw), plan_more(raw, {})
        costs = compile_costs(raw)
        starts = [{part.name: start_cost(part) for part in some} for some in parts]
    facts = environment(torch.device("cpu"), ("torch", "triton"))
    plans = [budget_table(*pair) for pair in zip(parts, starts, strict=True)]
    text = markdown(facts, costs, plans)
    print(text)
    every = [*costs, *(cost for some in starts for cost in some.values())]
    if options.write:
        record = {"environment": facts, "seconds": round(time.perf_counter() - start)}
        record |= {"costs": [asdict(cost) | {"on_cores": cost.on_cores} for cost in every]}
        write_report(options.write, "rehearsal", text, record)
    for cost in every:
        if cost.problem:
            print(f"{cost.name}: {cost.problem}", file=sys.stderr)
    return int(any(cost.problem for cost in every))


if __name__ == "__main__":
    sys.exit(main())

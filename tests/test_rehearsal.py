"""benchmarks.gpu.rehearsal: start-up commands, CPU seconds, the time budget."""

from __future__ import annotations

import sys

import pytest

from benchmarks.gpu import rehearsal
from benchmarks.gpu.gpu_report import part, plan, plan_more
from benchmarks.gpu.rehearsal import Cost, budget_table, cpu_seconds, start_command

BURN = """
import subprocess, sys, time
end = time.process_time() + float(sys.argv[1])
if len(sys.argv) > 2:
    subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]])
while time.process_time() < end:
    pass
"""


def test_no_start_command_measures_or_uses_workers(tmp_path):
    for one in [*plan(tmp_path), *plan_more(tmp_path, {})]:
        for task in one.tasks:
            command = start_command(task)
            assert command[0] == sys.executable
            if "pytest" in command:
                assert "--collect-only" in command
                assert not {"-n", "--dist"} & set(command)
                assert "--rows" not in " ".join(command)
            else:
                assert command[1] == "-c"
                assert command[2].startswith("import torch, ")


def test_cpu_seconds_of_children_count():
    once, problem = cpu_seconds((sys.executable, "-c", BURN, "0.5"), {})
    assert problem == ""
    both, _ = cpu_seconds((sys.executable, "-c", BURN, "0.5", BURN), {})
    assert 0.5 <= once < both
    assert both >= 1.0


def test_a_failed_start_is_a_problem():
    _, problem = cpu_seconds((sys.executable, "-c", "print('why'); raise SystemExit(2)"), {})
    assert problem == "exit status 2: why"


def test_variables_reach_the_command():
    code = "import os; raise SystemExit(int(os.environ['SOME_NUMBER']))"
    assert cpu_seconds((sys.executable, "-c", code), {"SOME_NUMBER": "7"})[1] == "exit status 7: "


def test_the_slowest_task_of_a_part_counts(monkeypatch):
    seconds = iter([3.0, 8.0])
    monkeypatch.setattr(rehearsal, "cpu_seconds", lambda command, variables: (next(seconds), ""))
    tasks = dict.fromkeys("ab", (sys.executable, "-m", "benchmarks.gpu.sanitize"))
    assert rehearsal.start_cost(part("both", 60, **tasks)) == Cost("both", 8.0)


def test_the_budget_leaves_what_the_start_does_not_take():
    parts = [part("one", 60), part("two", 90)]
    costs = {"one": Cost("one", 4.0), "two": Cost("two", 2.0, parallel=64.0)}
    text = budget_table(parts, costs)
    assert "| one | 60 | 4.0 | 56 |" in text
    assert "| two | 90 | 6.0 | 84 |" in text
    assert "| **all** | 150 | 10.0 | 140 |" in text


def test_compilation_is_measured_cold_and_warm(monkeypatch, tmp_path):
    seconds = iter([4.0, 52.0, 20.0, 40.0, 24.0])
    monkeypatch.setattr(rehearsal, "cpu_seconds", lambda command, variables: (next(seconds), ""))
    costs = {cost.name: cost.on_cores for cost in rehearsal.compile_costs(tmp_path)}
    assert costs == pytest.approx(
        {
            "kernels, cold": 7, "kernels, cached": 5,
            "graphs of a step, cold": 25, "graphs of a step, cached": 24,
        }
    )  # fmt: skip

"""benchmarks.gpu: time limits of tasks and parts, the report, the sanitizer's calls."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from benchmarks import results_table
from benchmarks.gpu import gpu_report, option_calls, subprocesses
from benchmarks.gpu.gpu_report import GpuReport, Part, part
from benchmarks.gpu.option_calls import boundary_calls
from benchmarks.gpu.subprocesses import GRACE, ROOT, Result, Task, run_task, run_tasks
from benchmarks.results_table import Prediction
from fastdino.bench import flags
from fastdino.bench.baselines import loaders, steps
from tests.processes import is_running


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def assert_ends(pid: int) -> None:
    for _ in range(100):  # a killed process may take a moment to end
        if not is_running(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} of the task is still running")


# Tasks


HANGING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import signal, time; signal.signal(2, 1); time.sleep(600)"]
children = [subprocess.Popen(sleep, env={{}}), subprocess.Popen(sleep, start_new_session=True)]
print(*(child.pid for child in children), flush=True)
{end}"""


@pytest.mark.parametrize(
    ("end", "problem"),
    [("time.sleep(600)", "stopped after 2 s"), ("", ""), ("sys.exit(3)", "exit status 3")],
)
def test_all_processes_of_a_task_are_killed(end, problem):
    """A child in the task's group without its environment, and one that has left the group."""
    result = run_task(Task("leaves children", python(HANGING.format(end=end)), 2.2), grace=0.2)
    assert result.problem == problem
    children = result.output.split()
    assert len(children) == 2
    for child in children:
        assert_ends(int(child))


def test_a_task_ends_within_its_seconds_although_it_ignores_the_interrupt():
    code = "import signal, time; signal.signal(2, 1); print('ready', flush=True); time.sleep(600)"
    result = run_task(Task("ignores", python(code), 2.2), grace=0.2)
    assert result.output == "ready\n"
    assert result.problem == "stopped after 2 s"
    assert 2.2 <= result.seconds < 60


def test_an_interrupted_task_can_write_its_results(tmp_path):
    code = f"""
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    open({str(tmp_path / "partial")!r}, "w").close()
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a command in the background
    try:
        assert run_task(Task("slow", python(code), 2 + GRACE)).problem == "stopped after 2 s"
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "partial").exists()


def test_a_command_that_does_not_exist_is_a_problem():
    result = run_task(Task("absent", ("no-such-command",), 10))
    assert result.problem.startswith("not started: ")


def test_tasks_of_a_part_run_at_the_same_time(tmp_path):
    wait = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:])
own.touch()
while not other.exists():
    time.sleep(0.05)
"""
    names = str(tmp_path / "a"), str(tmp_path / "b")
    tasks = [Task("x", (*python(wait), *pair), 60 + GRACE) for pair in (names, names[::-1])]
    assert [result.problem for result in run_tasks(tasks)] == ["", ""]


def test_children_of_an_ended_task_are_killed_while_others_run(tmp_path):
    leaves = HANGING.format(end="open(sys.argv[1], 'w').write(str(children[1].pid))")
    waits = """
import pathlib, sys, time
from tests.processes import is_running
file = pathlib.Path(sys.argv[1])
while not (file.exists() and file.read_text()) or is_running(int(file.read_text())):
    time.sleep(0.05)
"""
    codes = {"leaves": leaves, "waits for the end of the child": waits}
    file = str(tmp_path / "child")
    tasks = [Task(name, (*python(code), file), 60 + GRACE) for name, code in codes.items()]
    assert [result.problem for result in run_tasks(tasks)] == ["", ""]


def test_an_interrupt_of_the_report_kills_its_tasks(tmp_path, monkeypatch):
    code = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True)"
    files = [tmp_path / name for name in "ab"]
    tasks = [
        Task(file.name, (*python(f"{code}; time.sleep(600)"), str(file)), 600) for file in files
    ]

    interrupts = []

    def wait(seconds):
        if not interrupts and all(file.exists() and file.read_text() for file in files):
            interrupts.append(1)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocesses.time, "sleep", wait)
        with pytest.raises(KeyboardInterrupt):
            run_tasks(tasks)
    for file in files:
        assert_ends(int(file.read_text()))


# Parts


def run(parts, folder, total=600.0, **changes):
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    report = GpuReport(**({"reduced": True, "raw": raw} | changes))
    return report, gpu_report.run_parts(report, parts, folder, total)


def test_all_parts_run_and_failures_are_reported(tmp_path):
    facts = python("""print('{"environment": {"device": "A b"}, "rates": {}}')""")
    parts = [
        part("hangs", 1 + GRACE + gpu_report.LEAST, hangs=python("import time; time.sleep(600)")),
        part("device", 60, device=facts),
        part(
            "mixed", 60,
            breaks=python("print('about to break'); raise SystemExit(3)"),
            passes=python("print('12 passed')"),
        ),
        part("absent", 60, absent=("no-such-command",)),
        part("last", 60, works=python("print('13 passed')")),
    ]  # fmt: skip
    _, folder = run(parts, tmp_path)
    assert folder == tmp_path / "a-b"  # named after the device
    text = (folder / "report.md").read_text(encoding="utf-8")
    for line in (
        "| hangs | hangs | ",
        "**exit status 3**",
        "## breaks: exit status 3\n\n```\nabout to break\n```",
        "| passed | 12 passed |",
        "| passed | 13 passed |",
        "These times mean nothing",
        " | not measured | - |",
    ):
        assert line in text
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    problems = [re.sub(r"\d+ s", "N s", one["problem"]) for one in record["parts"]]
    assert problems[:4] == ["stopped after N s", "", "exit status 3", ""]
    assert problems[4].startswith("not started")
    assert problems[5] == ""
    assert "about to break" in (folder / "report.log").read_text(encoding="utf-8")


class FakeRun:
    """A clock, and tasks that take `durations[name]` seconds of it, or all they may take."""

    def __init__(self, monkeypatch, **durations: float):
        self.now, self.durations, self.limits = 100.0, durations, {}
        monkeypatch.setattr(gpu_report, "run_tasks", self.run_tasks)

    def run_tasks(self, tasks):
        results = []
        for task in tasks:
            self.limits[task.name] = task.seconds
            seconds = min(self.durations[task.name], task.seconds)
            problem = "stopped" if seconds < self.durations[task.name] else ""
            results.append(Result(task.name, seconds, problem, ""))
        self.now += max(result.seconds for result in results)
        return results

    def run(self, parts, folder, total):
        raw = folder / "raw"
        raw.mkdir()
        report = GpuReport(reduced=False, raw=raw)
        gpu_report.run_parts(report, parts, folder, total, clock=lambda: self.now)
        return report


def test_unused_time_goes_to_the_next_part_and_the_total_is_kept(tmp_path, monkeypatch):
    fake = FakeRun(monkeypatch, a=40, b=10, c=10**6, d=20, e=10**6, f=1)
    parts = [
        Part("one", 60, [Task("a", (), 60), Task("b", (), 60)]),
        *(part(name, 60, **{name: ()}) for name in "cdef"),
    ]
    report = fake.run(parts, tmp_path, total=210)
    assert fake.limits == {"a": 60, "b": 60, "c": 80, "d": 60, "e": 70}
    assert fake.now == 310  # 210 s after the start
    problems = {result.name: result.problem for _, result in report.results}
    assert problems["f"] == "not run: no time left"
    assert (problems["c"], problems["d"], problems["e"]) == ("stopped", "", "stopped")


def test_results_are_written_after_every_part(tmp_path, monkeypatch):
    fake = FakeRun(monkeypatch, a=1, b=1)
    written = []
    real = GpuReport.write
    monkeypatch.setattr(
        GpuReport, "write", lambda self, to: (written.append(len(self.results)), real(self, to))
    )
    fake.run([part(name, 60, **{name: ()}) for name in "ab"], tmp_path, 600)
    assert written == [1, 2]
    record = json.loads((tmp_path / "unknown" / "report.json").read_text("utf-8"))
    assert [one["task"] for one in record["parts"]] == ["a", "b"]


def test_measurements_of_the_parts_are_included(tmp_path, monkeypatch):
    group, kernel = "DINO loss, forward, B64 V10 K65536 bfloat16", "fastdino_kernels"
    targets = [
        Prediction("loss", group, kernel, "us", "us", low=57, high=71, floor=23),
        Prediction("crops", "Loaders, B = 64", "kernel", "images_per_second", goal=40000),
    ]
    monkeypatch.setattr(results_table, "read_predictions", lambda: targets)
    raw = tmp_path / "raw"
    (raw / "loader").mkdir(parents=True)
    (raw / "loader" / "loader.md").write_text("# Loaders\n\n## Baselines\n")
    arm = {"images_per_second": 50000.0}
    record = {"arms": {"kernel": arm}, "settings": {"batch_size_per_gpu": 64}}
    (raw / "loader" / "loader.json").write_text(json.dumps(record))
    row = {
        "group": group, "baseline": kernel, "role": "ours", "median": 4e-5, "iqr": 1e-6,
        "rounds": 9, "call_seconds": 4e-5, "queued": True, "bytes": 100, "note": "read once",
        "peak_bytes": 1, "copy_gbps": 4300.0,
    }  # fmt: skip
    # A command that was killed may leave half a line or half a file.
    (raw / "step").mkdir()
    (raw / "step" / "step.md").write_text("# Training step\n")
    (raw / "step" / "step.json").write_text('{"arms": [')
    (raw / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:30])
    _, folder = run([part("works", 60, works=python("pass"))], tmp_path, reduced=False)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "\n## Loaders\n\n### Baselines\n" in text
    assert "### DINO loss, forward, B64" in text
    assert "mean nothing" not in text
    assert "| loss, us | 23 | 57 - 71 | - | 40 | 0.70 x |" in text
    assert "| crops | - | - | 40000 | 50000 | - |" in text
    made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert made["benches"] == [record]
    assert [one["group"] for one in made["benchmarks"]] == [row["group"]]


def test_a_report_that_cannot_be_written_stops_no_part(tmp_path, monkeypatch, capsys):
    def fail(record):
        raise RuntimeError("no table")

    monkeypatch.setattr(gpu_report, "prediction_table", fail)
    report, _ = run([part(name, 60, **{name: python("pass")}) for name in "ab"], tmp_path)
    assert [result.name for _, result in report.results] == ["a", "b"]
    assert "RuntimeError: no table" in capsys.readouterr().err


def test_a_device_part_that_printed_something_else_is_no_measurement(tmp_path):
    device = python("print('a warning at the end')")
    _, folder = run([part("device", 60, device=device)], tmp_path)
    assert folder == tmp_path / "unknown"


# The plans


PLANS = {
    "first": (gpu_report.plan, gpu_report.TOTAL, 450),
    "second": (lambda raw: gpu_report.plan_more(raw, {}), gpu_report.TOTAL_MORE, 210),
    "reduced": (gpu_report.reduced_plan, None, None),
    "second reduced": (gpu_report.reduced_plan_more, None, None),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plans_fit_and_their_commands_exist(name, tmp_path):
    plan, total, limit = PLANS[name]
    parts = plan(tmp_path)
    if total is not None:
        assert sum(one.seconds for one in parts) <= total < limit
    parser = argparse.ArgumentParser()
    flags.configure(parser)
    for task in (task for one in parts for task in one.tasks):
        command = list(task.command)
        if command[:4] == list(gpu_report.BENCH):
            args = parser.parse_args(command[4:])
            known = loaders.BASELINES if args.loader else steps.BASELINES
            assert set(args.baselines.split(",")) <= set(known)
        elif "pytest" in command:
            files = [word.removeprefix("--ignore=") for word in command if word.endswith(".py")]
            assert all((ROOT / file).is_file() for file in files)
        else:
            module = command[command.index("-m") + 1]
            assert find_spec(module)
            assert command[0] in (sys.executable, "env")


def test_lightly_is_left_out_if_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    assert gpu_report.baselines_here("paper,lightly,compiled") == "paper,compiled"
    assert gpu_report.workers(8) == ()


def test_the_second_report_repeats_what_the_first_one_showed_broken(tmp_path):
    problems = {"correctness": "exit status 1", "kernels": "stopped after 85 s", "step": ""}
    before = {
        "failed_tests": ["tests/test_ema.py::test_x[triton-cuda-1]"],
        "parts": [{"name": name, "problem": problem} for name, problem in problems.items()],
    }
    parts = gpu_report.plan_more(tmp_path, before)
    assert [one.name for one in parts[1:4]] == ["checks", "kernels", "step, B = 16"]
    assert parts[1].tasks[0].name == "tests that failed"
    assert "tests/test_ema.py::test_x[triton-cuda-1]" in parts[1].tasks[0].command
    without = gpu_report.plan_more(tmp_path, {})
    assert [one.name for one in without[1:3]] == ["checks", "step, B = 16"]
    assert without[1].tasks[0].name == "memcheck"


def test_failed_tests_are_read_from_the_output_of_pytest():
    output = """\
[gw1] [ 12%] PASSED tests/test_ema.py::test_a[triton-cuda]
[gw0] [ 13%] FAILED tests/test_ema.py::test_b[triton-cuda-dtype0]
tests/test_clip.py::test_c[triton-cuda-1.0] FAILED                      [ 20%]
tests/test_clip.py::test_d ERROR                                        [ 30%]
FAILED tests/test_ema.py::test_b[triton-cuda-dtype0] - AssertionError: off
benchmarks/bench_ema.py::test_ema FAILED
"""
    assert gpu_report.failed_tests([Result("tests", 1.0, "exit status 1", output)]) == [
        "tests/test_ema.py::test_b[triton-cuda-dtype0]",
        "tests/test_clip.py::test_c[triton-cuda-1.0]",
        "tests/test_clip.py::test_d",
    ]


def test_the_first_check_has_one_case_per_kernel_and_dtype(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    # In this process, which has most of the modules; -s leaves the capture of the output to capsys.
    words = (
        "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--collect-only",
        "--one-per-dtype", "-m", "accuracy",
    )  # fmt: skip
    assert pytest.main([*words, *gpu_report.kernel_tests()]) == 0
    listed = capsys.readouterr().out
    cases = [line for line in listed.splitlines() if "::" in line]
    assert all("triton" in case for case in cases)
    names = ("adamw_ema", "clip", "dino_loss", "ema", "multi_crop", "soft_cross_entropy")
    for file in (f"tests/test_{name}.py" for name in names):
        of_file = [case for case in cases if case.startswith(file)]
        least = 1 if "multi_crop" in file else 3  # dtypes
        assert len(of_file) >= least, file
        assert len(of_file) <= 24, file
    assert len(cases) <= 120  # they have a minute


def test_all_suites_run_and_the_loss_comes_first():
    suites = gpu_report.suites()
    assert suites[0] == "benchmarks/bench_dino_loss.py"
    assert sorted(suites) == sorted(
        str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks").glob("bench_*.py")
    )


def test_the_command_writes_the_second_report(tmp_path, monkeypatch, capsys):
    code = """print('{"environment": {"device": "cpu"}, "rates": {}}')"""
    monkeypatch.setattr(
        gpu_report, "reduced_plan_more", lambda raw: [part("device", 60, device=python(code))]
    )
    assert gpu_report.main(["--more", "--reduced", "--output", str(tmp_path)]) == 0
    assert f"Written to {tmp_path / 'cpu'}" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "cpu").iterdir())
    assert names == ["more.json", "more.log", "more.md"]


@pytest.mark.parametrize(
    ("name", "call"),
    [case for case in boundary_calls() if " bf16" in case[0] or "multi_crop" not in case[0]],
)
def test_sanitized_calls_run(name, call):
    for tensor in call(torch.device("cpu")):
        assert tensor.isfinite().all()


def test_images_of_sanitized_calls_end_where_a_word_ends(monkeypatch):
    """multi_crop reads whole words, and memcheck knows the end of an allocation to the byte."""
    images = []

    def record(some, *_, **__):
        images.extend(some)

    monkeypatch.setattr(option_calls, "multi_crop", record)
    for name, call in boundary_calls():
        if name.startswith("multi_crop"):
            call(torch.device("cpu"))
    assert any(image.nbytes % 4 for image in images)
    assert not any(image.untyped_storage().nbytes() % 4 for image in images)


def test_folders_are_named_after_the_device():
    assert gpu_report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"

"""benchmarks.gpu: time limits of tasks, the report, the sanitizer's calls."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest
import torch

from benchmarks.gpu import gpu_report, sanitize
from benchmarks.gpu.subprocesses import GRACE, Result, Task, run_task
from tests.processes import is_running


def python(name: str, code: str, timeout: float = 60) -> Task:
    return Task(name, (sys.executable, "-c", code), timeout)


HANGING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_a_hanging_task_is_killed_with_its_children():
    result = run_task(python("hangs", HANGING, timeout=6), grace=0.2)
    assert result.problem == "stopped after 6 s"
    child = int(result.output.split()[1])
    for _ in range(100):  # a killed process may take a moment to end
        if not is_running(child):
            return
        time.sleep(0.1)
    pytest.fail("the child of the task is still running")


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
        assert run_task(python("slow", code, timeout=5)).problem == "stopped after 5 s"
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "partial").exists()


def run(report, tasks, raw, folder=None):
    return gpu_report.run_and_report(report, tasks, raw, folder or raw)


def test_all_tasks_run_and_failures_are_reported(tmp_path):
    tasks = [
        python("hangs", "import time; time.sleep(600)", timeout=1),
        python("breaks", "print('about to break'); raise SystemExit(3)"),
        python("works", "print('12 passed')"),
    ]
    report = gpu_report.GpuReport({"device": "A device"}, reduced=True)
    assert run(report, tasks, tmp_path) == 1
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "**exit status 3**",
        "## breaks: exit status 3\n\n```\nabout to break\n```",
        "**stopped after 1 s**",
        "| passed | 12 passed |",
        "These times mean nothing",
    ):
        assert part in text
    parts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["parts"]
    assert [part["problem"] for part in parts] == ["stopped after 1 s", "exit status 3", ""]


def test_unused_time_goes_to_the_next_task(tmp_path, monkeypatch):
    timeouts = []

    def run_one(task):
        timeouts.append(task.timeout)
        return Result(task.name, {"hangs": task.timeout + GRACE}.get(task.name, 4.0), "", "")

    monkeypatch.setattr(gpu_report, "run_task", run_one)
    tasks = [python(name, "", timeout=10) for name in ("one", "two", "hangs", "last")]
    run(gpu_report.GpuReport({}, reduced=False), tasks, tmp_path)
    assert timeouts == [10, 16, 22, 10]


def test_reports_of_fastdino_bench_are_included(tmp_path):
    raw = tmp_path / "raw"
    (raw / "loaders").mkdir(parents=True)
    (raw / "loaders" / "loader.md").write_text("# Loaders\n\n## Baselines\n")
    (raw / "loaders" / "loader.json").write_text('{"arms": 3}')
    report = gpu_report.GpuReport({}, reduced=False)
    assert run(report, [python("works", "pass")], raw, tmp_path) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "\n## Loaders\n\n### Baselines\n" in text
    assert "mean nothing" not in text
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record["benches"] == [{"arms": 3}]


def test_the_command_prints_and_writes_the_second_report(tmp_path, monkeypatch, capsys):
    def planned(raw, *, reduced):
        assert reduced
        folder = raw / "bench"
        folder.mkdir()
        (folder / "modes.png").write_bytes(b"a picture")
        code = "from pathlib import Path; Path({!r}).write_text({!r})"
        return [
            python("table", code.format(f"{folder}/step.md", "# A step\n")),
            python("record", code.format(f"{folder}/step.json", "0")),
        ]

    monkeypatch.setattr(gpu_report, "plan_more", planned)
    assert gpu_report.main(["--more", "--reduced", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\n## A step\n" in out
    assert "| commit | " in out
    (folder,) = tmp_path.iterdir()  # named after the device
    assert sorted(path.name for path in folder.iterdir()) == ["modes.png", "more.json", "more.md"]
    assert "\n## A step\n" in (folder / "more.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kernels", [sanitize.losses, sanitize.updates, sanitize.crops])
def test_the_sanitized_kernels_run(kernels):
    for tensor in kernels(torch.bfloat16, torch.device("cpu")):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("plan", [gpu_report.plan, gpu_report.plan_more])
def test_each_report_takes_less_than_nine_minutes(plan, tmp_path):
    times = [task.timeout for task in plan(tmp_path, reduced=False)]
    times.append(gpu_report.ENVIRONMENT_TIME)
    assert sum(times) + GRACE * len(times) < 9 * 60


def test_folders_are_named_after_the_device():
    assert gpu_report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_failed_environment_is_empty():
    assert gpu_report.environment_of(Result("environment", 1.0, "", "no JSON")) == {}

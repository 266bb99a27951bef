"""What the benchmarks rest on: their arithmetic, the gate before a time, parts that may hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastdino_kernels import AdamWEMA, clip_grad_norms_, ema_update_
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import (
    bench_adamw_ema,
    bench_clip,
    bench_dino_loss,
    bench_ema,
    report,
)
from benchmarks.compare_modes import Bf16Products
from benchmarks.contest import (
    LONGEST_SLEEP,
    Clock,
    Contest,
    Effort,
    Variant,
    VariantError,
    hold,
    replay,
)
from benchmarks.gpu import gpu_report, sanitize
from benchmarks.gpu.subprocesses import GRACE, Part, Result, run_part
from benchmarks.loss_variants import einsum_form, paper_eager
from benchmarks.measure import device_sample, peak_bytes
from benchmarks.shapes import ARCHS, network_shapes
from fastdino.models.head import DINOHead
from fastdino.models.vit import VisionTransformer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FEW = Effort(seconds=0.0, rounds=3)
MEGABYTE = 1 << 20


def row(**changes) -> report.Row:
    values = {
        "group": "a group", "variant": "ours", "role": "ours", "median": 1e-3, "iqr": 1e-5,
        "rounds": 9, "call_seconds": 1e-3, "queued": True, "bytes": 1_500_000_000,
        "words": "read once", "peak_bytes": 2_000_000, "copy_gbps": 3000.0,
    }  # fmt: skip
    return report.Row(**(values | changes))


# The arithmetic


def test_bandwidth_is_the_counted_bytes_by_the_median():
    assert row().gbps == pytest.approx(1500)
    assert row().share_of_copy == pytest.approx(0.5)


def test_ratios_say_how_many_times_faster_a_variant_is():
    rows = [row(role="paper", median=4e-3), row(role="compile", median=2e-3), row()]
    assert report.ratios(rows) == {
        "x paper's code": ["1.00", "2.00", "4.00"],
        "x torch.compile": ["0.50", "1.00", "2.00"],
    }
    assert report.ratios(rows[1:2]) == {"x torch.compile": ["1.00"]}


def test_what_the_host_paces_is_compared_by_whole_calls():
    paced = row(role="paper", median=9e-3, call_seconds=9e-3, queued=False)
    assert report.times_faster(row(call_seconds=3e-3), paced) == pytest.approx(3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (95.4e-6, "95.4 us"), (3e-7, "0.3 us"), (1234, "1234 s")],
)
def test_times_are_told_in_their_unit(seconds, text):
    assert report.format_seconds(seconds) == text


def test_the_table_marks_what_waited_for_the_host():
    text = report.tables([row(role="paper", median=5e-3, queued=False), row(group="another")])
    assert "| ours | 5 ms* |" in text
    assert "1500.0 MB: read once; copy: 3000 GB/s." in text
    assert "### another" in text
    assert "| 1.5e+03 | 50% | 2 |" in text


def test_counted_bytes_of_the_loss():
    size = bench_dino_loss.Size(B=2, V=3, K=5, T=2)  # bf16: a crop has 2 * 5 * 2 bytes
    counts = [bench_dino_loss.counted_bytes(size, phase)[0] for phase in bench_dino_loss.PHASES]
    assert counts == [5 * 20, 5 * 20 + 3 * 20, 2 * 5 * 20 + 3 * 20]


@pytest.mark.parametrize(("arch", "heads"), [("ViT-S", 6), ("ViT-B", 12), ("ViT-L", 16)])
def test_the_shapes_are_those_of_the_models(arch, heads):
    width, depth = ARCHS[arch]
    with torch.device("meta"):
        backbone = VisionTransformer(embed_dim=width, depth=depth, num_heads=heads)
        head = DINOHead(width, 65536)
    shapes = [tuple(p.shape) for module in (backbone, head) for p in module.parameters()]
    assert sorted(shapes) == sorted(network_shapes(arch))


def test_counted_bytes_of_the_ema_are_those_of_every_parameter():
    size = bench_ema.Size("ViT-S")
    parameters = 21_665_664 + 22_352_128  # ViT-S/16, and a head of 65536 prototypes
    assert bench_ema.counted_bytes(size, False)[0] == 12 * parameters
    assert bench_ema.counted_bytes(size, True)[0] == 14 * parameters


def test_counted_bytes_of_the_optimizer_are_those_of_every_parameter():
    size = bench_adamw_ema.Size("ViT-S")
    parameters = 21_665_664 + 22_352_128
    assert bench_adamw_ema.counted_bytes(size, False)[0] == 40 * parameters
    assert bench_adamw_ema.counted_bytes(size, True)[0] == 44 * parameters


# The gate


def contest_of(**variants) -> Contest:
    made = [Variant(name, lambda run=run: run, check) for name, (run, check) in variants.items()]
    return Contest("a group", made, counted=8)


def test_a_wrong_variant_is_not_timed_and_the_others_are():
    calls = []

    def wrong() -> None:
        raise AssertionError("off by one")

    outcomes = hold(
        contest_of(
            wrong=(lambda: calls.append("wrong"), wrong),
            right=(lambda: calls.append("right"), lambda: None),
        ),
        CPU,
        FEW,
    )
    assert "wrong" not in calls
    assert len(outcomes["right"].seconds) == FEW.least
    with pytest.raises(VariantError, match="off by one"):
        replay(None, outcomes["wrong"])


def test_what_is_not_a_number_is_not_close():
    from benchmarks.contest import assert_close

    assert_close("x", torch.ones(2), torch.ones(2), 1e-6)
    for value in (float("nan"), 1.1):
        with pytest.raises(AssertionError, match="x is off"):
            assert_close("x", torch.full((2,), value), torch.ones(2), 1e-2)


def loss_of_all_pairs(student, teacher, center, student_temp, teacher_temp):
    """Wrong: a crop is compared with itself, too."""
    log_probs = torch.log_softmax(student.float() / student_temp, -1)
    targets = torch.softmax((teacher.float() - center) / teacher_temp, -1)
    loss = -torch.einsum("tbk,sbk->tsb", targets, log_probs).mean()
    return loss, teacher.float().sum(dim=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_the_loss(dtype):
    size = bench_dino_loss.Size(B=2, V=4, K=300, dtype=dtype)
    for loss in (paper_eager, einsum_form, bench_dino_loss.ours):
        bench_dino_loss.check(loss, size, CPU)
    with pytest.raises(AssertionError, match="is off by"):
        bench_dino_loss.check(loss_of_all_pairs, size, CPU)

    def detached(*arguments):
        loss, teacher_sum = einsum_form(*arguments)
        return loss * 1.1 - 0.1 * loss.detach(), teacher_sum

    with pytest.raises(AssertionError, match="the gradient is off"):
        bench_dino_loss.check(detached, size, CPU)


def test_the_gate_of_the_ema():
    size = bench_ema.Size("a toy", 16)
    for with_shadow, variants in bench_ema.VARIANTS.items():
        for _, update in variants.values():
            bench_ema.check(update, size, with_shadow, CPU)
    with pytest.raises(AssertionError, match=r"teacher\[0\] is off"):
        bench_ema.check(lambda t, s, _: ema_update_(t, s, 0.9), size, False, CPU)


def test_the_gate_of_the_clip():
    size = bench_clip.Size("a toy", 16)
    for _, clip in bench_clip.EACH.values():
        bench_clip.check(clip, size, False, CPU)
    bench_clip.check(bench_clip.torch_global, size, True, CPU)
    with pytest.raises(AssertionError, match=r"gradient\[0\] is off"):
        bench_clip.check(lambda p: clip_grad_norms_(p, 0.2), size, False, CPU)


def test_the_gate_of_the_optimizer():
    size = bench_adamw_ema.Size("a toy", 16)
    for _, make in bench_adamw_ema.VARIANTS.values():
        bench_adamw_ema.check(make, size, True, CPU)

    def without_clip(network, _):
        optimizer = AdamWEMA(network.groups(), bench_adamw_ema.LR, weight_decay=0.04)
        return optimizer.step

    with pytest.raises(AssertionError, match=r"teacher\[0\] is off"):
        bench_adamw_ema.check(without_clip, size, False, CPU)


def test_every_round_of_the_optimizer_has_the_gradients_of_the_first():
    size = bench_adamw_ema.Size("a toy", 16)
    contest = bench_adamw_ema.adamw_ema_contest(size, False, CPU)
    norms = []
    for variant in contest.variants * 2:
        step = variant.prepare()
        step()
        if variant.role == "ours":
            norms.append(step.__self__.norms)
    assert torch.equal(*norms)
    assert norms[0].max() > bench_adamw_ema.MAX_NORM


# What is measured


def test_samples_become_the_statistics_of_pytest_benchmark(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("benchmarks.contest.CLOCK", clock)
    seen = []

    def pedantic(target, rounds):
        for _ in range(rounds):
            before = clock()
            target()
            seen.append(clock() - before)

    outcomes = hold(contest_of(only=(lambda: None, lambda: None)), CPU, FEW)
    benchmark = SimpleNamespace(extra_info={}, pedantic=pedantic)
    replay(benchmark, outcomes["only"])
    assert seen == pytest.approx(outcomes["only"].seconds)
    assert benchmark.group == benchmark.extra_info["group"] == "a group"
    assert benchmark.extra_info["bytes"] == 8


class FakeGpu:
    """Stands in for torch.cuda: writes down what is asked of it; its first sleeps are too short."""

    def __init__(self, monkeypatch, too_short: int):
        self.log: list[str] = []
        self.sleeps: list[float] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                gpu.log.append("event")

            def query(self) -> bool:
                return len(gpu.sleeps) <= too_short

            def elapsed_time(self, _end: Event) -> float:
                return 6.0  # ms

        def sleep(cycles: int) -> None:
            self.log.append("sleep")
            self.sleeps.append(cycles / 2e9)

        fakes = {"Event": Event, "_sleep": sleep, "synchronize": lambda _device: None}
        fakes |= {"reset_peak_memory_stats": lambda _device: None, "empty_cache": lambda: None}
        fakes |= {
            "memory_allocated": lambda _device: 10,
            "max_memory_allocated": lambda _device: 17,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_calls_on_a_gpu_wait_behind_a_sleep_and_are_timed_together(monkeypatch):
    gpu = FakeGpu(monkeypatch, too_short=1)
    calls = [lambda: gpu.log.append("call")] * 3
    assert not device_sample(calls, torch.device("cuda"), 2e-3).queued
    gpu.log.clear()
    assert device_sample(calls, torch.device("cuda"), 2e-3) == (pytest.approx(2e-3), True)
    assert gpu.log == ["sleep", "event", "call", "call", "call", "event"]


@pytest.mark.parametrize(("too_short", "queued"), [(1, True), (10**6, False)])
def test_a_sleep_that_was_too_short_is_doubled(monkeypatch, too_short, queued):
    gpu = FakeGpu(monkeypatch, too_short)
    contest = contest_of(only=(lambda: None, lambda: None))
    outcome = hold(contest, torch.device("cuda"), FEW)["only"]
    assert not outcome.error
    assert outcome.queued is queued
    assert len(outcome.seconds) == FEW.least
    assert outcome.info["peak_bytes"] == 7
    first, second = gpu.sleeps[:2]
    assert second == pytest.approx(min(2 * first, LONGEST_SLEEP), rel=0.01)


def test_what_reads_values_back_is_not_put_behind_a_sleep(monkeypatch):
    gpu = FakeGpu(monkeypatch, too_short=0)
    reading = Variant("reads", lambda: lambda: None, lambda: None, host_reads=True)
    outcome = hold(Contest("a group", [reading]), torch.device("cuda"), FEW)["reads"]
    assert gpu.sleeps == []
    assert not outcome.queued


@torch.library.custom_op("fastdino_test::hungry", mutates_args=())
def hungry(x: torch.Tensor) -> torch.Tensor:
    return x + torch.empty(4 * MEGABYTE, dtype=torch.uint8).numel()


def test_peak_memory_counts_what_is_held_at_the_same_time():
    def call():
        first = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        del first
        second = torch.empty(MEGABYTE, dtype=torch.uint8)
        return second.clone()

    assert peak_bytes(call, CPU) == 2 * MEGABYTE


def test_peak_memory_sees_into_custom_operators():
    x = torch.zeros((), dtype=torch.int64)
    assert 4 * MEGABYTE <= peak_bytes(lambda: hungry(x), CPU) < 5 * MEGABYTE


def test_a_suite_runs_quickly_and_its_table_is_printed(tmp_path):
    raw = tmp_path / "raw.json"
    options = [
        "-k",
        "shadow",
        "--quick",
        "--benchmark-quiet",
        f"--benchmark-json={raw}",
        "-p",
        "no:xdist",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_ema.py", *options]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert report.main([str(raw), "--write", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in rows] == list(bench_ema.VARIANTS[True])
    assert all(row["median"] > 0 and row["copy_gbps"] > 0 for row in rows)
    assert "x paper's code" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")


# The report of a GPU


def python(name: str, code: str, timeout: float = 60) -> Part:
    return Part(name, (sys.executable, "-c", code), timeout)


HANGING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_part_that_hangs_is_killed_with_all_it_started():
    result = run_part(python("hangs", HANGING, timeout=6), grace=0.2)
    assert result.problem == "stopped after 6 s"
    child = int(result.output.split()[1])
    for _ in range(100):  # killed, it may take a moment to go
        if not is_alive(child):
            return
        time.sleep(0.1)
    pytest.fail("what the part started is still there")


def test_a_part_that_is_interrupted_can_still_write(tmp_path):
    code = f"""
import time
try:
    time.sleep(600)
except KeyboardInterrupt:
    open({str(tmp_path / "partial")!r}, "w").close()
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a report in the background
    try:
        assert run_part(python("slow", code, timeout=5)).problem == "stopped after 5 s"
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "partial").exists()


def test_all_parts_run_and_the_report_says_which_failed(tmp_path):
    planned = [
        python("hangs", "import time; time.sleep(600)", timeout=1),
        python("breaks", "print('about to break'); raise SystemExit(3)"),
        python("works", "print('12 passed')"),
    ]
    told = gpu_report.Report({"device": "A device"}, reduced=True)
    assert gpu_report.run_and_report(told, planned, tmp_path, tmp_path) == 1
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**exit status 3**" in text
    assert "## breaks: exit status 3\n\n```\nabout to break\n```" in text
    assert "**stopped after 1 s**" in text
    assert "| passed | 12 passed |" in text
    assert "These times mean nothing" in text
    parts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["parts"]
    assert [part["problem"] for part in parts] == ["stopped after 1 s", "exit status 3", ""]


def test_what_a_part_leaves_of_its_time_the_next_may_take(tmp_path, monkeypatch):
    given = []

    def run(part):
        given.append(part.timeout)
        return Result(part.name, {"hangs": part.timeout + GRACE}.get(part.name, 4.0), "", "")

    monkeypatch.setattr(gpu_report, "run_part", run)
    planned = [python(name, "", timeout=10) for name in ("one", "two", "hangs", "last")]
    told = gpu_report.Report({}, reduced=False)
    gpu_report.run_and_report(told, planned, tmp_path, tmp_path)
    assert given == [10, 16, 22, 10]


def test_what_a_bench_writes_joins_the_report(tmp_path):
    raw = tmp_path / "raw"
    (raw / "loaders").mkdir(parents=True)
    (raw / "loaders" / "loader.md").write_text("# Loaders\n\n## Arms\n")
    (raw / "loaders" / "loader.json").write_text('{"arms": 3}')
    told = gpu_report.Report({}, reduced=False)
    gpu_report.run_and_report(told, [python("works", "pass")], raw, tmp_path)
    assert "\n## Loaders\n\n### Arms\n" in (tmp_path / "report.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record["benches"] == [{"arms": 3}]


def test_the_second_report_has_files_of_its_own_and_its_pictures(tmp_path):
    raw, folder = tmp_path / "raw", tmp_path / "results"
    (raw / "training").mkdir(parents=True)
    (raw / "training" / "modes.png").write_bytes(b"a picture")
    told = gpu_report.Report({}, reduced=False, name="more")
    gpu_report.run_and_report(told, [python("works", "pass")], raw, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["modes.png", "more.json", "more.md"]


def test_the_command_prints_what_a_bench_wrote(tmp_path, monkeypatch, capsys):
    def planned(raw, *, reduced):
        assert reduced
        folder = raw / "bench"
        folder.mkdir()
        code = "from pathlib import Path; Path({!r}).write_text({!r})"
        return [
            python("table", code.format(f"{folder}/step.md", "# A step\n")),
            python("record", code.format(f"{folder}/step.json", "0")),
        ]

    monkeypatch.setattr(gpu_report, "plan_more", planned)
    assert gpu_report.main(["--more", "--reduced", "--output", str(tmp_path)]) == 0
    assert "\n## A step\n" in capsys.readouterr().out
    assert "\n## A step\n" in (tmp_path / "cpu" / "more.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kernels", [sanitize.losses, sanitize.updates, sanitize.crops])
def test_what_is_sanitized_runs(kernels):
    for tensor in kernels(torch.bfloat16, torch.device("cpu")):
        assert tensor.isfinite().all()


def test_parts_that_pass_make_a_report_that_passes(tmp_path):
    told = gpu_report.Report({}, reduced=False)
    assert gpu_report.run_and_report(told, [python("works", "pass")], tmp_path, tmp_path) == 0
    assert "mean nothing" not in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("plan", [gpu_report.plan, gpu_report.plan_more])
def test_each_report_takes_less_than_nine_minutes(plan, tmp_path):
    times = [part.timeout for part in plan(tmp_path, reduced=False)]
    times.append(gpu_report.ENVIRONMENT_TIME)
    assert sum(times) + GRACE * len(times) < 9 * 60


def test_folders_are_named_after_the_device():
    assert gpu_report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_what_the_environment_prints_is_understood():
    result = run_part(Part("environment", (sys.executable, "-m", "benchmarks.environment"), 60))
    found = gpu_report.environment_of(result)
    assert found["torch"] == torch.__version__
    assert found["device"]
    assert gpu_report.environment_of(run_part(python("broken", "print('no JSON')"))) == {}


def test_bf16_products_are_those_of_bf16_but_for_the_order_of_sums():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (20, 12))
    gradient = torch.randn(20, 12, generator=generator).bfloat16()

    def results():
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        out = torch.nn.functional.linear(*inputs, torch.ones(12, dtype=torch.bfloat16))
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    with Operands() as operands, Bf16Products():
        got = results()
    assert torch.bfloat16 not in operands.dtypes
    for ours, plain in zip(got, results(), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=2**-7)


class Operands(TorchDispatchMode):
    """Keeps the dtypes that matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in Bf16Products.PRODUCTS:
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))

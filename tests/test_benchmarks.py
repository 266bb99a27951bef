"""benchmarks/: comparisons, their checks, device timing, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fastdino_kernels import AdamWEMA, clip_grad_norms_, ema_update_
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import (
    bench_adamw_ema,
    bench_clip,
    bench_dino_loss,
    bench_ema,
    bench_linear_loss,
    bench_patch_loss,
    bench_sinkhorn,
    comparison,
    kernel_tables,
)
from benchmarks import conftest as benchmark_conftest
from benchmarks.compare_modes import Bf16Products
from benchmarks.comparison import (
    LONGEST_SLEEP,
    Baseline,
    BaselineError,
    Clock,
    Comparison,
    Effort,
    Timing,
    assert_close,
    replay,
    run_comparison,
)
from benchmarks.networks import MAX_NORM, Size
from fastdino.bench.baselines.losses import einsum_loss
from fastdino.bench.harness import Outcome, Sample
from fastdino.bench.measurement import device_time, peak_bytes
from fastdino.models.head import DINOHead
from fastdino.models.vit import VIT_ARCHS, VisionTransformer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FEW = Effort(seconds=0.0, rounds=3)
TOY = Size("toy", 16)
MEGABYTE = 1 << 20


def row(**changes) -> kernel_tables.Row:
    values = {
        "group": "a group", "baseline": "ours", "role": "ours", "median": 1e-3, "iqr": 1e-5,
        "rounds": 9, "call_seconds": 1e-3, "queued": True, "bytes": 1_500_000_000,
        "note": "read once", "peak_bytes": 2_000_000, "copy_gbps": 3000.0,
    }  # fmt: skip
    return kernel_tables.Row(**(values | changes))


# Suites


def test_the_first_sizes_of_all_suites_run_first():
    """Items in the order in which pytest collects them."""

    def item(module, **parameters):
        return SimpleNamespace(module=module, callspec=SimpleNamespace(params=parameters))

    small, large = bench_dino_loss.SIZES["quick"]
    (toy,) = bench_ema.SIZES["quick"]
    without = SimpleNamespace(module=bench_ema)
    items = [item(bench_dino_loss, size=size, phase=p) for p in "xy" for size in (small, large)]
    items += [item(bench_ema, size=toy), without]
    ordered = sorted(items, key=partial(benchmark_conftest.size_index, "quick"))
    assert ordered == [items[0], items[2], *items[4:], items[1], items[3]]


def test_a_row_is_appended_as_it_is_measured(tmp_path):
    info = {
        "group": "a group", "baseline": "ours", "role": "ours", "bytes": 10, "note": "",
        "peak_bytes": 3,
    }  # fmt: skip
    samples = [Sample(1, seconds) for seconds in (1.0, 2.0, 4.0)]
    timing = Timing(Outcome(samples=samples), info, queued=False, host_samples=[5.0])
    for _ in range(2):
        benchmark_conftest.append_row(tmp_path / "rows", timing, 3000.0)
    made = kernel_tables.read_row_lines(tmp_path / "rows")
    assert len(made) == 2
    assert made[0] == kernel_tables.Row(
        **info, median=2.0, iqr=1.5, rounds=3, call_seconds=5.0, queued=False, copy_gbps=3000.0
    )
    assert kernel_tables.read_row_lines(tmp_path / "none") == []


# Tables


def test_tables_show_bandwidths_and_speedups():
    rows = [
        row(role="paper", median=4e-3, call_seconds=9e-3, baseline="waits", queued=False),
        row(call_seconds=3e-3),  # whole calls are compared if the GPU waited
        row(group="another", role="paper", median=4e-3),
        row(group="another", role="compile", median=2e-3),
        row(group="another"),
    ]
    text = kernel_tables.tables(rows)
    for line in (
        "### another",
        "1500.0 MB: read once; copy: 3000 GB/s.",
        "| per call, host and gaps included | GB/s | of copy | peak MB | x paper's code |",
        " x paper's code | x torch.compile |",
        "| waits | 4 ms* | 10 us | 9 ms | 375 | 12% | 2 | 1.00 |",
        "| ours | 1 ms | 10 us | 3 ms | 1.5e+03 | 50% | 2 | 3.00 |",
        "| 750 | 25% | 2 | 2.00 | 1.00 |",
        "| 1.5e+03 | 50% | 2 | 4.00 | 2.00 |",
    ):
        assert line in text, line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (95.4e-6, "95.4 us"), (3e-7, "0.3 us"), (1234, "1234 s")],
)
def test_seconds_are_formatted_with_their_unit(seconds, text):
    assert kernel_tables.format_seconds(seconds) == text


# Counted bytes


def test_bytes_of_the_loss():
    size = bench_dino_loss.Size(B=2, V=3, K=5, T=2)  # bf16: a crop has 2 * 5 * 2 bytes
    counts = [bench_dino_loss.counted_bytes(size, phase)[0] for phase in bench_dino_loss.PHASES]
    assert counts == [5 * 20, 5 * 20 + 3 * 20, 2 * 5 * 20 + 3 * 20]


@pytest.mark.parametrize("arch", ["vit_small", "vit_base", "vit_large"])
def test_shapes_match_the_models(arch):
    with torch.device("meta"):
        backbone = VisionTransformer(**VIT_ARCHS[arch])
        head = DINOHead(VIT_ARCHS[arch]["embed_dim"], 65536)
    shapes = [tuple(p.shape) for module in (backbone, head) for p in module.parameters()]
    assert sorted(shapes) == sorted(Size(arch).shapes)


@pytest.mark.parametrize(("suite", "each"), [(bench_ema, (12, 14)), (bench_adamw_ema, (40, 44))])
def test_bytes_of_the_updates_are_those_of_every_parameter(suite, each):
    parameters = 21_665_664 + 22_352_128  # ViT-S/16 and a head of 65536 prototypes
    counts = [suite.counted_bytes(Size("vit_small"), shadow)[0] for shadow in (False, True)]
    assert counts == [number * parameters for number in each]


# Checks


def comparison_of(**baselines) -> Comparison:
    made = [Baseline(name, lambda run=run: run, check) for name, (run, check) in baselines.items()]
    return Comparison("a group", made, counted=8)


def test_a_wrong_baseline_is_not_timed():
    calls = []
    check = mock.Mock(side_effect=AssertionError("off by one"))
    made = comparison_of(
        wrong=(lambda: calls.append("wrong"), check),
        right=(lambda: calls.append("right"), lambda: None),
    )
    timings = run_comparison(made, CPU, FEW)
    assert "wrong" not in calls
    assert len(timings["right"].seconds) == FEW.least
    with pytest.raises(BaselineError, match="off by one"):
        replay(None, timings["wrong"])


def test_nan_is_not_close():
    assert_close("x", torch.ones(2), torch.ones(2), 1e-6)
    for value in (float("nan"), 1.1):
        with pytest.raises(AssertionError, match="x is off"):
            assert_close("x", torch.full((2,), value), torch.ones(2), 1e-2)


def loss_of_all_pairs(student, teacher, center, student_temp, teacher_temp):
    """Compute a wrong loss that includes the pairs of equal crops."""
    log_probs = torch.log_softmax(student.float() / student_temp, -1)
    targets = torch.softmax((teacher.float() - center) / teacher_temp, -1)
    loss = -torch.einsum("tbk,sbk->tsb", targets, log_probs).mean()
    return loss, teacher.float().sum(dim=(0, 1))


def loss_with_smaller_gradient(*arguments):
    loss, teacher_sum = einsum_loss(*arguments)
    return loss * 1.1 - 0.1 * loss.detach(), teacher_sum


def without_clip(network, _):
    groups = bench_adamw_ema.parameter_groups(network)
    return AdamWEMA(groups, bench_adamw_ema.LR, weight_decay=0.04).step


def loss_check(dtype):
    size = bench_dino_loss.Size(B=2, V=4, K=300, dtype=dtype)
    return partial(bench_dino_loss.check, size=size, device=CPU)


def update_check(suite, option):
    return lambda run: suite.check(run, TOY, option, CPU)


LOSSES = (bench_dino_loss.paper, einsum_loss, bench_dino_loss.ours)


def functions(baselines):
    return [function for _, function in baselines.values()]


@pytest.mark.parametrize(
    ("check", "right", "wrong", "message"),
    [
        (loss_check(torch.float32), LOSSES, loss_of_all_pairs, "is off by"),
        (loss_check(torch.bfloat16), LOSSES, loss_of_all_pairs, "is off by"),
        (loss_check(torch.float32), (), loss_with_smaller_gradient, "the gradient is off"),
        (loss_check(torch.bfloat16), (), loss_with_smaller_gradient, "the gradient is off"),
        (
            partial(bench_sinkhorn.check, size=bench_sinkhorn.Size(8, 300), device=CPU),
            functions(bench_sinkhorn.BASELINES),
            lambda teacher: teacher.float().softmax(dim=1),
            "the matrix of targets is off",
        ),
        (
            partial(bench_patch_loss.check, size=bench_patch_loss.Size(8, 300), device=CPU),
            functions(bench_patch_loss.BASELINES),
            lambda s, inputs: bench_patch_loss.dinov2(s, replace(inputs, center=0 * inputs.center)),
            "the loss is off",
        ),
        (
            partial(bench_patch_loss.check, size=bench_patch_loss.Size(8, 300), device=CPU),
            (),
            lambda s, inputs: bench_patch_loss.dinov2(s, inputs) + (s - s.detach()).sum(),
            "the gradient is off",
        ),
        (
            partial(bench_linear_loss.check, size=bench_linear_loss.Size(8, 300, 16), device=CPU),
            functions(bench_linear_loss.BASELINES),
            lambda inputs: bench_linear_loss.dinov2(replace(inputs, center=0 * inputs.center)),
            "the gradient of x is off|the loss is off",
        ),
        (
            update_check(bench_ema, False),
            functions(bench_ema.BASELINES[False]),
            lambda n: ema_update_(n.teacher, n.weights, 0.9),
            r"teacher\[0\] is off",
        ),
        (
            update_check(bench_ema, True),
            functions(bench_ema.BASELINES[True]),
            bench_ema.ours,  # leaves the copies as they were
            r"shadow\[0\] is off",
        ),
        (
            update_check(bench_clip, False),
            functions(bench_clip.BASELINES[False]),
            lambda p: clip_grad_norms_(p, 0.2),
            r"gradient\[0\] is off",
        ),
        (
            update_check(bench_clip, True),
            functions(bench_clip.BASELINES[True]),
            bench_clip.ours,
            r"gradient\[\d\] is off",
        ),
        (
            update_check(bench_adamw_ema, True),
            functions(bench_adamw_ema.BASELINES),
            without_clip,
            r"teacher\[0\] is off",
        ),
    ],
)
def test_checks_accept_right_and_reject_wrong_baselines(check, right, wrong, message, monkeypatch):
    # Compiled baselines are traced; to generate code takes most of a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for baseline in right:
        check(baseline)
    with pytest.raises(AssertionError, match=message):
        check(wrong)


def test_every_round_of_the_optimizer_has_the_same_gradients():
    made = bench_adamw_ema.adamw_ema_comparison(TOY, False, CPU)
    norms = []
    for baseline in made.baselines * 2:
        step = baseline.prepare()
        step()
        if baseline.role == "ours":
            norms.append(step.__self__.norms)
    assert torch.equal(*norms)
    assert norms[0].max() > MAX_NORM


# Time and memory


def test_samples_are_replayed_to_pytest_benchmark(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(comparison, "CLOCK", clock)
    durations = []

    def pedantic(target, rounds):
        for _ in range(rounds):
            before = clock()
            target()
            durations.append(clock() - before)

    timing = run_comparison(comparison_of(only=(lambda: None, lambda: None)), CPU, FEW)["only"]
    benchmark = SimpleNamespace(extra_info={}, pedantic=pedantic)
    replay(benchmark, timing)
    assert durations == pytest.approx(timing.seconds)
    assert benchmark.group == benchmark.extra_info["group"] == "a group"
    assert benchmark.extra_info["bytes"] == 8


class FakeGpu:
    """Replace torch.cuda and record its calls; the first `too_short` sleeps end too early."""

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

        fakes = {"Event": Event, "_sleep": sleep, "empty_cache": lambda: None}
        values = {
            "synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 10,
            "max_memory_allocated": 17,
        }  # fmt: skip
        fakes |= {name: lambda _device, value=value: value for name, value in values.items()}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_calls_on_a_gpu_are_queued_behind_a_sleep_and_timed_together(monkeypatch):
    gpu = FakeGpu(monkeypatch, too_short=1)
    calls = [lambda: gpu.log.append("call")] * 3
    assert not device_time(calls, torch.device("cuda"), 2e-3).queued
    gpu.log.clear()
    assert device_time(calls, torch.device("cuda"), 2e-3) == (pytest.approx(2e-3), True)
    assert gpu.log == ["sleep", "event", "call", "call", "call", "event"]


@pytest.mark.parametrize(("too_short", "queued"), [(1, True), (10**6, False)])
def test_a_sleep_that_is_too_short_is_doubled(monkeypatch, too_short, queued):
    gpu = FakeGpu(monkeypatch, too_short)
    made = comparison_of(only=(lambda: None, lambda: None))
    timing = run_comparison(made, torch.device("cuda"), FEW)["only"]
    assert not timing.outcome.reason
    assert timing.queued is queued
    assert len(timing.seconds) == FEW.least
    assert timing.info["peak_bytes"] == 7
    first, second = gpu.sleeps[:2]
    assert second == pytest.approx(min(2 * first, LONGEST_SLEEP), rel=0.01)


def test_a_baseline_that_reads_values_back_is_not_queued(monkeypatch):
    gpu = FakeGpu(monkeypatch, too_short=0)
    reading = Baseline("reads", lambda: lambda: None, host_reads=True)
    made = Comparison("a group", [reading])
    timing = run_comparison(made, torch.device("cuda"), FEW)["reads"]
    assert gpu.sleeps == []
    assert not timing.queued


@torch.library.custom_op("fastdino_test::hungry", mutates_args=())
def hungry(x: torch.Tensor) -> torch.Tensor:
    return x + torch.empty(4 * MEGABYTE, dtype=torch.uint8).numel()


def test_peak_memory_counts_what_is_held_at_the_same_time():
    def call():
        first = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        del first
        second = torch.empty(MEGABYTE, dtype=torch.uint8)
        return second.clone()

    x = torch.zeros((), dtype=torch.int64)
    assert peak_bytes(call, CPU) == 2 * MEGABYTE
    assert 4 * MEGABYTE <= peak_bytes(lambda: hungry(x), CPU) < 5 * MEGABYTE


def test_a_suite_runs_and_its_tables_are_written(tmp_path):
    raw = tmp_path / "raw.json"
    options = f"-k True --quick --benchmark-quiet --benchmark-json={raw} -p no:xdist".split()
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_ema.py", *options]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert kernel_tables.main([str(raw), "--write", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert [row["baseline"] for row in rows] == list(bench_ema.BASELINES[True])
    assert all(row["median"] > 0 and row["copy_gbps"] > 0 for row in rows)
    assert "x paper's code" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")


# compare_modes


class OperandTypes(TorchDispatchMode):
    """Record the dtypes of multiplied matrices."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in Bf16Products.PRODUCTS:
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_bf16_products_are_computed_in_fp32_and_rounded():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (20, 12))
    gradient = torch.randn(20, 12, generator=generator).bfloat16()

    def results():
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        out = torch.nn.functional.linear(*inputs, torch.ones(12, dtype=torch.bfloat16))
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    with OperandTypes() as operands, Bf16Products():
        products = results()
    assert torch.bfloat16 not in operands.dtypes
    for ours, plain in zip(products, results(), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=2**-7)

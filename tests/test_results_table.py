"""benchmarks.results_table: predictions next to measurements, and the README's measured rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import (
    bench_adamw_ema,
    bench_clip,
    bench_dino_loss,
    bench_ema,
    bench_patch_loss,
    bench_sinkhorn,
    results_table,
)
from benchmarks.results_table import Prediction, prediction_table, readme_rows, replace_rows
from fastdino.bench.baselines import loaders, steps

ROOT = Path(__file__).parent.parent
LOSS = "DINO loss, forward + backward, B64 V10 K65536 bfloat16"


def kernel_row(baseline, role, microseconds, **changes):
    row = {
        "group": LOSS, "baseline": baseline, "role": role, "median": 1e-6 * microseconds,
        "call_seconds": 2e-6 * microseconds, "queued": True, "gbps": 3000.0, "share_of_copy": 0.7,
        "peak_bytes": 84_000_000,
    }  # fmt: skip
    return row | changes


REPORT = {
    "environment": {"device": "NVIDIA H200"},
    "rates": {"copy_gbps": 4321.0, "product_tflops": 700.0},
    "benchmarks": [
        kernel_row("the paper's code, eager", "paper", 1360),
        kernel_row("fastdino_kernels", "ours", 80),
    ],
    "benches": [
        {
            "settings": {"arch": "vit_small", "patch_size": 16, "batch_size_per_gpu": 64},
            "arms": [
                {
                    "name": "ours-graph", "images": 64, "images_per_second": 3200.0, "mfu": 0.36,
                    "times_paper": 3.0,
                },
                {"name": "compiled", "problem": "not ready after two thirds of --time_limit"},
            ],
        },
        {
            "settings": {"batch_size_per_gpu": 64},
            "arms": {"kernel": {"images_per_second": 60000.0, "times_paper": 9.0}, "paper": {}},
        },
    ],
}  # fmt: skip


TARGETS = [
    Prediction("copy", "device", "", "copy_gbps", "GB/s", low=4200, high=4400),
    Prediction("product", "device", "", "product_tflops", "TFLOP/s", low=770, high=800),
    Prediction("loss", LOSS, "fastdino_kernels", "us", "us", low=104, high=129, floor=66, goal=75),
    Prediction("of the paper's", LOSS, "fastdino_kernels", "x_paper", goal=15),
    Prediction("of the compiled", LOSS, "fastdino_kernels", "x_compile", goal=3),
    Prediction("crops", "Loaders, *", "kernel", "images_per_second", low=32000, high=70000),
    Prediction(
        "graph", "Step, vit_small/16, B = 64", "ours-graph", "images_per_second",
        low=2450, high=3050, goal=3400, source="estimate",
    ),
]  # fmt: skip


@pytest.fixture
def targets(monkeypatch) -> None:
    """Fixed targets in place of those of the results."""
    monkeypatch.setattr(results_table, "read_predictions", lambda: TARGETS)


@pytest.mark.usefixtures("targets")
def test_measurements_stand_next_to_the_predictions():
    lines = prediction_table(REPORT).splitlines()
    assert lines[2:] == [
        "| copy, GB/s | - | 4200 - 4400 | - | 4321 | within |  |",
        "| product, TFLOP/s | - | 770 - 800 | - | 700 | 0.91 x |  |",
        "| loss, us | 66 | 104 - 129 | 75 | 80 | 0.77 x |  |",
        "| of the paper's | - | - | 15 | 17 | - |  |",
        "| of the compiled | - | - | 3 | not measured | - |  |",
        "| crops | - | 32000 - 70000 | - | 60000 | within |  |",
        "| graph | - | 2450 - 3050 | 3400 | 3200 | 1.05 x | estimate |",
    ]


def test_everything_is_not_measured_without_a_report():
    rows = prediction_table({}).splitlines()[2:]
    assert len(rows) == len(results_table.read_predictions())
    assert all("| not measured | - |" in row for row in rows)


def test_whole_calls_are_compared_if_the_gpu_waited_for_the_host():
    rows = [kernel_row("the paper", "paper", 1000, queued=False, call_seconds=5e-3)]
    rows += [kernel_row("ours", "ours", 100)]
    assert results_table.measurements_of(rows)[LOSS, "ours"]["x_paper"] == pytest.approx(25)


def test_every_prediction_names_a_comparison_and_a_baseline_that_exist():
    device = None
    sizes = bench_dino_loss.SIZES["cuda"]
    groups = {
        f"DINO loss, {phase}, {size}": bench_dino_loss.BASELINES
        for phase in bench_dino_loss.PHASES
        for size in sizes
    }
    sinkhorn = bench_sinkhorn.SIZES["cuda"][0]
    groups[f"Sinkhorn-Knopp, {sinkhorn}"] = bench_sinkhorn.BASELINES
    groups[f"patch loss, {bench_patch_loss.SIZES['cuda'][0]}"] = bench_patch_loss.BASELINES
    for size in bench_ema.SIZES["cuda"]:
        groups[f"EMA, {size}"] = bench_ema.BASELINES[False]
        groups[f"Clip, AdamW, EMA, {size}"] = bench_adamw_ema.BASELINES
    groups |= {
        "Loaders, B = 64": loaders.BASELINES,
        "Step, vit_small/16, B = 64": steps.BASELINES,
        "Step, vit_small/16, B = 16": steps.BASELINES,
        "Step, vit_base/16, B = 64": steps.BASELINES,
        "device": {"": device},
        "Host time of DINO loss, forward + backward, B1": {"fastdino_kernels": device},
        "Host time of clip, AdamW and EMA, 158": bench_adamw_ema.BASELINES,
        "Host time of EMA and clip, 158": {"ema_update_": device},
    }
    assert bench_clip.SIZES is bench_ema.SIZES
    for one in results_table.read_predictions():
        names = [
            names for group, names in groups.items() if results_table.fnmatchcase(group, one.group)
        ]
        assert names, one.group
        assert one.baseline in names[0], one.baseline


def test_a_prediction_matches_its_group_and_baseline_only():
    one = Prediction("x", "Host time of *", "a", "us", low=1, high=2)
    measured = {("Host time of EMA", "b"): {"us": 9.0}, ("EMA", "a"): {"us": 8.0}}
    assert one.measured(measured) is None
    assert one.measured(measured | {("Host time of EMA", "a"): {"us": 7.0}}) == 7.0


# The README


def test_the_readme_has_the_rows_of_the_committed_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replace_rows(text, readme_rows()) == text


def test_a_measured_gpu_replaces_the_row_that_asks_for_one(tmp_path):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(REPORT))
    rows = readme_rows(tmp_path)
    link = "`make gpu-report` ([table](benchmarks/results/nvidia-h200/report.md))"
    assert rows == [
        "| loss speed, NVIDIA H200 | forward and backward in 80 us, 17.0 times faster than the "
        f"paper's code, B = 64, V = 10, K = 65536, bf16 | {link} |",
        "| step speed, NVIDIA H200 | 3200 images/s, 3.00 times the paper's step, ViT-S/16, B = 64 "
        f"| {link} |",
        f"| crop speed, NVIDIA H200 | 60000 images/s of 2 + 8 exact crops | {link} |",
    ]
    text = f"# x\n\n| a | b | c |\n| same maths |\n{results_table.UNMEASURED}\n| gates |\n"
    replaced = replace_rows(text, rows)
    assert replaced.splitlines()[3:] == ["| same maths |", *rows, "| gates |"]
    assert replace_rows(replaced, rows) == replaced


def test_a_readme_without_the_table_is_an_error():
    with pytest.raises(ValueError, match=r"expected a table with a row that starts"):
        replace_rows("# x\n", [])

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.comparison import CLOCK, Compare, Comparison, Effort, Timing, replay, run_comparison
from fastdino.bench.measurement import copy_bandwidth
from fastdino.bench.report import quartiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EFFORT = {"cuda": Effort(1.2, 30), "cpu": Effort(8.0, 9), "quick": Effort(0.3, 5)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, to see that all of it runs")
    parser.addoption("--rows", type=Path, help="append each result to this file as it is measured")


def mode(config: pytest.Config) -> str:
    return "quick" if config.getoption("--quick") else DEVICE.type


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a module's benchmarks at its SIZES for the device or for --quick."""
    if "size" in metafunc.fixturenames:
        sizes = metafunc.module.SIZES[mode(metafunc.config)]
        metafunc.parametrize("size", sizes, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the first size of every suite before any second size."""
    items.sort(key=functools.partial(size_index, mode(config)))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        # Warnings of compilers and profilers are no failures here.
        item.add_marker(pytest.mark.filterwarnings("default"))


def size_index(kind: str, item: Any) -> int:
    """Return the position of an item's size in SIZES[kind]; 0 without one."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return item.module.SIZES[kind].index(parameters["size"]) if "size" in parameters else 0


def append_row(file: Path, timing: Timing, copy_gbps: float) -> None:
    """Append one baseline's row of kernel_tables.py as a line of JSON."""
    low, high = quartiles(timing.seconds)
    row = timing.info | {
        "median": statistics.median(timing.seconds),
        "iqr": high - low,
        "rounds": len(timing.seconds),
        "call_seconds": timing.call_seconds,
        "queued": timing.queued,
        "copy_gbps": copy_gbps,
    }
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """The key of a module's SIZES: "cuda", "cpu" or "quick"."""
    return mode(request.config)


@pytest.fixture(scope="session")
def copy_gbps(request: pytest.FixtureRequest) -> float:
    """GB/s of a copy on this machine, in this run."""
    size = 1 << 24 if mode(request.config) == "quick" else None
    return copy_bandwidth(DEVICE, size) / 1e9


@pytest.fixture(scope="session")
def timings(request: pytest.FixtureRequest) -> Callable[..., dict[str, Timing]]:
    """A cached function that runs a comparison and returns its timings."""

    @functools.cache
    def get(make: Callable[..., Comparison], *arguments: Any) -> dict[str, Timing]:
        return run_comparison(make(*arguments, DEVICE), DEVICE, EFFORT[mode(request.config)])

    return get


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    benchmark: Any,
    timings: Callable[..., dict[str, Timing]],
    copy_gbps: float,
) -> Compare:
    """compare(make_comparison, *arguments, baseline=name): the benchmark of one baseline."""

    def run(make: Callable[..., Comparison], *arguments: Any, baseline: str) -> None:
        benchmark.extra_info["copy_gbps"] = copy_gbps
        timing = timings(make, *arguments)[baseline]
        replay(benchmark, timing)
        if rows := request.config.getoption("--rows"):
            append_row(rows, timing, copy_gbps)

    return run

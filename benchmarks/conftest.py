from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.contest import CLOCK, Compete, Contest, Effort, Outcome, hold, replay
from benchmarks.measure import copy_bandwidth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Held = Callable[..., dict[str, Outcome]]
EFFORT = {"cuda": Effort(1.2, 30), "cpu": Effort(8.0, 9), "quick": Effort(0.3, 5)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes: does everything run?")


def mode(config: pytest.Config) -> str:
    return "quick" if config.getoption("--quick") else DEVICE.type


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's SIZES says what its benchmarks run at, for each device and for --quick."""
    if "size" in metafunc.fixturenames:
        sizes = metafunc.module.SIZES[mode(metafunc.config)]
        metafunc.parametrize("size", sizes, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        # Compilers and profilers warn of what is no concern here.
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def copy_gbps(request: pytest.FixtureRequest) -> float:
    """GB/s of a copy on this machine, in this run."""
    size = 1 << 24 if mode(request.config) == "quick" else None
    return copy_bandwidth(DEVICE, size) / 1e9


@pytest.fixture(scope="session")
def held(request: pytest.FixtureRequest) -> Held:
    """Outcomes by what makes the contest, which is held when the first of its variants is due."""

    @functools.cache
    def get(make: Callable[..., Contest], *arguments: Any) -> dict[str, Outcome]:
        return hold(make(*arguments, DEVICE), DEVICE, EFFORT[mode(request.config)])

    return get


@pytest.fixture
def compete(benchmark: Any, held: Held, copy_gbps: float) -> Compete:
    """compete(make_contest, *arguments, variant=name): the benchmark of one variant."""

    def run(make: Callable[..., Contest], *arguments: Any, variant: str) -> None:
        benchmark.extra_info["copy_gbps"] = copy_gbps
        replay(benchmark, held(make, *arguments)[variant])

    return run

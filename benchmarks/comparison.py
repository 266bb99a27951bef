"""Compare baselines of one operation: correctness first, then peak memory and time.

A baseline with wrong results is not timed, and its benchmark fails. The samples are replayed to
pytest-benchmark through a clock of our own, for its statistics and its JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastdino.bench.harness import Harness, Outcome, Sample
from fastdino.bench.measurement import Call, device_time, free_memory, host_seconds, peak_bytes

# The fixture of that name: compare(make_comparison, *arguments, baseline=name).
Compare = Callable[..., None]

LONGEST_SLEEP = 0.05  # seconds of the device while the host queues calls


@dataclass(frozen=True)
class Baseline:
    """One implementation of an operation.

    prepare: build one call on fresh inputs; not timed.
    check: raise AssertionError if the result is wrong.
    role: "paper" or "compile" for the references of the speedups, "ours", or "".
    host_reads: it reads values back from the device, so that its calls cannot be queued ahead.
    """

    name: str
    prepare: Callable[[], Call]
    check: Callable[[], None] = lambda: None
    role: str = ""
    host_reads: bool = False


def build_baselines(
    implementations: Mapping[str, tuple[str, Any]],
    prepare: Callable[[Any], Call],
    check: Callable[[Any], None],
    host_reads: Any = None,
) -> list[Baseline]:
    """Build the baselines of a table name -> (role, implementation).

    prepare, check: as in Baseline, for an implementation. host_reads: the one that reads values.
    """
    return [
        Baseline(name, partial(prepare, run), partial(check, run), role, run is host_reads)
        for name, (role, run) in implementations.items()
    ]


@dataclass(frozen=True)
class Comparison:
    """The baselines of one table.

    counted: bytes that the operation must move; note: how they are counted.
    calls: consecutive calls per sample; 0: as many as take a millisecond.
    host_only: measure the host's time per call instead of the device's.
    """

    title: str
    baselines: Sequence[Baseline]
    counted: int = 0
    note: str = ""
    calls: int = 0
    host_only: bool = False


@dataclass(frozen=True)
class Effort:
    """Seconds for all rounds of a comparison, and the number of rounds."""

    seconds: float
    rounds: int
    least: int = 3


@dataclass
class Timing:
    """Results of one baseline: seconds per call of each round, or the reason of its failure.

    call_seconds: median per call as the host sees it. queued: the device never waited for the host.
    """

    outcome: Outcome
    info: dict[str, Any]
    queued: bool = True
    host_samples: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Return the seconds per call of each round."""
        return [sample.seconds for sample in self.outcome.samples]

    @property
    def call_seconds(self) -> float:
        """Return the median seconds per call as the host sees them."""
        return statistics.median(self.host_samples)


class BaselineError(Exception):
    """A baseline is wrong or cannot run."""


def run_comparison(
    comparison: Comparison, device: torch.device, effort: Effort
) -> dict[str, Timing]:
    """Check and time every baseline; returns name -> timing, which keeps no tensor alive."""
    harness = Harness(baseline.name for baseline in comparison.baselines)
    timings, measures = {}, {}
    for baseline in comparison.baselines:
        info = {
            "group": comparison.title,
            "baseline": baseline.name,
            "role": baseline.role,
            "bytes": comparison.counted,
            "note": comparison.note,
        }
        timing = timings[baseline.name] = Timing(harness.outcomes[baseline.name], info)
        with harness.guard(baseline.name):
            baseline.check()
            for _ in range(3 if device.type == "cuda" else 1):  # compilation and caches
                baseline.prepare()()
            info["peak_bytes"] = peak_bytes(baseline.prepare(), device)
            measures[baseline.name] = _Sampler(baseline, comparison, device, timing)
    harness.run(measures, effort.rounds, budget=effort.seconds, least=effort.least)
    measures.clear()
    free_memory(device)
    return timings


class _Sampler:
    """Take one sample of a baseline per call."""

    def __init__(
        self, baseline: Baseline, comparison: Comparison, device: torch.device, timing: Timing
    ):
        self.baseline, self.device, self.timing = baseline, device, timing
        self.host_only = comparison.host_only
        once = host_seconds([baseline.prepare()], device)
        # A millisecond, long against the ends of the interval.
        self.calls = comparison.calls or max(1, min(16, int(1e-3 / once)))
        self.sleep = 2 * once * self.calls

    def __call__(self) -> Sample:
        """Measure host time, and device time where calls can be queued."""
        seconds = host_seconds(self._prepared(), self.device, wait=not self.host_only)
        self.timing.host_samples.append(seconds)
        if self.host_only or self.baseline.host_reads or self.device.type != "cuda":
            self.timing.queued = self.host_only or self.device.type != "cuda"
            return Sample(1, seconds)
        for _ in range(3):
            sample = device_time(self._prepared(), self.device, self.sleep)
            if sample.queued:
                break
            self.sleep = min(2 * self.sleep, LONGEST_SLEEP)
        self.timing.queued = self.timing.queued and sample.queued
        return Sample(1, sample.seconds)

    def _prepared(self) -> list[Call]:
        return [self.baseline.prepare() for _ in range(self.calls)]


class Clock:
    """A timer that only advances by measured durations."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the current time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.now += seconds


CLOCK = Clock()


def replay(benchmark: Any, timing: Timing) -> None:
    """Replay a baseline's samples to pytest-benchmark; raise BaselineError if it failed."""
    if timing.outcome.reason:
        raise BaselineError(timing.outcome.traceback)
    benchmark.group = timing.info["group"]
    benchmark.extra_info |= timing.info
    benchmark.extra_info |= {"call_seconds": timing.call_seconds, "queued": timing.queued}
    samples = iter(timing.seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=len(timing.seconds))


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert ||actual - expected|| <= tolerance * ||expected||, which NaN fails."""
    error = (actual.double() - expected.double()).norm()
    bound = tolerance * expected.double().norm()
    if not error <= bound:
        raise AssertionError(f"{name} is off by {error.item():.3g}, allowed: {bound.item():.3g}")

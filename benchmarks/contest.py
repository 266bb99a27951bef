"""Variants of one operation, compared: first whether they are right, then their time and memory.

A variant that is wrong is not timed: its benchmark fails. The others take turns, so that what
happens to the machine meanwhile happens to all. pytest-benchmark is handed the samples through a
clock of ours, which makes of them its statistics and its JSON.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import Thunk, device_sample, host_seconds, peak_bytes

# The fixture of that name: compete(make_contest, *arguments, variant=name).
Compete = Callable[..., None]

LONGEST_SLEEP = 0.05  # of the device, while the host queues calls, in seconds


@dataclass(frozen=True)
class Variant:
    """One way to do it.

    prepare: makes one call, on inputs of its own turn; untimed.
    check: raises AssertionError where the result is wrong.
    role: "paper" or "compile" for what the others are compared with, "ours", or "".
    host_reads: it reads values back from the device, so it cannot be queued ahead.
    """

    name: str
    prepare: Callable[[], Thunk]
    check: Callable[[], None]
    role: str = ""
    host_reads: bool = False


@dataclass(frozen=True)
class Contest:
    """What the variants of one table have in common.

    counted: the bytes that the operation must move at least, the same for all; the words say how.
    calls: in a row, for one sample; 0 takes as many as last a millisecond.
    host_only: measure how long a call keeps the host, not how long the device works on it.
    """

    group: str
    variants: Sequence[Variant]
    counted: int = 0
    words: str = ""
    calls: int = 0
    host_only: bool = False


@dataclass
class Outcome:
    """Of one variant: seconds of each round, or the traceback of what keeps it from being timed."""

    seconds: list[float] = field(default_factory=list)
    call_seconds: float = 0.0
    queued: bool = True
    error: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How long a contest's rounds may take together, in seconds, and how many there are."""

    seconds: float
    rounds: int
    least: int = 3


class VariantError(Exception):
    """A variant is wrong, or does not run."""


def hold(contest: Contest, device: torch.device, effort: Effort) -> dict[str, Outcome]:
    """Check, measure and time every variant; name -> outcome, which keeps no tensor alive."""
    outcomes: dict[str, Outcome] = {}
    turns: list[Iterator[None]] = []
    for variant in contest.variants:
        outcome = outcomes[variant.name] = Outcome(info=_info(contest, variant))
        try:
            variant.check()
            outcome.info["peak_bytes"] = peak_bytes(_warm(variant, device), device)
            turns.append(_rounds(variant, contest, device, outcome))
        except Exception:  # told by this variant's benchmark; the others go on
            outcome.error = traceback.format_exc()
    deadline, done = time.perf_counter() + effort.seconds, 0
    while done < effort.least or (done < effort.rounds and time.perf_counter() < deadline):
        for turn in turns:
            next(turn)
        done += 1
    del turns
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return outcomes


def _info(contest: Contest, variant: Variant) -> dict[str, Any]:
    """What the report needs to know of a variant."""
    return {
        "group": contest.group,
        "variant": variant.name,
        "role": variant.role,
        "bytes": contest.counted,
        "words": contest.words,
    }


def _warm(variant: Variant, device: torch.device) -> Thunk:
    """A prepared call, after others that paid for compilation and caches."""
    for _ in range(3 if device.type == "cuda" else 1):
        variant.prepare()()
    return variant.prepare()


def _rounds(
    variant: Variant, contest: Contest, device: torch.device, outcome: Outcome
) -> Iterator[None]:
    """Each step appends one sample to `outcome`."""
    once = host_seconds([variant.prepare()], device)
    # A millisecond, so that the ends of the interval weigh nothing.
    calls = contest.calls or max(1, min(16, int(1e-3 / once)))
    calls_seconds: list[float] = []
    sleep = 2 * once * calls
    while True:
        thunks = [variant.prepare() for _ in range(calls)]
        calls_seconds.append(host_seconds(thunks, device, wait=not contest.host_only))
        outcome.call_seconds = statistics.median(calls_seconds)
        if contest.host_only or variant.host_reads or device.type != "cuda":
            outcome.seconds.append(calls_seconds[-1])
            outcome.queued = contest.host_only or device.type != "cuda"
            yield
            continue
        for _ in range(3):
            sample = device_sample([variant.prepare() for _ in range(calls)], device, sleep)
            if sample.queued:
                break
            sleep = min(2 * sleep, LONGEST_SLEEP)
        outcome.seconds.append(sample.seconds)
        outcome.queued = outcome.queued and sample.queued
        yield


class Clock:
    """A timer that moves by what was measured, whenever it was."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def replay(benchmark: Any, outcome: Outcome) -> None:
    """Hand a variant's samples to pytest-benchmark; raise what kept it from being timed."""
    if outcome.error:
        raise VariantError(outcome.error)
    benchmark.group = outcome.info["group"]
    benchmark.extra_info |= outcome.info
    benchmark.extra_info |= {"call_seconds": outcome.call_seconds, "queued": outcome.queued}
    samples = iter(outcome.seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=len(outcome.seconds))


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """||actual - expected|| <= tolerance * ||expected||; never true of NaN."""
    error = (actual.double() - expected.double()).norm()
    bound = tolerance * expected.double().norm()
    if not error <= bound:
        raise AssertionError(f"{name} is off by {error.item():.3g}, allowed: {bound.item():.3g}")

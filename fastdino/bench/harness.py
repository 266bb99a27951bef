"""Interleaved measurement of baselines.

Every round measures each baseline once, in alternating order, so that a change in the machine's
load affects all of them. A baseline that fails is dropped, and the others continue.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from traceback import format_exc
from typing import Literal

from fastdino.bench.worker_process import WorkerError, WorkerProcess, failure_reason


@dataclass(frozen=True)
class Sample:
    """One measurement of a baseline.

    count: images (or calls) made. seconds: wall time. cpu_seconds: of all processes; None: unknown.
    """

    count: int
    seconds: float
    cpu_seconds: float | None = None


@dataclass
class Outcome:
    """The samples of one baseline, or the reason why it was not measured."""

    status: Literal["measured", "skipped", "failed"] = "measured"
    reason: str = ""
    samples: list[Sample] = field(default_factory=list)
    traceback: str = ""

    def fail(self, reason: str, *, skipped: bool = False, traceback: str = "") -> None:
        """Replace the samples by the reason of a failure."""
        self.status = "skipped" if skipped else "failed"
        self.reason, self.traceback = reason, traceback
        self.samples.clear()

    @property
    def rates(self) -> list[float]:
        """Return the images (or calls) per second of each round."""
        return [sample.count / sample.seconds for sample in self.samples]

    @property
    def cores(self) -> float | None:
        """Return the median CPU seconds per wall second."""
        return _median(s.cpu_seconds and s.cpu_seconds / s.seconds for s in self.samples)

    @property
    def cpu_ms(self) -> float | None:
        """Return the median CPU milliseconds per image."""
        return _median(s.cpu_seconds and 1e3 * s.cpu_seconds / s.count for s in self.samples)

    def speedups(self, base: Outcome) -> list[float]:
        """Return the rate relative to `base`, for each round that both have."""
        return [own / other for own, other in zip(self.rates, base.rates, strict=False)]

    def cpu_saving(self, base: Outcome) -> float | None:
        """Return the CPU time per image of `base` divided by this one's: a median over rounds."""
        pairs = list(zip(self.samples, base.samples, strict=False))
        if any(not own.cpu_seconds or other.cpu_seconds is None for own, other in pairs):
            return None
        return _median(
            (other.cpu_seconds or 0.0) / other.count / ((own.cpu_seconds or 0.0) / own.count)
            for own, other in pairs
        )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


class Harness:
    """Measure named baselines in rounds.

    Args:
        names: the baselines, in the order of the report.
        log: receives a line for each round and each failure.
        on_failure: called with the name of a baseline that failed.
    """

    def __init__(
        self,
        names: Iterable[str],
        log: Callable[[str], None] = lambda line: None,
        on_failure: Callable[[str], None] = lambda name: None,
    ):
        self.outcomes = {name: Outcome() for name in names}
        self._log, self._on_failure = log, on_failure

    @property
    def active(self) -> list[str]:
        """Return the baselines that have not failed."""
        return [name for name, outcome in self.outcomes.items() if outcome.status == "measured"]

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Record an exception in the outcome of a baseline instead of raising it."""
        try:
            yield
        except WorkerError as error:
            self.fail(name, str(error), skipped=error.missing)
        except Exception as error:  # third-party code may raise anything
            self.fail(name, failure_reason(error), traceback=format_exc())

    def fail(self, name: str, reason: str, *, skipped: bool = False, traceback: str = "") -> None:
        """Drop a baseline."""
        outcome = self.outcomes[name]
        outcome.fail(reason, skipped=skipped, traceback=traceback)
        self._log(f"{name}: {outcome.status}, {reason}")
        self._on_failure(name)

    def run(
        self,
        measures: Mapping[str, Callable[[], Sample]],
        rounds: int,
        *,
        budget: float = float("inf"),
        least: int = 1,
    ) -> None:
        """Take `rounds` samples of each active baseline.

        budget: seconds after which no round starts once `least` rounds are done.
        """
        end = time.perf_counter() + budget
        for done in range(rounds):
            if done >= least and time.perf_counter() > end:
                break
            for name in self.active[:: 1 if done % 2 == 0 else -1]:
                with self.guard(name):
                    self.outcomes[name].samples.append(measures[name]())
            self._log(f"round {done + 1} of {rounds}")


@dataclass(frozen=True)
class Effort:
    """Size of a measurement in worker processes.

    rounds: per baseline. seconds: per round. limit: seconds to wait for an answer. step: the
    batches of a round are a multiple of it.
    """

    rounds: int
    seconds: float
    limit: float
    step: int


def measure_workers(
    start: Mapping[str, Callable[[], WorkerProcess]],
    effort: Effort,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Outcome]:
    """Measure baselines that each run in a process of their own; returns name -> outcome.

    A worker is called with a number of batches and returns a Sample.
    """
    harness = Harness(start, log)
    workers: dict[str, WorkerProcess] = {}
    measures: dict[str, Callable[[], Sample]] = {}
    limit = effort.limit + 10 * effort.seconds  # a round that takes ten times as long hangs
    try:
        for name, make in start.items():
            worker = workers[name] = make()
            with harness.guard(name):
                worker.wait_until_ready(effort.limit)
                worker.call(effort.step, effort.limit)  # compiles, starts workers
                sample: Sample = worker.call(effort.step, effort.limit)
                log(f"{name}: {sample.count / sample.seconds:.0f} images/s at first")
                batches = max(1, round(effort.seconds / sample.seconds)) * effort.step
                measures[name] = partial(worker.call, batches, limit)
        harness.run(measures, effort.rounds)
    finally:
        for worker in workers.values():
            worker.close()
    return harness.outcomes

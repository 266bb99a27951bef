"""Interleaved measurement of baselines.

Every round measures each baseline once, in alternating order, so that a change in the machine's
load affects all of them. A baseline that fails is dropped, and the others continue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from traceback import format_exc
from typing import Literal

from fastdino.bench.report import median
from fastdino.bench.worker_process import WorkerError, WorkerProcess, failure_reason
from fastdino.errors import ConfigError

Status = Literal["measured", "skipped", "failed"]


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

    status: Status = "measured"
    reason: str = ""
    samples: list[Sample] = field(default_factory=list)
    traceback: str = ""

    @property
    def rates(self) -> list[float]:
        """Return the images (or calls) per second of each round."""
        return [sample.count / sample.seconds for sample in self.samples]

    @property
    def cores(self) -> float | None:
        """Return the median CPU seconds per wall second."""
        return median(s.cpu_seconds and s.cpu_seconds / s.seconds for s in self.samples)

    @property
    def cpu_ms(self) -> float | None:
        """Return the median CPU milliseconds per image."""
        return median(s.cpu_seconds and 1e3 * s.cpu_seconds / s.count for s in self.samples)

    def speedups(self, base: Outcome) -> list[float]:
        """Return the rate relative to `base`, for each round that both have."""
        return [own / other for own, other in zip(self.rates, base.rates, strict=False)]

    def cpu_saving(self, base: Outcome) -> float | None:
        """Return the CPU time per image of `base` divided by this one's: a median over rounds."""
        pairs = list(zip(self.samples, base.samples, strict=False))
        if any(not own.cpu_seconds or other.cpu_seconds is None for own, other in pairs):
            return None
        return median(
            (other.cpu_seconds or 0.0) / other.count / ((own.cpu_seconds or 0.0) / own.count)
            for own, other in pairs
        )


def choose_baselines(
    text: str | None, problems: Mapping[str, str | None], ours: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Parse --baselines into the names to run, in the order of `problems`, and those left out.

    Args:
        text: comma-separated names; None: every baseline that can run.
        problems: name -> why the baseline cannot run, or None.
        ours: baselines that the name "ours" selects too, if they can run.

    Returns: the names to run, and name -> reason for those left out.

    Raises: ConfigError: a baseline was requested by name but is unknown or cannot run.
    """
    requested = {name.strip() for name in text.split(",")} if text else set()
    if unknown := requested - problems.keys():
        raise ConfigError(
            f"--baselines {', '.join(sorted(unknown))}: expected some of {', '.join(problems)}"
        )
    for name in sorted(requested):
        if problems[name]:
            raise ConfigError(f"--baselines {name} cannot run: {problems[name]}")
    wanted = requested.union(ours if "ours" in requested else ()) or problems.keys()
    missing = {name: why for name, why in problems.items() if why and name in wanted}
    return [name for name in problems if name in wanted and name not in missing], missing


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
        status: Status = "skipped" if skipped else "failed"
        # In place: reports refer to the outcome.
        outcome = self.outcomes[name]
        outcome.status, outcome.reason, outcome.traceback = status, reason, traceback
        outcome.samples.clear()
        self._log(f"{name}: {status}, {reason}")
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


def measure_workers(
    start: Mapping[str, Callable[[], WorkerProcess]],
    *,
    rounds: int,
    seconds: float,
    limit: float,
    multiple: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Outcome]:
    """Measure baselines that each run in a process of their own; returns name -> outcome.

    A worker is called with a number of batches and returns a Sample.

    Args:
        seconds: approximate duration of a round per baseline.
        limit: seconds to wait for the first answers; a round may take 10 times `seconds` longer.
        multiple: the batches of a round are a multiple of it.
    """
    harness = Harness(start, log)
    workers: dict[str, WorkerProcess] = {}
    measures: dict[str, Callable[[], Sample]] = {}
    try:
        for name, make in start.items():
            worker = workers[name] = make()
            with harness.guard(name):
                worker.wait_until_ready(limit)
                worker.call(multiple, limit)  # compiles, starts workers
                sample: Sample = worker.call(multiple, limit)
                log(f"{name}: {sample.count / sample.seconds:.0f} images/s at first")
                batches = max(1, round(seconds / sample.seconds)) * multiple
                measures[name] = partial(worker.call, batches, limit + 10 * seconds)
        harness.run(measures, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    return harness.outcomes

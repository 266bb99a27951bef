"""Rounds in turn: what happens to the machine meanwhile happens to every competitor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from fastdino.bench.isolated import Isolated, WorkerError

Status = Literal["measured", "skipped", "failed"]


@dataclass(frozen=True)
class Sample:
    """One round: images made, wall seconds, CPU seconds of all processes (None: not known)."""

    images: int
    seconds: float
    cpu_seconds: float | None


@dataclass
class Outcome:
    """What became of a competitor: its rounds, or why there are none."""

    status: Status = "measured"
    reason: str = ""
    samples: list[Sample] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """The median of the rounds."""
        return statistics.median(s.images / s.seconds for s in self.samples)

    @property
    def range(self) -> tuple[float, float]:
        """The slowest and the fastest round, images/s."""
        rates = [s.images / s.seconds for s in self.samples]
        return min(rates), max(rates)

    @property
    def cores(self) -> float | None:
        """CPU seconds a second, the median of the rounds."""
        cpu = [s.cpu_seconds / s.seconds for s in self.samples if s.cpu_seconds is not None]
        return statistics.median(cpu) if cpu else None

    @property
    def cpu_ms(self) -> float | None:
        """CPU milliseconds an image, the median of the rounds."""
        cpu = [1e3 * s.cpu_seconds / s.images for s in self.samples if s.cpu_seconds is not None]
        return statistics.median(cpu) if cpu else None

    def times(self, base: Outcome) -> float | None:
        """How many times faster than `base`: the median over the rounds that both have."""
        return _median_ratio(
            [one.images / one.seconds for one in self.samples],
            [one.images / one.seconds for one in base.samples],
        )

    def times_less_cpu(self, base: Outcome) -> float | None:
        """How many times less CPU time an image costs than with `base`, in the same way."""
        if any(one.cpu_seconds is None for one in self.samples + base.samples):
            return None
        return _median_ratio(
            [(one.cpu_seconds or 0.0) / one.images for one in base.samples],
            [(one.cpu_seconds or 0.0) / one.images for one in self.samples],
        )


def _median_ratio(values: list[float], bases: list[float]) -> float | None:
    """Of pairs; None where there are none, or a base is 0."""
    pairs = list(zip(values, bases, strict=False))
    if not pairs or any(base == 0 for _, base in pairs):
        return None
    return statistics.median(value / base for value, base in pairs)


@dataclass(frozen=True)
class Effort:
    """rounds: of each competitor. seconds: of a round. limit: seconds to wait for any answer.

    step: the work of a round is a multiple of it, in batches.
    """

    rounds: int
    seconds: float
    limit: float
    step: int


def take_turns(
    competitors: Mapping[str, Callable[[], Isolated]],
    effort: Effort,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Outcome]:
    """Starts all of them, warms each up, then measures in rounds; name -> outcome.

    Each answers a call with a number of batches by a Sample. One that fails, or does not answer,
    is told in its outcome and left out from there on.
    """
    outcomes = {name: Outcome() for name in competitors}
    running: dict[str, Isolated] = {}
    batches: dict[str, int] = {}
    try:
        for name, start in competitors.items():
            running[name] = start()
            with _told(name, outcomes[name], running, say):
                batches[name] = _warm_up(name, running[name], effort, say)
        for done in range(effort.rounds):
            # There and back, so that none always follows the same one.
            for name in list(running)[:: 1 if done % 2 == 0 else -1]:
                with _told(name, outcomes[name], running, say):
                    # A round that lasts ten times as long as it should has hung.
                    limit = effort.limit + 10 * effort.seconds
                    outcomes[name].samples.append(running[name].call(batches[name], limit))
            say(f"round {done + 1} of {effort.rounds}")
    finally:
        for isolated in running.values():
            isolated.close()
    return outcomes


def _warm_up(name: str, isolated: Isolated, effort: Effort, say: Callable[[str], None]) -> int:
    """The batches of a round."""
    isolated.wait_until_made(effort.limit)
    isolated.call(effort.step, effort.limit)  # compiles, starts workers
    sample: Sample = isolated.call(effort.step, effort.limit)
    say(f"{name}: {sample.images / sample.seconds:.0f} images/s at first")
    return max(1, round(effort.seconds / sample.seconds)) * effort.step


@contextmanager
def _told(
    name: str, outcome: Outcome, running: dict[str, Isolated], say: Callable[[str], None]
) -> Iterator[None]:
    """Turns a WorkerError into the competitor's outcome, and takes it out of those running."""
    try:
        yield
    except WorkerError as error:
        running.pop(name)
        outcome.status = "skipped" if error.missing else "failed"
        outcome.reason = str(error)
        outcome.samples.clear()
        say(f"{name}: {outcome.status}, {error}")

"""fastdino.bench.timing: rounds in turn, and the figures made of them."""

from __future__ import annotations

import pytest

from fastdino.bench.isolated import WorkerError
from fastdino.bench.timing import Effort, Outcome, Sample, take_turns

EFFORT = Effort(rounds=3, seconds=2.0, limit=7.0, step=2)


class Fake:
    """Takes `seconds` a batch of 10 images; raises `error` at call number `at`."""

    def __init__(self, name, calls, seconds=1.0, error=None, at=0):
        self.name, self.calls, self.seconds, self.error, self.at = name, calls, seconds, error, at
        self.done, self.closed = 0, False

    def wait_until_made(self, timeout):
        if self.at < 0:
            raise self.error

    def call(self, batches, timeout):
        self.done += 1
        if self.error is not None and self.done == self.at:
            raise self.error
        self.calls.append((self.name, batches, timeout))
        return Sample(10 * batches, self.seconds * batches, 1.5 * self.seconds * batches)

    def close(self):
        self.closed = True


def test_each_is_warmed_up_and_measured_in_turn_there_and_back():
    calls = []
    slow, fast = Fake("slow", calls, 1.0), Fake("fast", calls, 0.125)
    outcomes = take_turns({"slow": lambda: slow, "fast": lambda: fast}, EFFORT)
    assert calls[:4] == [("slow", 2, 7), ("slow", 2, 7), ("fast", 2, 7), ("fast", 2, 7)]
    # As many batches as last about 2 s, a multiple of 2; at most ten times that, and the limit.
    rounds = [("slow", 2, 27), ("fast", 16, 27)]
    assert calls[4:] == [*rounds, *rounds[::-1], *rounds]
    assert outcomes["fast"].samples == [Sample(160, 2.0, 3.0)] * 3
    assert outcomes["fast"].times(outcomes["slow"]) == 8
    assert slow.closed
    assert fast.closed


@pytest.mark.parametrize("at", [-1, 1, 2, 3, 5])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (WorkerError("no answer within 7 s"), "failed"),
        (WorkerError("lightly is not installed", missing=True), "skipped"),
    ],
)
def test_one_that_fails_is_told_and_the_others_go_on(at, error, status):
    calls, lines = [], []
    bad, good = Fake("bad", calls, error=error, at=at), Fake("good", calls)
    outcomes = take_turns({"bad": lambda: bad, "good": lambda: good}, EFFORT, lines.append)
    assert (outcomes["bad"].status, outcomes["bad"].reason) == (status, str(error))
    assert outcomes["bad"].samples == []
    assert len(outcomes["good"].samples) == 3
    assert f"bad: {status}, {error}" in lines
    assert outcomes["good"].times(outcomes["bad"]) is None


def test_all_are_closed_when_the_user_stops():
    calls = []
    started = [Fake("one", calls), Fake("two", calls, error=KeyboardInterrupt(), at=3)]
    with pytest.raises(KeyboardInterrupt):
        take_turns({one.name: lambda one=one: one for one in started}, EFFORT)
    assert all(one.closed for one in started)


def test_figures_are_medians_of_the_rounds():
    ours = Outcome(samples=[Sample(100, 1, 2), Sample(100, 2, 3), Sample(100, 4, 10)])
    base = Outcome(samples=[Sample(50, 1, None), Sample(10, 1, None), Sample(20, 1, None)])
    assert ours.images_per_second == 50
    assert ours.range == (25, 100)
    assert ours.cores == 2
    assert ours.cpu_ms == 30
    assert ours.times(base) == 2  # 2, 5, 1.25: in the same rounds
    assert (base.cores, base.cpu_ms, ours.times_less_cpu(base)) == (None, None, None)
    twice = Outcome(samples=[Sample(10, 9, 0.4), Sample(10, 9, 0.9), Sample(10, 9, 0.8)])
    assert ours.times_less_cpu(twice) == 2  # 2, 3, 0.8
    assert ours.times_less_cpu(Outcome()) is None
    # Too little for the clock.
    assert Outcome(samples=[Sample(10, 9, 0.0)]).times_less_cpu(twice) is None

"""fastdino.bench.harness: interleaved rounds, failures, and the figures of an outcome."""

from __future__ import annotations

import pytest

from fastdino.bench.harness import Harness, Outcome, Sample, choose_baselines, measure_workers
from fastdino.bench.report import median
from fastdino.bench.worker_process import WorkerError

EFFORT = {"rounds": 3, "seconds": 2.0, "limit": 7.0, "multiple": 2}


class FakeWorker:
    """Take `seconds` per batch of 10 images; raise `error` in call number `at` (0: never)."""

    def __init__(self, name, calls, seconds=1.0, error=None, at=0):
        self.name, self.calls, self.seconds, self.error, self.at = name, calls, seconds, error, at
        self.done, self.closed = 0, False

    def wait_until_ready(self, timeout):
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


def test_workers_warm_up_and_are_measured_in_alternating_order():
    calls = []
    slow, fast = FakeWorker("slow", calls, 1.0), FakeWorker("fast", calls, 0.125)
    outcomes = measure_workers({"slow": lambda: slow, "fast": lambda: fast}, **EFFORT)
    assert calls[:4] == [("slow", 2, 7), ("slow", 2, 7), ("fast", 2, 7), ("fast", 2, 7)]
    # Batches for about 2 s, a multiple of 2; the time limit is ten rounds more than the answer's.
    rounds = [("slow", 2, 27), ("fast", 16, 27)]
    assert calls[4:] == [*rounds, *rounds[::-1], *rounds]
    assert outcomes["fast"].samples == [Sample(160, 2.0, 3.0)] * 3
    assert outcomes["fast"].speedups(outcomes["slow"]) == [8, 8, 8]
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
def test_a_failure_is_recorded_and_the_others_continue(at, error, status):
    calls, lines = [], []
    bad, good = FakeWorker("bad", calls, error=error, at=at), FakeWorker("good", calls)
    outcomes = measure_workers(
        {"bad": lambda: bad, "good": lambda: good}, **EFFORT, log=lines.append
    )
    assert (outcomes["bad"].status, outcomes["bad"].reason) == (status, str(error))
    assert outcomes["bad"].samples == []
    assert len(outcomes["good"].samples) == 3
    assert f"bad: {status}, {error}" in lines
    assert outcomes["good"].speedups(outcomes["bad"]) == []


def test_workers_are_closed_after_an_interrupt():
    calls = []
    workers = [
        FakeWorker("one", calls),
        FakeWorker("two", calls, error=KeyboardInterrupt(), at=3),
    ]
    with pytest.raises(KeyboardInterrupt):
        measure_workers({worker.name: lambda worker=worker: worker for worker in workers}, **EFFORT)
    assert all(worker.closed for worker in workers)


def test_an_exception_drops_a_baseline_with_its_traceback():
    dropped = []
    harness = Harness(["bad", "good"], on_failure=dropped.append)
    samples = iter([Sample(1, 1.0)])
    harness.run({"bad": lambda: next(samples), "good": lambda: Sample(1, 2.0)}, rounds=3)
    bad = harness.outcomes["bad"]
    assert (bad.status, bad.reason, bad.samples) == ("failed", "StopIteration", [])
    assert "next(samples)" in bad.traceback
    assert (dropped, harness.active) == (["bad"], ["good"])
    assert len(harness.outcomes["good"].samples) == 3


def test_no_round_starts_after_the_budget_once_enough_are_done():
    harness = Harness(["one"])
    harness.run({"one": lambda: Sample(1, 1.0)}, rounds=9, budget=0.0, least=2)
    assert len(harness.outcomes["one"].samples) == 2


def test_figures_are_medians_over_the_rounds():
    ours = Outcome(samples=[Sample(100, 1, 2), Sample(100, 2, 3), Sample(100, 4, 10)])
    base = Outcome(samples=[Sample(50, 1), Sample(10, 1), Sample(20, 1)])
    assert ours.rates == [100, 50, 25]
    assert ours.cores == 2
    assert ours.cpu_ms == 30
    assert ours.speedups(base) == [2, 5, 1.25]
    assert median(ours.speedups(base)) == 2
    assert (base.cores, base.cpu_ms, ours.cpu_saving(base)) == (None, None, None)
    twice = Outcome(samples=[Sample(10, 9, 0.4), Sample(10, 9, 0.9), Sample(10, 9, 0.8)])
    assert ours.cpu_saving(twice) == 2  # of 2, 3, 0.8
    assert ours.cpu_saving(Outcome()) is None
    assert Outcome(samples=[Sample(10, 9, 0.0)]).cpu_saving(twice) is None  # below a clock tick


PROBLEMS = {"paper": None, "ours": None, "ours-fast": None, "ours-graph": "no GPU", "other": "no"}


@pytest.mark.parametrize(
    ("text", "chosen", "missing"),
    [
        (None, ["paper", "ours", "ours-fast"], {"ours-graph": "no GPU", "other": "no"}),
        ("ours-fast, paper", ["paper", "ours-fast"], {}),
        ("ours", ["ours", "ours-fast"], {"ours-graph": "no GPU"}),
    ],
)
def test_baselines_are_chosen_by_name_and_availability(text, chosen, missing):
    assert choose_baselines(text, PROBLEMS, ["ours", "ours-fast", "ours-graph"]) == (
        chosen, missing,
    )  # fmt: skip

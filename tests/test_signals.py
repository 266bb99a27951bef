"""Agreement of the ranks to stop; test_resume and test_linear send real signals."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from fastdino import distributed, signals
from fastdino.signals import StopSignals

STOP = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def test_ranks_exchange_signals_about_once_per_second_and_after_the_same_step(monkeypatch):
    """Each exchange makes the host wait for its GPU, so it is not done after every step."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: 0.0))
    sent = []

    def gather(mine):
        sent.append(mine)
        # The other rank is slower.
        return [mine, ("SIGTERM" if len(sent) == 3 else None, 0.1, False)]

    monkeypatch.setattr(distributed, "gather", gather)
    caught = StopSignals()
    assert [caught.should_stop_after_step() for _ in range(21)] == [False] * 20 + [True]
    assert sent == [(None, 0.0, False)] * 3  # after steps 1, 11 and 21
    assert caught.received == "SIGTERM"


def test_rank_0_decides_about_timed_saves_in_the_same_exchange(monkeypatch):
    rank, due = [0], [False, True]

    def gather(mine):
        return [(None, 0.5, due[0]), (None, 0.5, due[1])] if rank[0] else [mine, mine]

    caught = StopSignals(lambda: True)
    assert not caught.save_due
    assert not caught.should_stop_after_step()
    assert caught.save_due, "one process asks after each step"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(distributed, "gather", gather)
    rank[0] = 1
    saves = []
    for step in range(5):
        due[0] = step >= 2
        caught.should_stop_after_step()
        saves.append(caught.save_due)
    assert saves == [False, False, True, False, True]  # exchanges after steps 1, 3 and 5


@pytest.mark.parametrize("number", STOP)
def test_signals_are_caught_unless_they_were_ignored(number):
    before = signal.getsignal(number)
    with StopSignals() as caught:
        os.kill(os.getpid(), number)
        assert caught.should_stop()
        assert caught.received == signal.Signals(number).name
    assert signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as caught:
            os.kill(os.getpid(), number)
            assert not caught.should_stop()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("sent", "usual"),
    [
        ([(signal.SIGTERM, 100), (signal.SIGTERM, 101)], False),  # forwarded by a launcher
        ([(signal.SIGTERM, 100), (signal.SIGTERM, 160)], True),
        # Slurm's warning, then the time limit: the run still has Slurm's KillWait to save.
        ([(signal.SIGUSR1, 100), (signal.SIGTERM, 160)], False),
        ([(signal.SIGUSR1, 100), (signal.SIGTERM, 160), (signal.SIGTERM, 220)], True),
        ([(signal.SIGUSR1, 100), (signal.SIGUSR1, 160)], False),
        ([(signal.SIGTERM, 100), (signal.SIGUSR1, 160)], False),
    ],
)
def test_a_later_signal_has_its_usual_effect_unless_one_of_them_is_a_warning(
    monkeypatch, sent, usual
):
    clock, effects = SimpleNamespace(monotonic=lambda: now), []
    monkeypatch.setattr(signals, "time", clock)
    before = {number: signal.signal(number, lambda *args: effects.append(args)) for number in STOP}
    try:
        now = 0
        with StopSignals() as caught:
            for number, now in sent:  # noqa: B007
                os.kill(os.getpid(), number)
            assert caught.should_stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert bool(effects) == usual

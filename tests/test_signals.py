"""Agreement of the ranks to stop; test_loop and test_linear send real signals."""

from __future__ import annotations

from types import SimpleNamespace

from fastdino import distributed, signals
from fastdino.signals import StopSignals


def test_ranks_exchange_signals_about_once_per_second_and_after_the_same_step(monkeypatch):
    """Each exchange makes the host wait for its GPU, so it is not done after every step."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: 0.0))
    sent = []

    def gather(mine):
        sent.append(mine)
        return [mine, ("SIGTERM" if len(sent) == 3 else None, 0.1)]  # the other rank is slower

    monkeypatch.setattr(distributed, "gather", gather)
    caught = StopSignals()
    assert [caught.should_stop_after_step() for _ in range(21)] == [False] * 20 + [True]
    assert sent == [(None, 0.0)] * 3  # after steps 1, 11 and 21
    assert caught.received == "SIGTERM"

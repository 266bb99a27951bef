"""How the processes of a run agree to stop; test_run and test_linear send real signals."""

from __future__ import annotations

from types import SimpleNamespace

from fastdino import distributed, signals
from fastdino.signals import StopSignals


def test_processes_ask_each_other_about_once_a_second_and_after_the_same_step(monkeypatch):
    """Each time the host waits for its GPU, so not after every step."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: 0.0))
    asked = []

    def gather(mine):
        asked.append(mine)
        return [mine, ("SIGTERM" if len(asked) == 3 else None, 0.1)]  # the other is the slower one

    monkeypatch.setattr(distributed, "gather", gather)
    caught = StopSignals()
    stop = [caught.agreed_after_step() for _ in range(21)]
    assert stop == [False] * 20 + [True]
    assert asked == [(None, 0.0)] * 3  # after steps 1, 11 and 21
    assert caught.received == "SIGTERM"

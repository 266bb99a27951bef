"""SIGTERM and SIGINT: what runs finishes its step, saves, and exits with 75."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from fastdino import distributed

# EX_TEMPFAIL of sysexits.h: stopped by a signal, saved; the same command goes on.
EXIT_INTERRUPTED = 75
# Within this time a second signal is the first one, passed on by a launcher.
SAME_SIGNAL_SECONDS = 5.0
# How often, about, the processes of a run ask each other whether one was told to stop.
AGREE_SECONDS = 1.0


class StopSignals:
    """Catches SIGTERM and SIGINT while the block runs; a later one acts as if none were caught.

    One that follows within seconds is the same: a launcher passes on what its whole group has got.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._steps, self._next = 0, 1  # since the processes last asked each other; of them to do
        self._asked_at = time.monotonic()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def agreed_after_step(self) -> bool:
        """As `agreed`, but many processes ask each other about once a second only.

        The answer makes the host wait for all that it has asked of its GPU.
        """
        if distributed.world_size() == 1:
            return self.agreed()
        self._steps += 1
        return self._steps >= self._next and self.agreed()

    def agreed(self) -> bool:
        """Whether any process of the run was asked to stop; the same answer on every process."""
        if distributed.world_size() == 1:
            return self.received is not None
        seconds = (time.monotonic() - self._asked_at) / max(self._steps, 1)
        answers = distributed.gather((self.received, seconds))
        # All processes must ask again after the same step: they go by the slowest.
        slowest = max(seconds for _, seconds in answers)
        self._next = max(1, round(AGREE_SECONDS / max(slowest, 1e-3)))
        self._steps, self._asked_at = 0, time.monotonic()
        names = [name for name, _ in answers if name]
        self.received = self.received or (names[0] if names else None)
        return bool(names)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
        elif now - self._received_at > SAME_SIGNAL_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

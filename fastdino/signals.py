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


class StopSignals:
    """Catches SIGTERM and SIGINT while the block runs; a later one acts as if none were caught.

    One that follows within seconds is the same: a launcher passes on what its whole group has got.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any process of the run was asked to stop; the same answer on every process."""
        if distributed.world_size() == 1:
            return self.received is not None
        names = [name for name in distributed.gather(self.received) if name]
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

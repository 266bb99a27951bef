"""SIGTERM, SIGINT, SIGHUP and SIGUSR1: finish the step, save, and exit with status 75."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from fastdino import distributed

# SIGHUP: the terminal or the connection to it was closed. SIGUSR1: Slurm's warning before the time
# limit or a preemption, with --signal=USR1@SECONDS.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: stopped by a signal and saved; running the same command resumes.
EXIT_INTERRUPTED = 75
# A second signal within this time is the first one, forwarded by a launcher.
SAME_SIGNAL_SECONDS = 5.0
# Approximate interval at which the ranks exchange whether one of them received a signal.
AGREE_SECONDS = 1.0


class StopSignals:
    """Catches the STOP_SIGNALS while the block runs, except those that are ignored.

    nohup makes a process ignore SIGHUP, and a shell's background jobs may ignore SIGINT.

    A later signal has its usual effect. One that follows within seconds is ignored, because a
    launcher forwards the signal that its whole process group already received. SIGUSR1 only warns:
    it never ends the process, and the first signal after it is not a later one.

    Args: wants_save: asked on rank 0, for `save_due`.

    Attributes:
        received: name of the signal, on every rank once `should_stop` has returned True.
        save_due: rank 0 wanted to save in the exchange of the last step, if there was one.
    """

    def __init__(self, wants_save: Callable[[], bool] = lambda: False) -> None:
        self.received: str | None = None
        self.save_due = False
        self._wants_save = wants_save
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._steps, self._next = 0, 1  # steps since the last exchange, and until the next one
        self._exchanged_at = time.monotonic()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            distributed.name_lost_rank(error)
        finally:
            self._restore()

    def should_stop_after_step(self) -> bool:
        """Call `should_stop` about once per second; return False in between.

        The exchange makes the host wait for all work queued on its GPU.
        """
        if distributed.world_size() == 1:
            return self.should_stop()
        self.save_due = False
        self._steps += 1
        return self._steps >= self._next and self.should_stop()

    def should_stop(self) -> bool:
        """Return True on all ranks if one of them received a signal."""
        if distributed.world_size() == 1:
            self.save_due = self._wants_save()
            return self.received is not None
        seconds = (time.monotonic() - self._exchanged_at) / max(self._steps, 1)
        answers = distributed.gather((self.received, seconds, self._wants_save()))
        # All ranks must call gather again after the same step, so the slowest sets the interval.
        slowest = max(seconds for _, seconds, _ in answers)
        self._next = max(1, round(AGREE_SECONDS / max(slowest, 1e-3)))
        self._steps, self._exchanged_at = 0, time.monotonic()
        names = [name for name, _, _ in answers if name]
        self.save_due = answers[0][2]
        self.received = self.received or (names[0] if names else None)
        return bool(names)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received in (None, signal.SIGUSR1.name):
            self.received, self._received_at = signal.Signals(number).name, now
        elif number != signal.SIGUSR1 and now - self._received_at > SAME_SIGNAL_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

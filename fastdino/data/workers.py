"""DataLoader workers that ignore SIGTERM, SIGINT, SIGHUP and SIGUSR1.

A launcher signals the whole process group. The main process then finishes its step with the batches
of these workers, and saves.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from fastdino.signals import STOP_SIGNALS


class SteadyLoader(DataLoader[Any]):
    """A DataLoader whose workers ignore signals and stop when the iteration ends."""

    def __init__(self, dataset: Dataset[Any], **options: Any):
        super().__init__(dataset, worker_init_fn=init_worker, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        iterator = super().__iter__()
        if self.num_workers == 0:
            yield from iterator
            return
        # Runs before multiprocessing's own hook, which would wait for the workers forever.
        end = partial(end_workers, weakref.ref(iterator), os.getpid())
        atexit.register(end)
        try:
            yield from iterator
        finally:
            atexit.unregister(end)
            end()


def end_workers(iterator: weakref.ref[Any], owner: int) -> None:
    """Kill the workers of a DataLoader's iterator, which ignore the SIGTERM that torch sends."""
    running = iterator()
    if running is None or os.getpid() != owner:
        return
    running._shutdown_workers()
    for worker in running._workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def init_worker(_worker: int) -> None:
    """Ignore signals, and never free objects inherited from the main process.

    In a forked worker, the destructor of an inherited DALI pipeline would wait forever for threads
    lost in the fork.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()

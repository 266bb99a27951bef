"""A DataLoader's workers that leave SIGTERM and SIGINT to the main process.

A launcher signals a whole group of processes. The main one finishes its step with these workers'
batches, and saves.
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


class SteadyLoader(DataLoader[Any]):
    """A DataLoader with such workers, which end with the loop over it."""

    def __init__(self, dataset: Dataset[Any], **options: Any):
        super().__init__(dataset, worker_init_fn=init_worker, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        iterator = super().__iter__()
        if self.num_workers == 0:
            yield from iterator
            return
        # Runs before multiprocessing's own hook, which would wait for them for ever.
        end = partial(end_workers, weakref.ref(iterator), os.getpid())
        atexit.register(end)
        try:
            yield from iterator
        finally:
            atexit.unregister(end)
            end()


def end_workers(iterator: weakref.ref[Any], owner: int) -> None:
    """Ends the workers of a DataLoader's iterator, which ignore the SIGTERM that torch sends."""
    running = iterator()
    if running is None or os.getpid() != owner:
        return
    running._shutdown_workers()
    for worker in running._workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def init_worker(_worker: int) -> None:
    """Leaves signals to the main process.

    And keeps a forked worker from freeing what it inherited: a DALI pipeline among it would wait in
    its destructor, for ever, for threads that a fork leaves behind.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()

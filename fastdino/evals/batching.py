"""Batches of items, and loading them in threads ahead of the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from fastdino.environment import cpu_count
from fastdino.waiting import DaemonExecutor

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Split items into lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def load_batches(
    load: Callable[[Item], Loaded], items: Iterable[Item], size: int, workers: int
) -> Iterator[list[Loaded]]:
    """Load items in threads and yield them in batches, in order; raise the first error.

    The next batch is loaded while the caller processes the current one.
    """
    groups = batches(items, size)
    with DaemonExecutor(min(workers, cpu_count())) as pool:
        pending = [pool.submit(load, item) for item in next(groups, [])]
        while pending:
            loaded = [future.result() for future in pending]
            pending = [pool.submit(load, item) for item in next(groups, [])]
            yield loaded

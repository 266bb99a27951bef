"""Process group and collectives.

In a run with one process no process group exists, and every function here is a no-op.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastdino.errors import ConfigError, UserError
from fastdino.launch import Launch, read_launch
from fastdino.waiting import killable

T = TypeVar("T")
# Rank 0 reads the image headers of a large dataset while the others wait.
TIMEOUT = timedelta(hours=2)
SLICE_ELEMENTS = 1 << 26  # elements that `total` copies to the GPU at a time


@contextmanager
def process_group(device: torch.device, dist_url: str) -> Iterator[None]:
    """Join the process group of torchrun or srun and leave it at the end.

    It uses nccl on GPUs and gloo on CPUs. A run of one process has none. A process may join several
    groups one after the other; all ranks must join each of them.

    Raises: ConfigError: variables of a launcher that contradict each other, or no connection.
    """
    launch = read_launch()
    if dist.is_initialized() or launch.world_size == 1:
        yield
        return
    if launch.master and dist_url == "env://":
        dist_url = "tcp://{}:{}".format(*launch.master)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        with killable():  # it waits for the other ranks
            dist.init_process_group(
                backend,
                store=_store_of_next_group(dist_url, launch),
                rank=launch.rank,
                world_size=launch.world_size,
                device_id=device if device.type == "cuda" else None,
                timeout=TIMEOUT,
            )
    except (OSError, RuntimeError, ValueError) as error:  # includes torch.distributed.DistError
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} cannot join the others by {backend} at "
            f"{dist_url} ({reason}): check --dist_url, or MASTER_ADDR and MASTER_PORT"
        ) from error
    yield
    # Not after an error: leaving the group would wait for ranks that may be in a collective. The
    # launcher stops them when this process exits.
    dist.destroy_process_group()


def _store_of_next_group(dist_url: str, launch: Launch) -> Store:
    """Return a store that has no keys of earlier process groups.

    With their keys, the ranks would try to connect to the sockets of the earlier group and hang.
    """
    master = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))  # of env://
    store, numbers = _open_store(dist_url, launch.rank, launch.world_size, master)
    return PrefixStore(f"group{next(numbers)}", store)


@functools.cache  # rank 0 serves it until the process ends, so no rank can join one that closes
def _open_store(
    dist_url: str, rank: int, world_size: int, master: tuple[str | None, ...]
) -> tuple[Store, Iterator[int]]:
    """Connect to the store of rank 0, and count the groups that use it."""
    store, _, _ = next(rendezvous(dist_url, rank, world_size, timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    return store, itertools.count()


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(values: Tensor) -> Tensor:
    """Average `values` over all ranks, to the same bits on each; NaN if any value is NaN."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def total(values: Tensor) -> Tensor:
    """Sum a contiguous CPU tensor over all ranks, in place, and return it.

    With nccl it passes through the GPU in slices, as it may not fit there.
    """
    if world_size() == 1:
        return values
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
    for part in values.view(-1).split(SLICE_ELEMENTS):
        summed = part.to(device)
        dist.all_reduce(summed)
        part.copy_(summed)
    return values


def gather(value: Any) -> list[Any]:
    """Return the picklable `value` of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with killable(always=False):
        dist.all_gather_object(values, value)
    return values


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise on every rank if the block, or the decorated function, raises on one of them.

    The block must not contain collectives. The lowest failing rank raises its own error. The others
    raise a copy marked as `reported`, or a UserError with its repr if it is not a UserError.
    """
    if world_size() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as raised:
        own = raised
    portable = own if own is None or isinstance(own, UserError) else UserError(repr(own))
    first = next(((i, error) for i, error in enumerate(gather(portable)) if error), None)
    if first is None:
        return
    failed_rank, error = first
    if failed_rank == rank() and own is not None:
        raise own
    error.reported = True
    raise error


def from_main(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every rank; its error is raised on all."""
    result: list[Any] = [None]
    with fail_together():
        if rank() == 0:
            result = [make()]
    if world_size() > 1:
        with killable(always=False):
            dist.broadcast_object_list(result, src=0)
    return result[0]

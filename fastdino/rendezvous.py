"""The store of a run of several ranks: connect to it, and meet the other ranks there."""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple
from urllib.parse import urlsplit

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastdino.errors import ConfigError
from fastdino.launch import Launch
from fastdino.liveness import listed

POLL_SECONDS = 0.1
# Rank 0 serves the store for so long after it has posted why the ranks cannot start.
LAST_SECONDS = 1.0
_SAME = "start every rank, with the same MASTER_ADDR and MASTER_PORT or --dist_url"


class _Roll(NamedTuple):
    """The ranks that have met: a name for this time, the hosts by rank, or a problem."""

    name: str
    hosts: list[str]
    problem: str = ""


def meet(dist_url: str, launch: Launch, seconds: float) -> tuple[Store, bool]:
    """Return a store that all ranks have joined, and True on one rank per host, not counting 0.

    It has no keys of earlier process groups, with which the ranks would try to connect to the
    sockets of the earlier group and hang. Those are also of processes that have ended: the agents
    of torchrun keep their store when they start the processes again.

    Raises:
        ConfigError: ranks that are missing after `seconds`, or that contradict each other.
        OSError, RuntimeError, ValueError: the store cannot be reached, or a wrong URL.
    """
    master = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))  # of env://
    store, numbers = _open(dist_url, launch.rank, launch.world_size, seconds, master)
    group = PrefixStore(f"group{next(numbers)}", store)
    roll = (_answer if launch.rank else _call_the_roll)(group, launch, seconds)
    below = roll.hosts[1 : launch.rank]
    return PrefixStore(roll.name, group), socket.gethostname() not in below


@functools.cache  # rank 0 serves it until the process ends, so no rank can join one that closes
def _open(
    dist_url: str, rank: int, world_size: int, seconds: float, master: tuple[str | None, ...]
) -> tuple[Store, Iterator[int]]:
    """Connect to the store of rank 0, and count the groups that use it."""
    parts, limit = urlsplit(dist_url), timedelta(seconds=seconds)
    address = (parts.hostname, parts.port)
    if parts.scheme == "env":
        address = (master[0], int(master[1] or 0))
    if parts.scheme in ("env", "tcp"):
        if rank and address[0] and address[1]:
            _wait_for_server((address[0], address[1]), seconds)
        world_size = 1  # do not wait for the others here: only the roll call knows who is missing
    store, _, _ = next(rendezvous(dist_url, rank, world_size, timeout=limit))
    store.set_timeout(limit)
    return store, itertools.count()


def _wait_for_server(address: tuple[str, int], seconds: float) -> None:
    """Wait until a server listens, without the warnings of PyTorch's attempts.

    Raises: OSError: of the last attempt.
    """
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection(address, timeout=max(min(left, 10.0), 0.1)).close()
            return
        except OSError as error:
            if left < POLL_SECONDS:
                reason = error.strerror or error
                raise OSError(f"no answer for {seconds:g} s: {reason}") from error
        time.sleep(POLL_SECONDS)


def _answer(store: Store, launch: Launch, seconds: float) -> _Roll:
    """Tell rank 0 that this rank is there; wait until it says that all are."""
    own = uuid.uuid4().hex
    here = json.dumps((own, launch.world_size, socket.gethostname()))
    end = time.monotonic() + seconds
    store.set(f"here{launch.rank}", here)
    while not _has(store, f"call{own}", POLL_SECONDS):
        if time.monotonic() > end:
            raise ConfigError(
                f"rank 0 did not answer rank {launch.rank} of {launch.world_size} within "
                f"--dist_timeout_minutes {seconds / 60:g}: {_SAME}"
            )
        store.set(f"here{launch.rank}", here)  # again: another process may have the same rank
    name = store.get(f"call{own}").decode()
    store.add(f"{name}/came{launch.rank}", 1)
    if not _has(store, f"{name}/end", seconds + LAST_SECONDS):
        raise ConfigError(f"rank 0 no longer answers rank {launch.rank} of {launch.world_size}")
    roll = _Roll(*json.loads(store.get(f"{name}/end")))
    if roll.problem:
        error = ConfigError(roll.problem)
        error.reported = True
        raise error
    return roll


def _call_the_roll(store: Store, launch: Launch, seconds: float) -> _Roll:
    """Wait on rank 0 until every rank is there, and compare what they were started with."""
    name, others = uuid.uuid4().hex, range(1, launch.world_size)
    here: dict[int, tuple[str, int, str]] = {}  # id, world size and host
    problem, end = "", time.monotonic() + seconds
    while True:
        for rank in others:
            if store.check([f"here{rank}"]):
                known, here[rank] = here.get(rank), json.loads(store.get(f"here{rank}"))
                if here[rank] != known:  # the first one may be of a process that has ended
                    store.set(f"call{here[rank][0]}", name)
        came = {rank: store.add(f"{name}/came{rank}", 0) for rank in others}
        problem = _contradiction(launch, came, here)
        missing = [rank for rank, number in came.items() if not number]
        if problem or not missing:
            break
        if time.monotonic() > end:
            problem = (
                f"{listed(missing)} of {launch.world_size} did not come within "
                f"--dist_timeout_minutes {seconds / 60:g}: {_SAME}"
            )
            break
        time.sleep(POLL_SECONDS)
    hosts = [socket.gethostname(), *(here[rank][2] for rank in others if rank in here)]
    roll = _Roll(name, hosts, problem)
    store.set(f"{name}/end", json.dumps(roll))
    if problem:
        time.sleep(LAST_SECONDS)
        raise ConfigError(problem)
    return roll


def _contradiction(
    launch: Launch, came: dict[int, int], here: dict[int, tuple[str, int, str]]
) -> str:
    """Return what the ranks that came contradict each other in, or ""."""
    for rank, number in came.items():
        if number > 1:
            return f"two processes are rank {rank} of {launch.world_size}: start one of each"
        if number and here[rank][1] != launch.world_size:
            _, size, host = here[rank]
            return (
                f"rank {rank} on {host} was started with WORLD_SIZE {size}, and rank 0 with "
                f"{launch.world_size}: start all ranks with the same"
            )
    return ""


def _has(store: Store, key: str, seconds: float) -> bool:
    """Wait for a key; return False if it is not there in time."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:  # or the store is gone, which the next call reports
        return False
    return True

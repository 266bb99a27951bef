"""The store of a run of several ranks: connect to it, and meet the other ranks there."""

from __future__ import annotations

import functools
import itertools
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastdino.errors import ConfigError
from fastdino.launch import Launch
from fastdino.liveness import listed

POLL_SECONDS = 0.5
# Rank 0 serves the store for the others until they have read why they cannot start.
LAST_SECONDS = 1.0


def meet(dist_url: str, launch: Launch, seconds: float) -> tuple[Store, bool]:
    """Return a store that all ranks have joined, and True on one rank per host.

    It has no keys of earlier process groups, with which the ranks would try to connect to the
    sockets of the earlier group and hang.

    Raises:
        ConfigError: ranks that are missing after `seconds`, or that contradict each other.
        OSError, RuntimeError, ValueError: the store cannot be reached, or a wrong URL.
    """
    master = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))  # of env://
    store, numbers = _open(dist_url, launch.rank, launch.world_size, seconds, master)
    group = PrefixStore(f"group{next(numbers)}", store)
    try:
        return group, _call_the_roll(group, launch, seconds)
    except ConfigError:
        time.sleep(LAST_SECONDS)
        raise


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


def _call_the_roll(store: Store, launch: Launch, seconds: float) -> bool:
    """Wait until every rank is there, and compare what the ranks were started with.

    Returns: True if no lower rank but rank 0 is on this host.
    Raises: ConfigError: see `meet`. One of the ranks that find a problem prints it.
    """
    host, ranks = socket.gethostname(), range(launch.world_size)
    if store.add(f"number{launch.rank}", 1) > 1:
        raise ConfigError(
            f"two processes have rank {launch.rank} of {launch.world_size}, one of them on {host}: "
            "expected one process per RANK; with a file:// URL, delete the file of an earlier run"
        )
    store.set(f"rank{launch.rank}", f"{launch.world_size} {host}")
    end = time.monotonic() + seconds
    while not _all_there(store, launch):
        missing = [rank for rank in ranks if not store.check([f"rank{rank}"])]
        if missing and time.monotonic() > end:
            raise _once(
                store,
                f"{listed(missing)} of {launch.world_size} did not come within "
                f"--dist_timeout_minutes {seconds / 60:g}: start every rank, with the same "
                "MASTER_ADDR and MASTER_PORT or --dist_url",
            )
        _compare(store, launch, [rank for rank in ranks if rank not in missing])
    hosts = _compare(store, launch, [*ranks])
    return not any(hosts[rank] == host for rank in range(1, launch.rank))


def _all_there(store: Store, launch: Launch) -> bool:
    try:
        names = [f"rank{rank}" for rank in range(launch.world_size)]
        store.wait(names, timedelta(seconds=POLL_SECONDS))
    except RuntimeError:  # not in this time; or the store is gone, which the next call reports
        return False
    return True


def _compare(store: Store, launch: Launch, ranks: list[int]) -> list[str]:
    """Return the hosts of ranks; raise ConfigError if a rank contradicts this one."""
    hosts = []
    values = store.multi_get([f"rank{rank}" for rank in ranks])
    for rank, started in zip(ranks, values, strict=True):
        size, _, host = started.decode().partition(" ")
        hosts.append(host)
        if int(size) != launch.world_size:
            raise _once(
                store,
                f"rank {launch.rank} was started with {launch.world_size} processes in total, and "
                f"rank {rank} on {host} with {size}: start all with the same WORLD_SIZE",
            )
    return hosts


def _once(store: Store, text: str) -> ConfigError:
    """Return the error with the text; only the first rank with one prints it."""
    error = ConfigError(text)
    error.reported = store.add("printed", 1) > 1
    return error

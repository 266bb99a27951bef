"""Ranks that meet: a missing or contradicting one is named, and a wrong address is reported."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from benchmarks.local_ranks import HOST, free_port
from fastdino import rendezvous
from fastdino.errors import ConfigError
from fastdino.launch import Launch
from fastdino.rendezvous import meet


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rendezvous, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "LAST_SECONDS", 0.3)
    rendezvous._open.cache_clear()


@pytest.fixture
def url() -> str:
    return f"tcp://{HOST}:{free_port()}"


def join(url: str, *launches: Launch, seconds: float = 30.0) -> list[tuple[str, bool] | None]:
    """Join with several ranks at once; return the error of each, and whether it is reported."""
    errors: dict[int, tuple[str, bool]] = {}

    def run(number: int) -> None:
        try:
            meet(url, launches[number], seconds)
        except ConfigError as error:
            errors[number] = (str(error), error.reported)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(launches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [errors.get(i) for i in range(len(launches))]


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_ranks_meet_and_one_per_host_prints(url, tmp_path, kind):
    url = url if kind == "tcp" else f"file://{tmp_path}/store"
    prints = {}

    def run(rank: int) -> None:
        store, prints[rank] = meet(url, Launch(rank, 3), 30.0)
        assert store.add("n", 1) in (1, 2, 3)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prints == {0: True, 1: True, 2: False}  # rank 0 is the one that may be lost


def test_missing_ranks_are_named_once(url):
    first, second = join(url, Launch(0, 4), Launch(2, 4), seconds=0.6)
    text = (
        "ranks 1, 3 of 4 did not come within --dist_timeout_minutes 0.01: start every rank, with "
        "the same MASTER_ADDR and MASTER_PORT or --dist_url"
    )
    assert (first, second) == ((text, False), (text, True))


def test_contradicting_world_sizes_are_reported_at_once(url):
    first, second = join(url, Launch(0, 2), Launch(1, 3))
    text = (
        f"rank 1 on {socket.gethostname()} was started with WORLD_SIZE 3, and rank 0 with 2: start "
        "all ranks with the same"
    )
    assert (first, second) == ((text, False), (text, True))


def test_two_processes_of_one_rank_are_an_error(url, monkeypatch):
    # The cache could give both threads one connection, which processes never share.
    monkeypatch.setattr(rendezvous, "_open", rendezvous._open.__wrapped__)
    first, *others = join(url, Launch(0, 3), Launch(1, 3), Launch(1, 3))
    text = "two processes are rank 1 of 3: start one of each"
    assert (first, *others) == ((text, False), (text, True), (text, True))


def test_rank_0_that_does_not_answer_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^rank 0 did not answer rank 1 of 2 within .* 0.005: "):
        meet(f"file://{tmp_path}/store", Launch(1, 2), 0.3)


def test_keys_of_processes_that_have_ended_do_not_matter(tmp_path: Path):
    """As under torchrun, whose store outlives the processes that it starts again."""
    url = f"file://{tmp_path}/store"
    for size in (3, 4):
        rendezvous._open.cache_clear()
        launches = [Launch(rank, size) for rank in range(size)]
        with pytest.raises(ConfigError, match=f"ranks 1, .* of {size} did not come"):
            meet(url, launches[0], 0.2)
        rendezvous._open.cache_clear()
        assert join(url, *launches) == [None] * size


def test_a_wrong_address_is_an_error_after_the_timeout(url):
    with pytest.raises(OSError, match=r"no answer for 0.3 s: Connection refused"):
        meet(url, Launch(1, 2), 0.3)
    with pytest.raises(OSError, match=r"no answer for 0.3 s: .*(known|resolution)"):
        meet("tcp://no.host.invalid:1", Launch(1, 2), 0.3)

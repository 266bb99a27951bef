"""Signs of life: lost ranks are found and named, working ones are waited for."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastdino import distributed, liveness
from fastdino.errors import RankLostError, UserError
from fastdino.liveness import Liveness, listed
from fastdino.signals import StopSignals
from tests.processes import end_ranks, run_two, start_ranks

CPU = torch.device("cpu")
CLOSED = RuntimeError(
    "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [1.2.3.4]:5\nmore"
)


@pytest.fixture
def make_ranks(tmp_path, monkeypatch) -> Iterator[Callable[..., list[Liveness]]]:
    """A function that returns the observers of some ranks; those of `silent` have no thread."""
    monkeypatch.setattr(liveness, "ROUND_SECONDS", 0.2)
    made: list[Liveness] = []

    def make(number: int, silent: tuple[int, ...] = (), limit: float = 60.0) -> list[Liveness]:
        store = dist.FileStore(str(tmp_path / f"store{len(made)}"), number)
        ranks = [Liveness(store, i, number, limit, prints=i == 1) for i in range(number)]
        made.extend(ranks)
        for i, rank in enumerate(ranks):
            if i not in silent:
                rank.start()
        return ranks

    yield make
    for rank in made:
        rank._ended.set()


def never() -> Callable[[float], bool]:
    """Return an event that does not come; waiting for it much longer than a fault takes fails."""
    end = time.monotonic() + 15

    def is_done(seconds: float) -> bool:
        time.sleep(seconds)
        assert time.monotonic() < end, "no fault was found"
        return False

    return is_done


def test_a_silent_rank_ends_the_waits_of_the_others_and_one_of_them_prints_it(make_ranks):
    ranks = make_ranks(4, silent=(2,), limit=1.2)
    errors = []
    for rank in (0, 1, 3):
        with pytest.raises(RankLostError, match="^rank 2 gave no sign of life for 1 s: ") as error:
            ranks[rank].wait(never())
        errors.append(error.value)
    assert [error.reported for error in errors] == [True, False, True]  # rank 1 observes rank 2
    assert {error.exit_status for error in errors} == {75}


def test_a_rank_that_gives_signs_of_life_is_waited_for(make_ranks):
    ranks = make_ranks(2, limit=1.2)
    end = time.monotonic() + 2.5
    ranks[0].wait(lambda seconds: time.sleep(seconds) or time.monotonic() > end)
    assert ranks[0].fault is None


def test_a_failed_collective_is_explained_by_the_silent_ranks(make_ranks):
    ranks = make_ranks(4, silent=(1, 3))
    assert ranks[0].explain(KeyError("x")).args == ("x",)
    ranks = make_ranks(4, silent=(1, 3))
    error = ranks[0].explain(CLOSED)
    assert isinstance(error, RankLostError)
    assert str(error).startswith("ranks 1, 3 gave no sign of life for 1.2 s after a collective")
    assert not error.reported
    other = ranks[2].explain(CLOSED)
    assert str(other) == str(error)
    assert other.reported


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (
            "gloo: Timed out waiting 60000ms for recv operation to complete",
            "rank 1 did not come to a collective within --dist_timeout_minutes 1, in spite of",
        ),
        (
            str(CLOSED),
            "a collective failed on rank 0, but not on rank 1, which gives signs of life "
            "([gloo/transport/tcp/pair.cc:534] Connection closed by peer [1.2.3.4]:5): check the",
        ),
    ],
)
def test_a_late_rank_is_named_and_a_closed_connection_is_no_timeout(make_ranks, reason, text):
    assert str(make_ranks(2)[0].explain(RuntimeError(reason))).startswith(text)


def test_a_failure_of_nobody_has_its_reason(make_ranks):
    ranks = make_ranks(2)
    errors: list[str] = []
    threads = [
        threading.Thread(target=lambda r=rank: errors.append(str(r.explain(CLOSED))))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors[0] == errors[1]
    assert "all ranks give signs of life ([gloo/transport/tcp/pair.cc:534] Connection" in errors[0]


@pytest.mark.parametrize(
    ("error", "line", "posted"),
    [
        (UserError("no memory"), "rank 1: no memory", "rank 1: no memory"),
        (OSError(errno.ENOSPC, "full", "/x"), "rank 1: /x: full", "rank 1: /x: full"),
        (KeyError("x"), "'x'", "'x'"),
    ],
)
def test_an_error_of_a_rank_names_it_and_ends_the_others_silently(make_ranks, error, line, posted):
    ranks = make_ranks(3)
    assert str(ranks[1].explain(error)) == line
    for rank in (0, 2):
        with pytest.raises(UserError) as raised:
            ranks[rank].wait(never())
        assert str(raised.value) == posted
        assert raised.value.reported
        assert raised.value.exit_status == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError(errno.EPIPE, "pipe")])
def test_a_rank_that_ends_without_a_line_is_named_by_one_of_the_others(make_ranks, error):
    ranks = make_ranks(3)
    assert ranks[1].explain(error) is error
    errors = []
    for rank in (0, 2):
        with pytest.raises(RankLostError, match="^rank 1 was ended by [KB]") as raised:
            ranks[rank].wait(never())
        errors.append(raised.value)
    assert [error.reported for error in errors] == [False, True]


def test_an_error_that_all_ranks_raise_is_unchanged(make_ranks):
    ranks = make_ranks(2)
    error = UserError("no data")
    error.agreed = True
    assert ranks[0].explain(error) is error
    assert str(error) == "no data"


def test_a_store_that_cannot_be_reached_is_not_asked_again(make_ranks, monkeypatch):
    rank, _ = make_ranks(2, silent=(0, 1))
    monkeypatch.setattr(rank, "_store", None)
    rank._take(rank._unreachable())
    assert rank.fault == rank._unreachable()


def test_ranks_are_listed_with_a_limit():
    assert listed([3]) == "rank 3"
    assert listed([*range(8)]) == "ranks 0, 1, 2, 3, 4, 5, 6, 7"
    assert listed([*range(11)]) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def in_ranks(folder: Path, minutes: float, seconds: float, faults: dict[int, str]) -> None:
    """Reduce tensors until a fault; write the error, and exit with its status."""
    rank = int(os.environ["RANK"])
    liveness.ROUND_SECONDS, liveness.GRACE_SECONDS = seconds, 1.0
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    try:
        with distributed.process_group(CPU, "env://", minutes), StopSignals():
            assert distributed.gather(rank) == [0, 1, 2]
            (folder / f"{rank}.pid").write_text(str(os.getpid()))
            fault = faults.get(rank, "")
            if fault == "blocked":  # as in a kernel of nccl
                time.sleep(600)
            if fault == "own":
                raise UserError("out of memory")
            if fault:
                os.kill(os.getpid(), getattr(signal, fault))
            dist.all_reduce(torch.zeros(2))
            distributed.gather(None)
    except UserError as error:
        (folder / f"{rank}.json").write_text(json.dumps([str(error), error.reported]))
        os._exit(error.exit_status)


def errors_of(folder: Path) -> dict[int, tuple[str, bool]]:
    paths = sorted(folder.glob("*.json"))
    return {int(path.stem): tuple(json.loads(path.read_text())) for path in paths}


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_named_once_under_a_launcher_that_ends_the_others(tmp_path, victim):
    processes = start_ranks(3, in_ranks, tmp_path, 10.0, 0.4, {victim: "SIGKILL"})
    processes[victim].join(60)
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
    statuses = end_ranks(processes, 60)
    assert statuses.pop(victim) == -signal.SIGKILL
    assert statuses == [75, 75]
    errors = errors_of(tmp_path)
    expected = "rank 0, or its launcher, cannot" if victim == 0 else "rank 1 gave no sign of life"
    assert all(text.startswith(expected) for text, _ in errors.values()), errors
    assert sorted(reported for _, reported in errors.values()) == [False, True]


def test_a_stopped_rank_ends_the_others_after_the_timeout(tmp_path):
    processes = start_ranks(3, in_ranks, tmp_path, 0.05, 1.0, {2: "SIGSTOP"})
    try:
        statuses = end_ranks(processes[:2], 60)
        os.kill(int((tmp_path / "2.pid").read_text()), 0)  # it is still there
    finally:
        with suppress(ProcessLookupError):
            os.kill(processes[2].pid, signal.SIGKILL)
    assert statuses == [75, 75]
    errors = errors_of(tmp_path)
    assert all(text.startswith("rank 2 gave no sign of life") for text, _ in errors.values())
    assert sorted(reported for _, reported in errors.values()) == [False, True]


def test_an_error_of_one_rank_ends_one_that_does_not_return_from_a_collective(tmp_path):
    processes = start_ranks(3, in_ranks, tmp_path, 10.0, 0.4, {2: "own", 0: "blocked"})
    assert end_ranks(processes, 30) == [2, 2, 2]
    assert errors_of(tmp_path) == {
        1: ("rank 2: out of memory", True),
        2: ("rank 2: out of memory", False),
    }
    assert (tmp_path / "0.err").read_text() == ""


@pytest.mark.parametrize("last", [0, 1])
def test_a_rank_may_work_longer_than_the_timeout(tmp_path, last):
    """Also at the end: rank 0, whose process serves the store, does not leave before the others."""
    run_two(work_long, tmp_path, last)
    assert (tmp_path / "1").read_text() == "5"


def work_long(folder: Path, last: int) -> None:
    def work() -> int:
        time.sleep(2.5 if last == 0 else 0)
        return 5

    with distributed.process_group(CPU, "env://", 0.03):
        result = distributed.from_main(work)
        if distributed.rank() == last:
            time.sleep(3)
    (folder / os.environ["RANK"]).write_text(str(result))

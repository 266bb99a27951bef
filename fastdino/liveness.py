"""Signs of life between ranks, and the reason for which a run of several ranks ends.

A thread of every rank counts up in the store, observes the count of the next rank, and looks for a
fault that another rank has posted. Every observer counts its own rounds: clocks are not compared,
and after a suspension of its machine it does not take the other ranks for dead.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from fastdino.errors import RankLostError, UserError
from fastdino.terminal import finish_output, print_err
from fastdino.waiting import DaemonExecutor, run_within

T = TypeVar("T")
ROUND_SECONDS = 1.0
# After a failed collective, a rank that gives no sign of life in this number of rounds is lost.
SILENT_ROUNDS = 6
# A rank in a collective that does not return ends this long after a fault of another rank.
GRACE_SECONDS = 15.0
AGAIN = "run the same command again"


class Fault(NamedTuple):
    """Why the run ends.

    Attributes:
        text: a line for the user.
        by: the rank that found it, which prints it; -1: each rank on its own, without the store.
        lost: number of lost ranks; 0: the fault is an error of rank `by`.
    """

    text: str
    by: int
    lost: int = 0


class Liveness:
    """Signs of life of this rank and the others.

    Args:
        store: of the process group.
        limit: seconds without a sign of life after which a rank is lost.
        prints: this rank prints a line if the store cannot be reached.

    Attributes: fault: why the run ends, as soon as it is known here.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, limit: float, *, prints: bool
    ) -> None:
        self.fault: Fault | None = None
        self._rank, self._world_size, self._limit = rank, world_size, limit
        self._prints = prints
        self._store = store.clone()  # a connection that no other call blocks
        self._period = min(ROUND_SECONDS, limit / SILENT_ROUNDS)
        self._rounds = 0
        self._blocks = 0  # depth of `without_collectives`
        self._leaving, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._helper = DaemonExecutor(1)  # started now: out of memory, no thread starts any more
        self._sign()

    def start(self) -> None:
        """Start to observe the other ranks, which all have given a first sign."""
        self._thread.start()

    @contextmanager
    def without_collectives(self) -> Iterator[None]:
        """Mark a block without collectives: it is finished in spite of another rank's fault."""
        self._blocks += 1
        try:
            yield
        finally:
            self._blocks -= 1

    def wait(self, is_done: Callable[[float], bool]) -> None:
        """Wait for other ranks, for as long as they give signs of life.

        Args: is_done: called with the seconds for which it may block.

        Raises: UserError: the fault of another rank.
        """
        rounds = polls = 0
        while not is_done(self._period):
            rounds, polls = self._rounds, polls + 1 if rounds == self._rounds else 0
            if polls * self._period > self._limit:  # the store does not answer
                self._take(self._unreachable())
            if self.fault:
                raise self._error(self.fault)

    def explain(self, error: BaseException) -> BaseException:
        """Return the error that this rank raises instead of `error`; post it for the others.

        The error of a failed collective is replaced by one that names the lost rank.
        """
        if self._leaving.is_set():  # it has been explained
            return error
        self._leaving.set()
        if isinstance(error, RankLostError) or getattr(error, "reported", False):
            return error
        if is_failed_collective(error):
            reason = str(error).partition("\n")[0]
            self._take(self._in_time(lambda: self._search(reason), self._unreachable()))
            assert self.fault is not None
            return self._error(self.fault)
        if isinstance(error, BrokenPipeError) or not isinstance(error, Exception):
            own = self._interrupted(error)
        else:
            error = self._named(error)
            own = Fault(str(error) or repr(error), self._rank)
        self._take(self._in_time(lambda: self._post(own), own))
        return error

    def leave(self) -> None:
        """Stop; after a fault, rank 0 serves the store until the others know the fault."""
        if self.fault and self._rank == 0:
            self._in_time(self._wait_until_known, None)
        self._ended.set()
        if not self.fault:
            self._thread.join(self._limit)
            self._helper.shutdown(wait=False)

    def _watch(self) -> None:
        other, silent, last = (self._rank + 1) % self._world_size, 0, -1
        try:
            while self.fault is None and not self._ended.wait(self._period):
                self._sign()
                self._take(self._posted())
                count = self._store.add(f"signs{other}", 0)
                silent, last = silent + 1 if count == last else 0, count
                self._rounds += 1
                if silent * self._period > self._limit and (lost := self._silent()):
                    self._take(self._post(self._lost(lost, f"for {round(self._limit)} s")))
        except RuntimeError:  # from the store
            self._end_after(self._limit, sign=False)
        else:
            self._end_after(GRACE_SECONDS, sign=True)

    def _end_after(self, seconds: float, *, sign: bool) -> None:
        """End the process if it does not leave by itself; the main thread may be in a collective.

        Args: sign: keep giving signs of life.
        """
        left = seconds
        while not self._ended.wait(self._period):
            with suppress(RuntimeError):
                if sign:
                    self._sign()
            left = seconds if self._blocks or self._leaving.is_set() else left - self._period
            if left < 0:
                self._end_process(self.fault or self._unreachable())

    def _end_process(self, fault: Fault) -> None:
        error = self._error(fault)
        if not error.reported:
            print_err(f"fastdino: error: {error}")
        finish_output()
        os._exit(error.exit_status)

    def _search(self, reason: str) -> Fault:
        """Find out why a collective failed, and post it; return what was posted first."""
        self._store.set(f"failed{self._rank}", "")
        silent = self._silent()
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        late = [rank for rank in others if not self._store.check([f"failed{rank}"])]
        if silent:
            seconds = SILENT_ROUNDS * self._period
            return self._post(self._lost(silent, f"for {seconds:g} s after a collective failed"))
        if late and "timed out" in reason.lower():
            text = (
                f"{listed(late)} did not come to a collective within --dist_timeout_minutes "
                f"{self._limit / 60:g}, in spite of signs of life ({reason}): a file system or a "
                f"data loader may not answer there; {AGAIN}"
            )
        elif late:
            text = (
                f"a collective failed on rank {self._rank}, but not on {listed(late)}, which "
                f"give{'s' * (len(late) == 1)} signs of life ({reason}): check the network between "
                f"them; {AGAIN}"
            )
        else:
            text = f"a collective failed, but all ranks give signs of life ({reason}); {AGAIN}"
        return self._post(Fault(text, self._rank, lost=len(late) or 1))

    def _silent(self) -> list[int]:
        """Observe all ranks for some rounds; return those without a sign of life.

        It returns early, without any, if a fault has been posted.
        """
        names = [f"signs{rank}" for rank in range(self._world_size)]
        first = self._store.multi_get(names)
        for _ in range(SILENT_ROUNDS):
            if self._posted():
                return []
            self._sign()
            time.sleep(self._period)
        counts = self._store.multi_get(names)
        return [rank for rank, count in enumerate(counts) if count == first[rank]]

    def _sign(self) -> None:
        self._store.add(f"signs{self._rank}", 1)

    def _lost(self, ranks: list[int], how_long: str) -> Fault:
        text = (
            f"{listed(ranks)} gave no sign of life {how_long}: killed or stopped, or the machine "
            f"or the network is gone; {AGAIN}"
        )
        return Fault(text, self._rank, len(ranks))

    def _interrupted(self, error: BaseException) -> Fault:
        """Return the fault of an error that ends this rank without a line, such as Ctrl-C."""
        text = f"rank {self._rank} was ended by {type(error).__name__}; {AGAIN}"
        return Fault(text, (self._rank - 1) % self._world_size, 1)

    def _unreachable(self) -> Fault:
        text = (
            "rank 0, or its launcher, cannot be reached: killed or stopped, or the machine or the "
            f"network is gone; {AGAIN}"
        )
        return Fault(text, -1, 1)

    def _named(self, error: BaseException) -> BaseException:
        """Return an error of this rank with the number of the rank in its line."""
        if isinstance(error, OSError) and error.errno is not None:
            where = f"{error.filename}: " if error.filename else ""
            error = UserError(f"{where}{error.strerror}").with_traceback(error.__traceback__)
        if isinstance(error, UserError) and not error.agreed:
            error.args = (f"rank {self._rank}: {error}",)
        return error

    def _error(self, fault: Fault) -> UserError:
        """Return the error that this rank raises for a fault."""
        error = RankLostError(fault.text) if fault.lost else UserError(fault.text)
        error.reported = fault.by != self._rank if fault.by >= 0 else not self._prints
        return error

    def _post(self, fault: Fault) -> Fault:
        """Post a fault, unless one is posted; return the posted one."""
        return Fault(*json.loads(self._store.compare_set("fault", "", json.dumps(fault))))

    def _posted(self) -> Fault | None:
        if not self._store.check(["fault"]):
            return None
        return Fault(*json.loads(self._store.get("fault")))

    def _take(self, fault: Fault | None) -> None:
        """Keep the first fault, and let rank 0 know that it is known here."""
        if fault is not None and self.fault is None:
            self.fault = fault
            if fault.by >= 0:  # else the store does not answer
                self._in_time(lambda: self._store.add("known", 1), 0)

    def _wait_until_known(self) -> None:
        assert self.fault is not None
        remaining = self._world_size - self.fault.lost
        for _ in range(SILENT_ROUNDS):
            if self._store.add("known", 0) >= remaining:
                return
            time.sleep(self._period)

    def _in_time(self, function: Callable[[], T], default: T) -> T:
        """Call a function of the store; return the default if the store is gone or is silent."""
        try:
            return run_within(2 * SILENT_ROUNDS * self._period, self._helper, function)
        except (RuntimeError, TimeoutError):
            return default


def is_failed_collective(error: BaseException) -> bool:
    """Return True for an error of gloo, nccl or a store."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def listed(ranks: list[int], shown: int = 8) -> str:
    """Return "rank 1", "ranks 1, 3", or "ranks 1, 3, ... and 5 more"."""
    names = ", ".join(map(str, ranks[:shown]))
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"

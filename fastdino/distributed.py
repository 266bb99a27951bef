"""Process group and collectives.

In a run with one process no process group exists, and every function here is a no-op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdino.errors import ConfigError, UserError
from fastdino.launch import Launch, read_launch
from fastdino.liveness import Liveness, is_failed_collective
from fastdino.rendezvous import meet
from fastdino.waiting import DaemonExecutor, abandon_threads, killable

T = TypeVar("T")
TIMEOUT_MINUTES = 10.0
# For waits that end with a sign of life instead of a time: rank 0 reads a large dataset, say.
UNLIMITED = timedelta(days=30)
SLICE_ELEMENTS = 1 << 26  # elements that `total` copies to the GPU at a time


class _Exchange(NamedTuple):
    """How the ranks exchange objects: a group of gloo, a thread for its calls, signs of life."""

    group: Any
    thread: DaemonExecutor
    liveness: Liveness


_exchange: _Exchange | None = None  # of the present process group


@contextmanager
def process_group(
    device: torch.device, dist_url: str, timeout_minutes: float = TIMEOUT_MINUTES
) -> Iterator[None]:
    """Join the process group of torchrun or srun and leave it at the end.

    It uses nccl on GPUs and gloo on CPUs. A run of one process has none. A process may join several
    groups one after the other; all ranks must join each of them.

    Args: timeout_minutes: limit of the rendezvous, of each collective on tensors, and of the time
        without a sign of life after which a rank is lost. Exchanges of objects have no other limit.

    Raises:
        ConfigError: variables of a launcher that contradict each other, or no connection.
        RankLostError: another rank was killed or stopped, or cannot be reached.
        UserError: an error of another rank, which prints it.
    """
    global _exchange
    seconds = 60 * timeout_minutes
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"--dist_timeout_minutes must be a finite number above 0, got {timeout_minutes:g}"
        )
    launch = read_launch()
    if dist.is_initialized() or launch.world_size == 1:
        yield
        return
    _exchange = _join(device, dist_url, launch, min(seconds, UNLIMITED.total_seconds()))
    liveness = _exchange.liveness
    try:
        yield
        gather(None)  # leave together: rank 0 serves the store
    except BaseException as error:
        abandon_threads()  # they may be in calls of gloo or of the store
        explained = liveness.explain(error)
        if explained is error:
            raise
        raise explained from error
    finally:
        liveness.leave()
        _exchange.thread.shutdown(wait=False)
        _exchange = None
    # Not after an error: leaving the group would wait for ranks that may be in a collective. The
    # other ranks learn of the error from the closed connections.
    dist.destroy_process_group()


def name_lost_rank(error: BaseException | None) -> None:
    """Raise an error that names the lost rank if `error` is that of a failed collective.

    To be called where a launcher's SIGTERM is caught, as it takes some seconds.
    """
    if _exchange is not None and error is not None and is_failed_collective(error):
        raise _exchange.liveness.explain(error) from error


def _join(device: torch.device, dist_url: str, launch: Launch, seconds: float) -> _Exchange:
    """Meet the other ranks and create the process group."""
    if launch.master and dist_url == "env://":
        dist_url = "tcp://{}:{}".format(*launch.master)
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=seconds)
    try:
        with killable():  # it waits for the other ranks
            store, prints = meet(dist_url, launch, seconds)
            liveness = Liveness(store, launch.rank, launch.world_size, seconds, prints=prints)
            dist.init_process_group(
                backend,
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                device_id=device if device.type == "cuda" else None,
                timeout=limit,
            )
            group = dist.new_group(backend="gloo", timeout=UNLIMITED)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # includes torch.distributed.DistError
        if dist.is_initialized():  # only the second group failed
            dist.destroy_process_group()
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} cannot join the others by {backend} at "
            f"{dist_url} ({reason}): check --dist_url, or MASTER_ADDR and MASTER_PORT"
        ) from error
    liveness.start()
    return _Exchange(group, DaemonExecutor(1), liveness)


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
    _wait_for_others(lambda group: dist.all_gather_object(values, value, group=group))
    return values


def _wait_for_others(collective: Callable[[Any], object]) -> None:
    """Run a collective on objects; wait for the other ranks as long as they give signs of life."""
    with killable(always=False):
        if _exchange is None:  # the process group is not from `process_group`
            collective(None)
            return
        future = _exchange.thread.submit(collective, _exchange.group)
        _exchange.liveness.wait(lambda seconds: bool(wait([future], seconds).done))
        future.result()


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
        with without_collectives():
            yield
    except Exception as raised:
        own = raised
    portable = own if own is None or isinstance(own, UserError) else UserError(repr(own))
    first = next(((i, error) for i, error in enumerate(gather(portable)) if error), None)
    if first is None:
        return
    failed_rank, error = first
    if failed_rank == rank() and own is not None:
        if isinstance(own, UserError):
            own.agreed = True
        raise own
    error.reported = error.agreed = True
    raise error


def without_collectives() -> AbstractContextManager[None]:
    """Mark a block without collectives: a fault of another rank does not end this one in it."""
    return _exchange.liveness.without_collectives() if _exchange else nullcontext()


def from_main(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every rank; its error is raised on all."""
    result: list[Any] = [None]
    with fail_together():
        if rank() == 0:
            result = [make()]
    if world_size() > 1:
        _wait_for_others(lambda group: dist.broadcast_object_list(result, src=0, group=group))
    return result[0]

"""One process or many: who this process is, and the few collectives a run needs.

Every function here is a no-op in a run of one process, which makes no process group at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdino.errors import ConfigError, UserError

T = TypeVar("T")
SLICE_ELEMENTS = 1 << 26  # that go over a GPU at once


@contextmanager
def process_group(device: torch.device, dist_url: str) -> Iterator[None]:
    """Joins the processes that torchrun started (nccl on GPUs, gloo on CPUs), and leaves them."""
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise ConfigError(
                "srun started several processes that do not know of each other: start one a "
                "machine, `srun --ntasks-per-node=1 torchrun --nproc_per_node=GPUS ...`"
            )
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=dist_url,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        device_id=device if device.type == "cuda" else None,
        # Process 0 alone reads a large folder's headers while the others wait.
        timeout=timedelta(hours=2),
    )
    yield
    # Not where an error ends the block: others may be waiting in a collective, and leaving the
    # group would wait for them. The launcher ends them when this process exits.
    dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(values: Tensor) -> Tensor:
    """The mean of `values` over the processes, the same bits on each; NaN if any is NaN."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def total(values: Tensor) -> Tensor:
    """Sums a contiguous CPU tensor over the processes, in place, and returns it.

    A GPU holds a slice of it at a time: features of all images may be more than it has room for.
    """
    if world_size() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else "cpu"
    for part in values.view(-1).split(SLICE_ELEMENTS):
        summed = part.to(device)
        dist.all_reduce(summed)
        part.copy_(summed)
    return values


def _on_gpu() -> bool:
    return dist.get_backend() == "nccl"


def gather(value: Any) -> list[Any]:
    """Any picklable value of every process, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Where the block, or a function that this decorates, fails in one process, it ends every one.

    Within it the processes may not wait for each other.

    The first that failed raises its own error, the others what they are to say nothing of: the
    same where it is a UserError, else one that names it.
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
    number, error = first
    if number == rank() and own is not None:
        raise own
    error.told_elsewhere = True
    raise error


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in process 0, in every process; its error ends every one."""
    result: list[Any] = [None]
    with together():
        if rank() == 0:
            result = [make()]
    if world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]

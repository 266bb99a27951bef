"""How this process was started: alone, by torchrun, or as one of the tasks of srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from fastdino.errors import ConfigError

# Ports for the rendezvous of a Slurm step, chosen by the numbers of job and step, so that those of
# one node differ. Linux gives ports from 32768 on to connections of other programs.
_PORTS = range(20000, 32768)
_NEXT_STEP = 7919
_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_HOSTS = rf"(?:[^\[\],\s]|{_RANGES})+"  # of one name: a1, a[01-03], r[1-2]n[01-16]
_NODE_LIST = re.compile(rf"({_HOSTS})(?:,{_HOSTS})*")


class Launch(NamedTuple):
    """The place of this process among those of the run.

    local_rank: its number on its machine, which selects the GPU among those that it sees.
    master: address and port of rank 0, if the launcher states them in another way than torchrun.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master: tuple[str, int] | None = None


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Return how the environment says that this process was started.

    torchrun's variables come first: it can be started by srun itself. Variables of an interactive
    Slurm allocation, or those that an earlier launcher left, start a run of one process.

    Raises: ConfigError: variables that contradict each other, or from which one is missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        _check_tasks(environ)
        return _of_torchrun(environ)
    # Tasks of the current step; SLURM_NTASKS is that of the allocation, in every shell in it.
    if _number(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        return _of_slurm(environ)
    return Launch()


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """Return how often Slurm has requeued the job of this process; 0 outside of a job.

    Raises: ConfigError: SLURM_RESTART_COUNT is not a number.
    """
    return _number(environ, "SLURM_RESTART_COUNT", default=0)


def _of_torchrun(environ: Mapping[str, str]) -> Launch:
    world_size = _number(environ, "WORLD_SIZE", default=1)
    if world_size == 1 and "MASTER_ADDR" not in environ:
        return Launch()
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in environ]:
        given = [f"{name}={environ[name]}" for name in wanted if name in environ]
        raise ConfigError(
            f"the environment has {', '.join(given)} but no {', '.join(missing)}: start the run "
            "with torchrun, or unset these variables for a run of one process"
        )
    rank = _number(environ, "RANK")
    if not rank < world_size:
        raise ConfigError(
            f"RANK must be below WORLD_SIZE, got RANK={rank}, WORLD_SIZE={world_size}"
        )
    _port(environ)  # read by PyTorch
    return Launch(rank, world_size, _number(environ, "LOCAL_RANK", default=0))


def _check_tasks(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if WORLD_SIZE was set by hand to another number than that of the tasks.

    torchrun, of which srun starts one per node, sets TORCHELASTIC_RUN_ID too.
    """
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", default=1)
    world_size = _number(environ, "WORLD_SIZE", default=1)
    if tasks not in (1, world_size) and "TORCHELASTIC_RUN_ID" not in environ:
        raise ConfigError(
            f"WORLD_SIZE={world_size} contradicts the {tasks} tasks of this Slurm step "
            "(SLURM_STEP_NUM_TASKS): unset RANK and WORLD_SIZE, which srun does not need"
        )


def _of_slurm(environ: Mapping[str, str]) -> Launch:
    rank, world_size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    if not rank < world_size:
        raise ConfigError(
            "SLURM_PROCID must be below SLURM_STEP_NUM_TASKS, "
            f"got {rank} and {world_size}: start the run with srun"
        )
    address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
    job = _number(environ, "SLURM_JOB_ID", default=0)
    job += _NEXT_STEP * _number(environ, "SLURM_STEP_ID", default=0)
    port = _port(environ, default=_PORTS[job % len(_PORTS)])
    return Launch(rank, world_size, _local_rank_of_slurm(environ), (address, port))


def _local_rank_of_slurm(environ: Mapping[str, str]) -> int:
    """Return the task's number on its node; 0 if Slurm lets it see only a GPU of its own.

    It does with --gpus-per-task, and with --gpu-bind, such as single:1, where the step has more.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    of_step = _number(environ, "SLURM_GPUS_ON_NODE", default=1)
    if visible and "," not in visible and ("SLURM_GPUS_PER_TASK" in environ or of_step > 1):
        return 0
    return _number(environ, "SLURM_LOCALID", default=0)


def shares_store(environ: Mapping[str, str] = os.environ) -> bool:
    """Return True if torchrun keeps one store for all restarts, where old keys remain."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: a1 of "a1,b2", r1n01 of "r[1-2]n[01-03,07]"."""
    match = _NODE_LIST.fullmatch(nodes)
    if match is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST must be a list of nodes as node[1-4], got {nodes!r}: set "
            "MASTER_ADDR to the host of rank 0"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[1])


def _port(environ: Mapping[str, str], default: int | None = None) -> int:
    port = _number(environ, "MASTER_PORT", default)
    if port > 65535:
        raise ConfigError(f"MASTER_PORT must be at most 65535, got {port}")
    return port


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, default)
    try:
        number = int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        given = "no value" if text is None else repr(text)
        raise ConfigError(f"the environment variable {name} must be a number, got {given}")
    return number

"""fastdino.launch: variables of torchrun and Slurm, and those that launchers leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastdino.errors import ConfigError
from fastdino.launch import Launch, first_host, read_launch

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_NTASKS": "8",
}  # fmt: skip

ON_TWO_NODES = {"SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "none"}
OWN_GPU = {"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}
BOUND = {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(3, 8, 1)),
        (without(TORCHRUN, "LOCAL_RANK"), Launch(3, 8, 0)),
        (SRUN, Launch(5, 8, 1, ("gpu07", 20123))),
        (SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "29500"}, Launch(5, 8, 1, ("b", 29500))),
        (SRUN | {"MASTER_PORT": "65535"}, Launch(5, 8, 1, ("gpu07", 65535))),
        (TORCHRUN | {"RANK": "7", "MASTER_PORT": "65535"}, Launch(7, 8, 1)),
        (SRUN | TORCHRUN, Launch(3, 8, 1)),  # set by hand, as many as tasks
        (SRUN | TORCHRUN | ON_TWO_NODES, Launch(3, 8, 1)),  # srun started torchrun
        (
            SRUN | {"SLURM_STEP_ID": "2"},
            Launch(5, 8, 1, ("gpu07", 20000 + (123 + 2 * 7919) % 12768)),
        ),
        # srun --gpus-per-task=1: the task sees its GPU only, unless --gpu-bind=none.
        (SRUN | OWN_GPU, Launch(5, 8, 0, ("gpu07", 20123))),
        (SRUN | OWN_GPU | {"CUDA_VISIBLE_DEVICES": "0,1"}, Launch(5, 8, 1, ("gpu07", 20123))),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "3"}, Launch(5, 8, 1, ("gpu07", 20123))),
        # --gpu-bind=single:1: it sees one of the step's.
        (SRUN | BOUND, Launch(5, 8, 0, ("gpu07", 20123))),
        (SRUN | BOUND | {"SLURM_GPUS_ON_NODE": "1"}, Launch(5, 8, 1, ("gpu07", 20123))),
        (SRUN | BOUND | {"CUDA_VISIBLE_DEVICES": "0,1"}, Launch(5, 8, 1, ("gpu07", 20123))),
        (SRUN | {"SLURM_GPUS_ON_NODE": "4"}, Launch(5, 8, 1, ("gpu07", 20123))),
        # What is left over starts a run of one process.
        ({"LOCAL_RANK": "3"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, Launch()),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Launch()),  # srun --pty bash
        (without(SRUN, "SLURM_STEP_NUM_TASKS"), Launch()),  # salloc
    ],
)
def test_the_environment_states_the_place_of_this_process(environ, expected):
    assert read_launch(environ) == expected


def test_steps_have_ports_of_their_own_that_no_connection_is_given():
    """Linux gives connections of other programs ports from 32768 on."""
    ports = {
        read_launch(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master[1]
        for job in range(10**6, 10**6 + 3000)
        for step in (0, 2)
    }
    assert min(ports) >= 20000
    assert max(ports) < 32768
    assert len(ports) == 6000


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(TORCHRUN, "MASTER_ADDR"), "but no MASTER_ADDR: start the run with torchrun"),
        (without(TORCHRUN, "MASTER_PORT"), "but no MASTER_PORT"),
        (without(TORCHRUN, "RANK"), "but no RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but no MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "8"}, "RANK must be below WORLD_SIZE"),
        (TORCHRUN | {"RANK": "x"}, "variable RANK must be a number, got 'x'"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "variable WORLD_SIZE must be a number, got ''"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "variable LOCAL_RANK must be a number, got '-1'"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "variable MASTER_PORT must be a number, got 'x'"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT must be at most 65535, got 65536"),
        (SRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT must be at most 65535, got 99999"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID must be below"),
        (without(SRUN, "SLURM_PROCID"), "variable SLURM_PROCID must be a number, got no value"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "must be a list of nodes"),
        *(
            (SRUN | {"SLURM_STEP_NODELIST": nodes}, "must be a list of nodes as node")
            for nodes in ("", "a[1-2", "a1,,b", "a[1-]", "a[x]", "a[]", "a 1", "a1,", "(null)[1")
        ),
        (SRUN | TORCHRUN | {"WORLD_SIZE": "16"}, "WORLD_SIZE=16 contradicts the 8 tasks"),
        (SRUN | TORCHRUN | {"WORLD_SIZE": "1"}, "WORLD_SIZE=1 contradicts the 8 tasks"),
        (SRUN | {"RANK": "5"}, "WORLD_SIZE=1 contradicts the 8 tasks"),
    ],
)
def test_contradictory_variables_are_one_line(environ, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_launch(environ)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("a-b[003-007]", "a-b003"),
        ("a[3,5-7]-ib,b1", "a3-ib"),
        ("rack[2-3]node[01-16,20],b", "rack2node01"),
        ("b,a[1-2]", "b"),
        ("[1-2]", "1"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("node.example.org", "node.example.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


TASK = """
import json, sys, torch
from fastdino import distributed
with distributed.process_group(torch.device("cpu"), "env://"):
    value = torch.tensor([float(distributed.rank())])
    mean = distributed.mean(value).item()
    print(json.dumps([distributed.rank(), distributed.world_size(), mean]))
"""


def test_tasks_of_srun_form_a_process_group(tmp_path):
    job = str(os.getpid())
    tasks = []
    for rank in range(3):
        environ = SRUN | {
            "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": job,
        }  # fmt: skip
        environ = without(os.environ, *TORCHRUN) | environ
        tasks.append(subprocess.Popen([sys.executable, "-c", TASK], env=environ, text=True,
                                      stdout=subprocess.PIPE))  # fmt: skip
    results = [json.loads(task.communicate(timeout=120)[0]) for task in tasks]
    assert results == [[rank, 3, 1.0] for rank in range(3)]

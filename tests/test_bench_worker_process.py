"""fastdino.bench.worker_process: callables in their own processes, and failures of those."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from fastdino.bench.worker_process import WorkerError, WorkerProcess, session_cpu_seconds
from tests.processes import is_running

LIMIT = 60.0


class Worker:
    """Call the functions that it receives."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, function):
        return function()

    def close(self):
        (self.folder / "closed").touch()


def fail():
    raise ValueError("no such crop\nand more")


def lack_lightly():
    raise ModuleNotFoundError("No module named 'lightly.loss'", name="lightly.loss")


def start_a_child():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def cpu_seconds_of_a_child():
    before = session_cpu_seconds()
    code = "import time\nwhile time.process_time() < .5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        return session_cpu_seconds() - before


def fail_to_make():
    raise OSError("no memory")


@pytest.fixture
def worker(tmp_path):
    one = WorkerProcess(partial(Worker, str(tmp_path)), processors=1)
    one.wait_until_ready(LIMIT)
    yield one
    one.close()


def has_ended(*pids):
    for _ in range(600):
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.05)
    return False


def test_one_other_process_answers_all_calls(worker):
    pids = {worker.call(os.getpid, LIMIT) for _ in range(3)}
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_a_process_is_bound_to_its_processors(worker):
    assert len(worker.call(partial(os.sched_getaffinity, 0), LIMIT)) == 1


@pytest.mark.parametrize(
    ("function", "reason", "missing"),
    [
        (fail, "ValueError: no such crop", False),
        (lack_lightly, "lightly is not installed", True),
        (partial(os._exit, 3), "its process died", False),
    ],
)
def test_a_failure_is_reported_and_ends_the_process(worker, function, reason, missing):
    pid = worker.call(os.getpid, LIMIT)
    with pytest.raises(WorkerError) as error:
        worker.call(function, LIMIT)
    assert (str(error.value), error.value.missing) == (reason, missing)
    assert has_ended(pid)


def test_a_failing_constructor_is_reported():
    with pytest.raises(WorkerError, match="^OSError: no memory$"):
        WorkerProcess(fail_to_make, processors=1).wait_until_ready(LIMIT)


def test_a_hanging_process_is_killed_with_its_children(worker, tmp_path):
    pid, child = worker.call(os.getpid, LIMIT), worker.call(start_a_child, LIMIT)
    assert is_running(pid)
    assert is_running(child)
    with pytest.raises(WorkerError, match="^no answer within 1 s$"):
        worker.call(partial(time.sleep, 600), 1.0)
    assert has_ended(pid, child)
    assert not (tmp_path / "closed").exists()
    with pytest.raises(WorkerError, match="its process has ended"):
        worker.call(os.getpid, LIMIT)


def test_closing_calls_close_and_may_be_repeated(worker, tmp_path):
    pid = worker.call(os.getpid, LIMIT)
    worker.close()
    worker.close()
    assert (tmp_path / "closed").exists()
    assert not is_running(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_cpu_time_of_running_children_counts(worker):
    assert 0.4 < worker.call(cpu_seconds_of_a_child, LIMIT) < 5

"""fastdino.bench.isolated: callables in processes of their own, and what becomes of those."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdino.bench.isolated import Isolated, WorkerError, session_cpu_seconds

LIMIT = 60.0


class Answering:
    """Answers with what the method that the argument names returns."""

    def __init__(self, folder: str = "") -> None:
        self.folder = Path(folder)

    def __call__(self, name):
        return getattr(self, name)()

    def pid(self):
        return os.getpid()

    def processors(self):
        return len(os.sched_getaffinity(0))

    def fail(self):
        raise ValueError("no such crop\nand more")

    def lack(self):
        raise ModuleNotFoundError("No module named 'lightly.loss'", name="lightly.loss")

    def die(self):
        os._exit(3)

    def start_a_child(self):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def hang(self):
        time.sleep(600)

    def work_of_a_child(self):
        """CPU seconds that a running child has taken, as session_cpu_seconds sees them."""
        before = session_cpu_seconds()
        code = "import time\nwhile time.process_time() < .5: pass\nprint(flush=True)\ninput()"
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            child.stdout.readline()
            return session_cpu_seconds() - before

    def close(self):
        if self.folder.name:
            (self.folder / "closed").touch()


def fail_to_make():
    raise OSError("no memory")


@pytest.fixture
def start():
    """Starts an Isolated, which ends with the test."""
    started = []

    def start_one(make=Answering, processors=1):
        started.append(Isolated(make, processors=processors))
        return started[-1]

    yield start_one
    for one in started:
        one.close()


def is_running(pid):
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_calls_are_answered_by_one_other_process(start):
    isolated = start()
    isolated.wait_until_made(LIMIT)
    pids = {isolated.call("pid", LIMIT) for _ in range(3)}
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_a_process_is_kept_to_its_processors(start):
    isolated = start(processors=1)
    isolated.wait_until_made(LIMIT)
    assert isolated.call("processors", LIMIT) == 1


@pytest.mark.parametrize(
    ("name", "reason", "missing"),
    [
        ("fail", "ValueError: no such crop", False),
        ("lack", "lightly is not installed", True),
        ("die", "its process died", False),
    ],
)
def test_what_goes_wrong_is_told_and_the_process_is_gone(start, name, reason, missing):
    isolated = start()
    isolated.wait_until_made(LIMIT)
    pid = isolated.call("pid", LIMIT)
    with pytest.raises(WorkerError) as error:
        isolated.call(name, LIMIT)
    assert (str(error.value), error.value.missing) == (reason, missing)
    assert wait_until(lambda: not is_running(pid))


def test_what_cannot_be_made_is_told(start):
    with pytest.raises(WorkerError, match="^OSError: no memory$"):
        start(fail_to_make).wait_until_made(LIMIT)


def test_one_that_hangs_is_ended_with_its_children(start, tmp_path):
    isolated = start(functools.partial(Answering, str(tmp_path)))
    isolated.wait_until_made(LIMIT)
    pid, child = isolated.call("pid", LIMIT), isolated.call("start_a_child", LIMIT)
    assert is_running(pid)
    assert is_running(child)
    with pytest.raises(WorkerError, match="^no answer within 1 s$"):
        isolated.call("hang", 1.0)
    assert wait_until(lambda: not is_running(pid) and not is_running(child))
    assert not (tmp_path / "closed").exists()
    with pytest.raises(WorkerError, match="its process has ended"):
        isolated.call("pid", LIMIT)


def test_closing_lets_it_end_by_itself(start, tmp_path):
    isolated = start(functools.partial(Answering, str(tmp_path)))
    isolated.wait_until_made(LIMIT)
    pid = isolated.call("pid", LIMIT)
    isolated.close()
    isolated.close()
    assert (tmp_path / "closed").exists()
    assert not is_running(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
def test_the_work_of_running_children_counts(start):
    isolated = start()
    isolated.wait_until_made(LIMIT)
    assert 0.4 < isolated.call("work_of_a_child", LIMIT) < 5

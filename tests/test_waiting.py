"""Signals end a process that waits: for a file system, a lock, or the other ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from benchmarks.local_ranks import free_port, rank_variables
from fastdino.waiting import DaemonExecutor, killable, run_within
from tests.processes import locked_elsewhere


def test_results_come_in_order_and_errors_are_raised():
    with DaemonExecutor(3) as pool:
        assert list(pool.map(str, range(50))) == [str(i) for i in range(50)]
        assert pool.submit(int, "12", base=16).result() == 18
        with pytest.raises(ValueError, match="invalid literal"):
            pool.submit(int, "x").result()


def test_an_error_leaves_running_tasks_behind_and_cancels_the_others():
    hold, started, futures, ran = threading.Event(), threading.Event(), [], []

    def blocked():
        started.set()
        hold.wait(60)
        return 1

    def fail():
        with DaemonExecutor(1) as pool:
            futures.extend([pool.submit(blocked), pool.submit(ran.append, 2)])
            started.wait(60)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not futures[0].done()
    hold.set()
    assert futures[0].result(60) == 1
    assert ran == []


def test_a_finished_task_keeps_nothing_in_memory():
    class Thing:
        pass

    with DaemonExecutor(1) as pool:
        thing = Thing()
        reference = weakref.ref(thing)
        pool.submit(repr, thing).result()
        del thing
        deadline = time.monotonic() + 10
        while reference() is not None and time.monotonic() < deadline:
            time.sleep(0.01)  # the thread is about to wait for the next task
        assert reference() is None


def test_a_call_is_left_behind_after_a_time():
    hold = threading.Event()
    with DaemonExecutor(1) as thread:
        assert run_within(60.0, thread, int, "7") == 7
        with pytest.raises(ValueError, match="invalid literal"):
            run_within(60.0, thread, int, "x")
        with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
            run_within(0.1, thread, hold.wait)
        hold.set()


def test_handlers_are_restored():
    def catch(*_):
        pass

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with killable():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, catch)
    try:
        with killable(always=False):
            assert signal.getsignal(signal.SIGTERM) is catch
        with killable():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is catch
    finally:
        signal.signal(signal.SIGTERM, before[1])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


# The pipe stands for a network file system that does not answer: opening it blocks.
BLOCKED_SCAN = """
import os, sys
from fastdino.data import scanning
def read_header(path, part=None):
    print("waiting", file=sys.stderr, flush=True)
    os.open(sys.argv[1], os.O_RDONLY)
scanning.read_header = read_header
from fastdino.data import scan_images
scan_images(sys.argv[2], workers=3)
"""
LOCK = """
import sys
from pathlib import Path
from fastdino.files import file_lock
from fastdino.signals import StopSignals
with StopSignals(), file_lock(Path(sys.argv[1]), wait=True):
    pass
"""
RENDEZVOUS = """
import sys, torch
from fastdino import distributed
meet = distributed.meet
def wait_for_ranks(*args):
    print("waiting", file=sys.stderr, flush=True)
    return meet(*args)
distributed.meet = wait_for_ranks
with distributed.process_group(torch.device("cpu"), "env://"):
    pass
"""


def ends(code, *args, number, env=()):
    """Send a signal to a script once it prints that it waits; return its exit status."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **dict(env)},
    )  # fmt: skip
    try:
        for line in process.stderr:
            if "waiting" in line:
                break
        if env:  # what blocks follows the line
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        process.send_signal(number)
        return process.wait(20)
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_a_signal_ends_a_scan_that_is_blocked(tmp_path, picture):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.jpg").write_bytes(picture(0))
    number = signal.SIGINT  # SIGTERM is not caught before the first step
    assert ends(BLOCKED_SCAN, tmp_path / "pipe", tmp_path / "data", number=number) == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_lock(tmp_path, number):
    with locked_elsewhere(tmp_path / "x.lock"):
        assert ends(LOCK, tmp_path / "x.lock", number=number) == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_other_ranks(number):
    env = rank_variables(0, 2, free_port())
    assert ends(RENDEZVOUS, number=number, env=env) == -number


def test_a_process_exits_in_spite_of_abandoned_threads():
    program = """
import atexit, threading
from fastdino.waiting import abandon_threads, exit_process
atexit.register(print, "end", flush=True)
threading.Thread(target=threading.Event().wait).start()
abandon_threads()
exit_process(75)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (75, "end\n")

"""fastdino.data.workers: workers of a DataLoader that signals do not stop."""

from __future__ import annotations

import atexit
import os
import signal
import weakref

import pytest
import torch
from torch.utils.data import TensorDataset

from fastdino.data import workers
from fastdino.data.workers import SteadyLoader, end_workers

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
NUMBERS = TensorDataset(torch.arange(8.0))


class Worker:
    def __init__(self):
        self.killed = False

    def is_alive(self):
        return not self.killed

    def kill(self):
        self.killed = True

    def join(self):
        assert self.killed, "it would wait forever"


class Running:
    """An iterator of a DataLoader with two workers, of which one has ended."""

    def __init__(self):
        self._workers, self.shut_down = [Worker(), Worker()], False
        self._workers[0].killed = True

    def _shutdown_workers(self):
        self.shut_down = True


def test_workers_are_killed_by_their_own_process_only():
    running = Running()
    end_workers(weakref.ref(running), os.getpid() + 1)  # as in a forked process
    assert not running.shut_down
    assert running._workers[1].is_alive()
    end_workers(weakref.ref(running), os.getpid())
    assert running.shut_down
    assert not running._workers[1].is_alive()


def test_nothing_happens_if_the_iterator_is_gone():
    reference = weakref.ref(running := Running())
    del running
    end_workers(reference, os.getpid())


def test_a_worker_ignores_the_signals_that_stop_a_run(monkeypatch):
    ignored, frozen = [], []
    monkeypatch.setattr(workers.signal, "signal", lambda *args: ignored.append(args))
    monkeypatch.setattr(workers.gc, "freeze", lambda: frozen.append(True))
    workers.init_worker(0)
    assert set(ignored) >= {
        (number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    }
    assert frozen == [True]


@pytest.mark.parametrize("count", [0, 1])
def test_abandoned_iteration_leaves_no_worker(count, monkeypatch):
    hooks = []
    monkeypatch.setattr(atexit, "register", hooks.append)
    monkeypatch.setattr(atexit, "unregister", hooks.remove)
    started = []
    init = workers.end_workers

    def noted(reference, owner):
        started.extend(reference()._workers)
        init(reference, owner)

    monkeypatch.setattr(workers, "end_workers", noted)
    batches = iter(SteadyLoader(NUMBERS, batch_size=2, num_workers=count))
    assert next(batches)[0].tolist() == [0.0, 1.0]
    assert len(hooks) == count
    batches.close()
    assert hooks == []
    assert len(started) == count
    assert not any(worker.is_alive() for worker in started)

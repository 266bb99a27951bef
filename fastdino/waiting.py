"""Waits that a signal can end: threads that do not keep a process alive, and blocking calls."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_abandoned = threading.Event()


class DaemonExecutor(Executor):
    """Threads like ThreadPoolExecutor's, that the process does not wait for after an error.

    A thread that reads from a file system which does not answer cannot be stopped. After an error
    or Ctrl-C in the `with` block, the tasks that have not begun are cancelled and the others are
    left behind; they end with the process.
    """

    def __init__(self, workers: int) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(max(1, workers))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        """Run function(*args, **options) in a thread."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **options))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads once all tasks are done, or with cancel_futures the running ones."""
        while cancel_futures:
            try:
                self._tasks.get_nowait()
            except Empty:
                break
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown(wait=error is None, cancel_futures=error is not None)

    def _work(self) -> None:
        while (run := self._tasks.get()) is not None:
            run()
            del run  # with all that the task refers to, while the thread waits for the next one


def abandon_threads() -> None:
    """Let `exit_process` leave threads behind that are in calls of C++ which may not return."""
    _abandoned.set()


def exit_process(status: int) -> NoReturn:
    """Exit with a status.

    A daemon thread that returns from C++ while the interpreter ends makes C++ abort the process,
    and destructors of process groups may wait. After `abandon_threads`, only the functions of
    atexit run.
    """
    if _abandoned.is_set():
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def run_within(seconds: float, thread: Executor, function: Callable[..., T], *args: Any) -> T:
    """Run function(*args) in a thread; after a time, leave it behind and raise TimeoutError."""
    future = thread.submit(function, *args)
    if not wait([future], seconds).done:
        future.cancel()
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()


@contextmanager
def killable(*, always: bool = True) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end the process at once during a wait with nothing to save.

    Python runs its handlers between two instructions, which a call that blocks in C++ never
    reaches.

    Args: always: False: only where SIGTERM has its usual effect, not while it is caught to save.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    is_main = threading.current_thread() is threading.main_thread()
    caught = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    if not is_main or (caught and not always):
        yield
        return
    # None: a handler that was not installed by Python. A signal that is ignored stays ignored.
    previous = {number: signal.getsignal(number) for number in numbers}
    changed = {n: h for n, h in previous.items() if h not in (None, signal.SIG_IGN)}
    for number in changed:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)

"""Freed memory is kept: told by the page faults of the next large block."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastdino.training.allocator import keep_freed_memory

SIZE = 64 << 20


def faults_of_a_block() -> int:
    """Minor page faults of getting, filling and freeing it."""
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(SIZE)))
    library.memset(block, 1, ctypes.c_size_t(SIZE))
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    for keep in (False, True):
        assert not keep or keep_freed_memory()
        faults_of_a_block()
        print(faults_of_a_block())


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")
def test_freed_memory_is_kept():
    code = "from test_allocator import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    given_back, kept = map(int, done.stdout.split())
    # Huge pages make a fault serve many pages: a few must suffice to tell.
    assert given_back >= 32
    assert kept < 16


def test_elsewhere_nothing_is_set(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()

"""Page faults of the next large allocation show whether freed memory is kept."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastdino.training.allocator import keep_freed_memory

SIZE = 64 << 20


def count_page_faults() -> int:
    """Return the minor page faults of allocating, filling and freeing a block."""
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
        count_page_faults()
        print(count_page_faults())


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_kept():
    code = "from test_allocator import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    returned, kept = map(int, done.stdout.split())
    # With huge pages, one fault serves many pages.
    assert returned >= 32
    assert kept < 16


def test_other_systems_are_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()

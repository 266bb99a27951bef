"""Setting of the C memory allocator for training on a CPU, and errors without memory.

glibc returns freed large blocks to the system, so every step pays for fresh, zeroed pages. On a
GPU, PyTorch's caching allocator already keeps freed blocks.
"""

from __future__ import annotations

import ctypes
import sys

import torch

# mallopt's parameters and their largest value, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1
# In PyTorch's RuntimeErrors: no memory of that size, a size beyond 64 bits, and no pinned memory.
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error of an allocation, on the host or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, so its size stays at the peak.

    Returns: True if set; False if the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, LARGEST))

"""Freed memory kept for the next step, on a CPU.

glibc gives large blocks back to the system as they are freed, and every step then pays for fresh,
zeroed pages. PyTorch's CUDA allocator keeps them by itself.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters and their largest value, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees; its size stays the largest there was.

    Returns: whether it could be set: the C library is glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, LARGEST))

"""Launch each kernel with sizes that fill no block, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python3 -m benchmarks.gpu.sanitize

The calls are those of option_calls.boundary_calls. Without the allocator's cache each tensor is an
allocation, so that memcheck knows its end.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.option_calls import boundary_calls
from fastdino.runtime import choose_device


def main() -> int:
    device = choose_device("auto")
    for name, call in boundary_calls():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in call(device)):
            print(f"{name}: not finite")
            return 1
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

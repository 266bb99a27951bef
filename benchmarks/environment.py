"""What the figures were measured on, as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys

import torch

from fastdino.environment import commit, output_of, processor

CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def environment() -> dict[str, str]:
    """Device, versions and commit; `device` names the folder of the results."""
    found = {
        "device": "cpu",
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
            "CUDA": torch.version.cuda or "unknown",
            CLOCKS: output_of("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"),
        }
    return found


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


if __name__ == "__main__":
    json.dump(environment(), sys.stdout)

"""Print one line of JSON: environment, copy bandwidth, rate of a matrix product.

    python3 -m benchmarks.gpu.device_facts [--reduced]

`copy_gbps` counts bytes read and written; `product_tflops` is the median bf16 product (fp32 on a
CPU) of random square matrices.
"""

from __future__ import annotations

import json
import statistics
import sys

import torch

from fastdino.bench.measurement import Call, copy_bandwidth, device_time
from fastdino.environment import environment

PACKAGES = (
    "torch", "triton", "torchvision", "timm", "numba", "lightly", "xformers", "nvidia-dali-cuda130",
    "pytest", "pytest-xdist", "pytest-benchmark",
)  # fmt: skip


def product_rate(device: torch.device, size: int) -> float:
    """Return the FLOP/s of a product of two matrices [size, size]."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    calls: list[Call] = [lambda: torch.mm(x, y, out=out)] * 3
    device_time(calls, device, 0.0)
    times = [device_time(calls, device, 1e-3).seconds for _ in range(7)]
    return 2 * size**3 / statistics.median(times)


def main() -> int:
    reduced = "--reduced" in sys.argv[1:]
    on_gpu = torch.cuda.is_available() and not reduced
    device = torch.device("cuda" if on_gpu else "cpu")
    size, copied = (8192, None) if on_gpu else (512, 1 << 24)
    rates = {
        "copy_gbps": copy_bandwidth(device, copied) / 1e9,
        "product_tflops": product_rate(device, size) / 1e12,
    }
    print(json.dumps({"environment": environment(device, PACKAGES), "rates": rates}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

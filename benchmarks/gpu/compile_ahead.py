"""Compile the kernels that the GPU report launches, on all cores and without using the GPU.

    python3 -m benchmarks.gpu.compile_ahead [--arch 90] [--processes N]

The compiled kernels go into Triton's cache (TRITON_CACHE_DIR), where the report's processes find
them: a key depends on the kernel's source, the architecture, the options, and the version of
Triton, not on the driver. The launches are those of kernel_calls.py and of the benchmark suites,
recorded on CPU tensors. The last line of the output counts the compiled kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from triton import knobs

from benchmarks import (
    bench_adamw_ema,
    bench_clip,
    bench_dino_loss,
    bench_ema,
    bench_linear_loss,
    bench_patch_loss,
    bench_sinkhorn,
)
from benchmarks.comparison import Comparison
from benchmarks.gpu.kernel_calls import kernel_calls
from benchmarks.gpu.option_calls import boundary_calls
from benchmarks.gpu.recording_driver import ARCHS, record_launches
from fastdino.environment import cpu_count

Calls = Iterator[Callable[[], object]]
CPU = torch.device("cpu")


def calls() -> Calls:
    """Yield every call; those of the suites with the sizes of a GPU."""
    yield from (call for _, call in kernel_calls())
    yield from suite_calls()
    yield from (partial(call, CPU) for _, call in boundary_calls())


def suite_calls() -> Calls:
    """Yield a call of each comparison's own baselines.

    Kernels are compiled anew for a size only if it is divisible by 16 and another one is not, so
    that small sizes do. The first network's tensors cover those of the larger ones.
    """
    comparisons: list[Callable[[], Comparison]] = [
        partial(bench_dino_loss.loss_comparison, replace(size, B=16), "forward + backward", CPU)
        for size in bench_dino_loss.SIZES["cuda"]
    ]
    comparisons += [
        partial(bench_sinkhorn.sinkhorn_comparison, replace(size, N=16 + size.N % 16), CPU)
        for size in bench_sinkhorn.SIZES["cuda"]
    ]
    comparisons += [
        partial(bench_patch_loss.patch_comparison, replace(size, N=16 + size.N % 16), CPU)
        for size in bench_patch_loss.SIZES["cuda"]
    ]
    comparisons += [
        partial(bench_linear_loss.linear_loss_comparison, replace(size, N=16 + size.N % 16), CPU)
        for size in bench_linear_loss.SIZES["cuda"]
    ]
    network = bench_ema.SIZES["cuda"][0]
    for make in (
        bench_ema.ema_comparison, bench_clip.clip_comparison, bench_adamw_ema.adamw_ema_comparison
    ):  # fmt: skip
        comparisons += [partial(make, network, option, CPU) for option in (False, True)]
    for make_comparison in comparisons:
        yield partial(run_ours, make_comparison)


def run_ours(make_comparison: Callable[[], Comparison]) -> None:
    """Call the own baselines of a comparison once."""
    for baseline in make_comparison().baselines:
        if baseline.role == "ours":
            baseline.prepare()()


def compile_share(index: int, processes: int, arch: int) -> tuple[int, int]:
    """Record every `processes`-th call; return the kernels compiled and those in the cache."""
    os.environ["FASTDINO_KERNELS"] = "triton"  # although the tensors are on the CPU
    hits: list[bool] = []
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    with record_launches(arch):
        for number, call in enumerate(calls()):
            if number % processes == index:
                call()
    return hits.count(False), hits.count(True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, help="compute capability (default: of the GPU, or 90)")
    parser.add_argument("--processes", type=int, default=cpu_count())
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    arch = options.arch or device_arch()
    if arch not in ARCHS:
        print(f"not compiled ahead: sm_{arch} is none of {', '.join(map(str, ARCHS))}")
        return 0
    share = partial(compile_share, processes=options.processes, arch=arch)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        counts = list(pool.map(share, range(options.processes)))
    compiled, cached = (sum(column) for column in zip(*counts, strict=True))
    seconds = time.perf_counter() - start
    print(
        f"{compiled} kernels compiled, {cached} in the cache, {options.processes} processes, "
        f"{seconds:.1f} s"
    )
    return 0


def device_arch() -> int:
    """Return the compute capability of the GPU, 90 for sm_90 and without a GPU."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


if __name__ == "__main__":
    sys.exit(main())

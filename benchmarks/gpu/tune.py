"""Time the launch configurations of the kernels and print the fastest first.

    python3 -m benchmarks.gpu.tune [forward backward ema clip adamw_ema] [--tiny]

The best values are written into the kernels' modules by hand; nothing is tuned at run time. --tiny
only shows that the command works, without a GPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from fastdino_kernels import pointer_table

from benchmarks import bench_adamw_ema, bench_clip, bench_dino_loss, bench_ema
from benchmarks.comparison import Comparison, Effort, Timing, run_comparison
from benchmarks.kernel_tables import format_seconds
from benchmarks.networks import Size

Setting = dict[str, int]


@dataclass(frozen=True)
class Sweep:
    """The constants of a kernel's module, their candidates, and the comparison to time."""

    module: str
    candidates: Mapping[str, Sequence[int]]
    comparison: Callable[[bool, torch.device], Comparison]

    def settings(self) -> Iterator[Setting]:
        for values in itertools.product(*self.candidates.values()):
            yield dict(zip(self.candidates, values, strict=True))


def loss(phase: str) -> Callable[[bool, torch.device], Comparison]:
    def make(tiny: bool, device: torch.device) -> Comparison:
        size = bench_dino_loss.Size(2, 3, 2048) if tiny else bench_dino_loss.Size(64, 10)
        return bench_dino_loss.loss_comparison(size, phase, device)

    return make


def network(
    comparison: Callable[[Size, bool, torch.device], Comparison], option: bool
) -> Callable[[bool, torch.device], Comparison]:
    def make(tiny: bool, device: torch.device) -> Comparison:
        return comparison(Size("toy", 64) if tiny else Size("vit_small"), option, device)

    return make


WARPS = (1, 2, 4, 8)
SWEEPS = {
    "forward": Sweep(
        "pairwise_triton",
        {
            "FORWARD_BLOCK": (512, 1024, 2048),  # 128 for each of 4 bf16 per lane
            "FORWARD_WARPS": WARPS,
            "FORWARD_PROGRAMS": (1024, 1536, 2048, 4096),
        },
        loss("forward"),
    ),
    "backward": Sweep(
        "pairwise_triton",
        {"BACKWARD_BYTES": (1024, 2048, 4096, 8192), "BACKWARD_WARPS": WARPS},
        loss("backward"),
    ),
    "ema": Sweep(
        "ema_triton",
        {"CHUNK": (1024, 2048, 4096, 8192), "NUM_WARPS": (4, 8, 16)},
        network(bench_ema.ema_comparison, True),
    ),
    "clip": Sweep(
        "clip_triton",
        {"CHUNK": (2048, 4096, 8192, 16384), "NUM_WARPS": (4, 8, 16)},
        network(bench_clip.clip_comparison, False),
    ),
    "adamw_ema": Sweep(
        "adamw_ema_triton",
        {"CHUNK": (1024, 2048, 4096), "NUM_WARPS": (4, 8), "MAX_REGISTERS": (64, 80, 128)},
        network(bench_adamw_ema.adamw_ema_comparison, True),
    ),
}


def try_setting(sweep: Sweep, setting: Setting, tiny: bool, device: torch.device) -> Timing:
    """Check and time our kernel with one setting; the module is restored afterwards."""
    module = importlib.import_module(f"fastdino_kernels.{sweep.module}")
    before = {name: getattr(module, name) for name in setting}
    # Pointer tables depend on the chunk size.
    pointer_table.forget_tables()
    effort = Effort(0.0, 1, least=1) if tiny else Effort(1.0, 15)
    try:
        vars(module).update(setting)
        comparison = sweep.comparison(tiny, device)
        ours = next(b for b in comparison.baselines if b.name.startswith("fastdino_kernels"))
        (timing,) = run_comparison(replace(comparison, baselines=[ours]), device, effort).values()
    finally:
        vars(module).update(before)
    return timing


def ranking(tried: Sequence[tuple[Setting, Timing]]) -> str:
    """Format the results, fastest first and failures last."""
    lines = []
    for setting, timing in tried:
        words = ", ".join(f"{name}={value}" for name, value in setting.items())
        if timing.outcome.reason:
            lines.append((float("inf"), f"{words}: {timing.outcome.reason}"))
        else:
            median = statistics.median(timing.seconds)
            gbps = timing.info["bytes"] / median / 1e9
            lines.append((median, f"{format_seconds(median):>9}  {gbps:7.1f} GB/s  {words}"))
    return "\n".join(text for _, text in sorted(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="*", metavar="|".join(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--tiny", action="store_true", help="two settings each, small inputs")
    options = parser.parse_args(arguments)
    os.environ["FASTDINO_KERNELS"] = "triton"  # also on a CPU
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = False
    for name in options.sweeps:
        sweep = SWEEPS[name]
        settings = list(sweep.settings())
        if options.tiny:
            settings = settings[::7][:2]
        tried = [(s, try_setting(sweep, s, options.tiny, device)) for s in settings]
        failed = failed or all(timing.outcome.reason for _, timing in tried)
        print(f"{name}\n{ranking(tried)}\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

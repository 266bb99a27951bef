"""Tries configurations of the kernels and prints the fastest first; for people with a GPU.

    python3 -m benchmarks.gpu.tune [forward backward ema clip adamw_ema] [--tiny]

What wins is written into the kernels' modules by hand: nothing is tuned at run time. --tiny shows
that it runs, on a machine without a GPU with TRITON_INTERPRET=1.
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
from functools import partial

import torch
from fastdino_kernels import pointer_table

from benchmarks import bench_adamw_ema, bench_clip, bench_dino_loss, bench_ema
from benchmarks.contest import Contest, Effort, Outcome, hold
from benchmarks.report import format_seconds

Setting = dict[str, int]


@dataclass(frozen=True)
class Sweep:
    """The constants of a kernel's module, what they may be, and what is timed with each."""

    module: str
    candidates: Mapping[str, Sequence[int]]
    contest: Callable[[bool, torch.device], Contest]

    def settings(self) -> Iterator[Setting]:
        for values in itertools.product(*self.candidates.values()):
            yield dict(zip(self.candidates, values, strict=True))


def loss_contest(phase: str, tiny: bool, device: torch.device) -> Contest:
    size = bench_dino_loss.Size(2, 3, 2048) if tiny else bench_dino_loss.Size(64, 10)
    return bench_dino_loss.loss_contest(size, phase, device)


def ema_contest(tiny: bool, device: torch.device) -> Contest:
    size = bench_ema.Size("a toy", 64) if tiny else bench_ema.Size("ViT-S")
    return bench_ema.ema_contest(size, True, device)


def clip_contest(tiny: bool, device: torch.device) -> Contest:
    size = bench_ema.Size("a toy", 64) if tiny else bench_ema.Size("ViT-S")
    return bench_clip.clip_contest(size, False, device)


def adamw_ema_contest(tiny: bool, device: torch.device) -> Contest:
    size = bench_ema.Size("a toy", 64) if tiny else bench_ema.Size("ViT-S")
    return bench_adamw_ema.adamw_ema_contest(size, True, device)


WARPS = (1, 2, 4, 8)
SWEEPS = {
    "forward": Sweep(
        "pairwise_triton",
        {
            "FORWARD_BLOCK": (256, 512, 1024),
            "FORWARD_WARPS": WARPS,
            "FORWARD_PROGRAMS": (1024, 1536, 2048, 4096),
        },
        partial(loss_contest, "forward"),
    ),
    "backward": Sweep(
        "pairwise_triton",
        {"BACKWARD_BYTES": (1024, 2048, 4096, 8192), "BACKWARD_WARPS": WARPS},
        partial(loss_contest, "backward"),
    ),
    "ema": Sweep(
        "ema_triton", {"CHUNK": (1024, 2048, 4096, 8192), "NUM_WARPS": (4, 8, 16)}, ema_contest
    ),
    "clip": Sweep(
        "clip_triton", {"CHUNK": (2048, 4096, 8192, 16384), "NUM_WARPS": (4, 8, 16)}, clip_contest
    ),
    "adamw_ema": Sweep(
        "adamw_ema_triton",
        {"CHUNK": (1024, 2048, 4096), "NUM_WARPS": (4, 8), "MAX_REGISTERS": (64, 80, 128)},
        adamw_ema_contest,
    ),
}


def ours_of(contest: Contest) -> Contest:
    """The contest with the kernels alone, as a call without options runs them."""
    ours = [variant for variant in contest.variants if variant.name.startswith("fastdino_kernels")]
    return replace(contest, variants=ours[:1])


def try_setting(sweep: Sweep, setting: Setting, tiny: bool, device: torch.device) -> Outcome:
    """Check and time one setting; the module is left as it was."""
    module = importlib.import_module(f"fastdino_kernels.{sweep.module}")
    before = {name: getattr(module, name) for name in setting}
    # Tables hold for chunks of the size that they were made for.
    pointer_table._plans, pointer_table._owners = pointer_table._Cache(), pointer_table._Cache()
    effort = Effort(0.0, 1, least=1) if tiny else Effort(1.0, 15)
    try:
        vars(module).update(setting)
        (outcome,) = hold(ours_of(sweep.contest(tiny, device)), device, effort).values()
    finally:
        vars(module).update(before)
    return outcome


def table(tried: Sequence[tuple[Setting, Outcome]]) -> str:
    """Fastest first, failures last."""
    lines = []
    for setting, outcome in tried:
        words = ", ".join(f"{name}={value}" for name, value in setting.items())
        if outcome.error:
            lines.append((float("inf"), f"{words}: {outcome.error.splitlines()[-1]}"))
        else:
            median = statistics.median(outcome.seconds)
            gbps = outcome.info["bytes"] / median / 1e9
            lines.append((median, f"{format_seconds(median):>9}  {gbps:7.1f} GB/s  {words}"))
    return "\n".join(text for _, text in sorted(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="*", metavar="|".join(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--tiny", action="store_true", help="two settings each, small inputs")
    options = parser.parse_args(arguments)
    os.environ["FASTDINO_KERNELS"] = "triton"  # also where "auto" would not take it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = False
    for name in options.sweeps:
        sweep = SWEEPS[name]
        settings = list(sweep.settings())[:: 7 if options.tiny else 1][
            : 2 if options.tiny else None
        ]
        tried = [(s, try_setting(sweep, s, options.tiny, device)) for s in settings]
        failed = failed or all(outcome.error for _, outcome in tried)
        print(f"{name}\n{table(tried)}\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

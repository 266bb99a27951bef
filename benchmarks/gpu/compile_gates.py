"""Compile every kernel ahead of time, without a GPU, and fail for slow or inexact code.

    python -m benchmarks.gpu.compile_gates [--arch 80 90 100] [--calls MODULE] [--write FOLDER]

The kernels are those that the calls of kernel_calls.py launch. A kernel fails if it spills, touches
local memory, adds floats atomically (results would differ from run to run), exceeds its budget, has
fewer 128-bit accesses than its budget requires, or fuses products and sums whose separate
rounding its results depend on.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu.kernel_calls import Calls
from benchmarks.gpu.recording_driver import Launch, record_launches
from benchmarks.gpu.sass import MachineCode, read_cubin

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Budget:
    """Limits of one kernel; loads and stores are the least number of 128-bit accesses."""

    registers: int = 128
    shared_bytes: int = 16 * 1024
    loads: int = 1
    stores: int = 1


# The first pattern that matches decides. Rows of odd length may start anywhere, so
# their accesses are narrow. The counts are those of one pass over a program's tile: for the loss at
# least the logits of T + S = 12 crops, for the others 4 vectors per thread and tensor.
BUDGETS: tuple[tuple[str, Budget], ...] = (
    ("pairwise_* K odd*", Budget(registers=168, loads=0, stores=0)),
    ("pairwise_forward_kernel, *probs*", Budget(loads=2, stores=0)),
    ("pairwise_backward_kernel, *probs*", Budget(loads=2, stores=1)),
    ("pairwise_forward_kernel, *", Budget(registers=136, loads=24, stores=4)),
    ("pairwise_backward_kernel, *", Budget(loads=12, stores=10)),
    ("pairwise_finish_kernel, *", Budget(registers=64, stores=0)),
    ("ema_kernel, *", Budget(registers=64, loads=4, stores=2)),
    ("adamw_ema_kernel, all bf16", Budget(registers=80, loads=5, stores=6)),
    ("adamw_ema_kernel, *", Budget(registers=80, loads=8, stores=6)),
    ("sum_squares_kernel, *", Budget(registers=64, loads=4, stores=0)),
    ("scale_kernel, *", Budget(registers=64, loads=4, stores=4)),
    ("multi_crop_kernel, *", Budget(loads=2, stores=2)),
    # These work on a few values, so wide accesses do not matter.
    ("prepare_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("decide_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("norms_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("total_norm_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("*", Budget()),
)


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture, and the reasons why it fails (empty if it passes)."""

    case: str
    arch: int
    warps: int
    shared_bytes: int
    code: MachineCode
    problems: tuple[str, ...]


def budget_of(name: str) -> Budget:
    """Return the budget of a case."""
    return next(budget for pattern, budget in BUDGETS if fnmatch.fnmatch(name, pattern))


def problems_of(code: MachineCode, shared_bytes: int, budget: Budget) -> list[str]:
    """List the ways in which a compiled kernel exceeds its budget."""
    problems = []
    if code.stack:
        problems.append(f"spills {code.stack} bytes per thread")
    if code.local_accesses:
        problems.append(f"{code.local_accesses} accesses to local memory")
    if code.float_atomics:
        problems.append(f"{code.float_atomics} atomic additions of floats")
    if code.registers > budget.registers:
        problems.append(f"{code.registers} registers, the budget is {budget.registers}")
    if shared_bytes > budget.shared_bytes:
        problems.append(f"{shared_bytes} bytes of shared memory, not {budget.shared_bytes}")
    for kind in ("loads", "stores"):
        wide = sum(count for bits, count in getattr(code, kind).items() if bits >= 128)
        least = getattr(budget, kind)
        if wide < least:
            problems.append(f"{wide} {kind} of 128 bits, at least {least} expected")
    return problems


def check_launch(name: str, launch: Launch, arch: int) -> Compiled:
    """Compare the machine code of a launch with the budget of its case."""
    code = read_cubin(launch.binary)
    problems = problems_of(code, launch.shared_bytes, budget_of(name))
    if code.fused and not launch.fp_fusion:
        problems.append(f"{code.fused} fused multiply-adds, which round once and not twice")
    return Compiled(name, arch, launch.num_warps, launch.shared_bytes, code, tuple(problems))


def run_gates(calls: Calls, arch: int) -> list[Compiled]:
    """Check each kernel that the calls launch; code launched by several calls is checked once."""
    results: dict[bytes, Compiled] = {}
    with record_launches(arch) as launches:
        for name, call in calls:
            launches.clear()
            call()
            for launch in launches:
                if launch.binary not in results:
                    case = f"{launch.kernel}, {name}"
                    results[launch.binary] = check_launch(case, launch, arch)
    return list(results.values())


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{bits}:{counts[bits]}" for bits in sorted(counts, reverse=True)) or "-"


def table(results: Sequence[Compiled]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| kernel | sm | warps | registers | spilled B | shared B | loads | stores | cubin B | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        code = result.code
        cells = (
            result.case, result.arch, result.warps, code.registers, code.stack,
            result.shared_bytes, _widths(code.loads), _widths(code.stores), code.cubin_bytes,
            "**" + "; ".join(result.problems) + "**" if result.problems else "ok",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(results: Sequence[Compiled], folder: Path) -> None:
    """Write compile_gates.md and compile_gates.json."""
    versions = f"Triton {triton.__version__}"
    text = (
        "# The kernels, compiled ahead of time\n\n"
        f"Written by `make gates` with {versions}, without a GPU. Each row is a kernel and the\n"
        "first call that launches it. Registers and spills are per thread. Loads and stores count\n"
        "the instructions on global memory, by their width in bits per thread.\n\n"
        f"{table(results)}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compile_gates.md").write_text(text, encoding="utf-8")
    record: dict[str, Any] = {
        "triton": triton.__version__,
        "results": [asdict(result) for result in results],
    }
    (folder / "compile_gates.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument(
        "--calls",
        default="benchmarks.gpu.kernel_calls",
        help="module whose kernel_calls() yields the calls (default: %(default)s)",
    )
    parser.add_argument("--write", type=Path, help="folder for compile_gates.md and .json")
    options = parser.parse_args(arguments)
    calls = importlib.import_module(options.calls).kernel_calls
    results = [result for arch in options.arch for result in run_gates(calls(), arch)]
    results.sort(key=lambda result: result.case.split(",")[0])
    print(table(results))
    if options.write:
        write(results, options.write)
    failed = [result for result in results if result.problems]
    for result in failed:
        print(f"{result.case} on sm_{result.arch}: {'; '.join(result.problems)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every kernel ahead of time, without a GPU, and fail for slow or inexact code.

    python -m benchmarks.gpu.compile_gates [--arch 90 gfx942 ...] [--calls MODULE] [--write FOLDER]

The kernels are those that the calls of kernel_calls.py launch. A kernel fails if it spills, touches
local memory, adds floats atomically (results would differ from run to run), exceeds its budget, has
fewer wide accesses than its budget requires, or fuses products and sums whose separate rounding its
results depend on. The calls are compiled in parallel, on all cores.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product, repeat
from pathlib import Path

import triton

from benchmarks.gpu.amdgcn import read_amdgcn
from benchmarks.gpu.emulated_gpu import GPU, emulated_gpu
from benchmarks.gpu.recording_driver import ARCHS, Arch, Launch, record_launches
from benchmarks.gpu.sass import MachineCode, count_fused, read_cubin


@dataclass(frozen=True)
class Budget:
    """Limits of one kernel; loads and stores are the least number of accesses of `bits`."""

    registers: int = 128
    shared_bytes: int = 16 * 1024
    bits: int = 128
    loads: int = 1
    stores: int = 1


# The first pattern that matches decides. Rows of odd length may start anywhere, so
# their accesses are narrow. The counts are those of one pass over a program's tile, in code that is
# not unrolled: for the loss's forward pass, in half precision, the center (4), T = 2 teacher crops
# (4), the first student crop (2) and the next one (2); for its backward pass the logits of
# T + S = 12 crops; for patches, T = S = 1; for the others 4 vectors per thread and tensor.
BUDGETS: tuple[tuple[str, Budget], ...] = (
    ("pairwise_* K odd*", Budget(registers=168, loads=0, stores=0)),
    ("pairwise_forward_kernel, * K 1000", Budget(registers=168, loads=12, stores=8)),
    ("pairwise_finish_kernel, * K 1000", Budget(registers=64, loads=0, stores=0)),
    ("pairwise_forward_kernel, *probs*", Budget(loads=6, stores=0)),
    ("pairwise_backward_kernel, *probs*", Budget(loads=2, stores=1)),
    ("pairwise_forward_kernel, * patches", Budget(registers=96, loads=8, stores=8)),
    ("pairwise_backward_kernel, * patches", Budget(registers=32, loads=3, stores=1)),
    ("pairwise_forward_kernel, *", Budget(registers=144, loads=12, stores=8)),
    ("pairwise_backward_kernel, *", Budget(loads=12, stores=10)),
    ("pairwise_finish_kernel, *", Budget(registers=64, stores=0)),
    ("sinkhorn_* K odd*", Budget(loads=0, stores=0)),
    ("sinkhorn_columns_kernel, *", Budget(registers=80, loads=4, stores=2)),
    ("sinkhorn_rows_kernel, * N64", Budget(registers=64, loads=2, stores=0)),
    ("sinkhorn_rows_kernel, *", Budget(registers=104, loads=8, stores=0)),
    ("sinkhorn_masses_kernel, *", Budget(registers=80, loads=4, stores=1)),
    ("sinkhorn_merge_kernel, *", Budget(registers=64, stores=0)),
    ("ema_kernel, *", Budget(registers=64, loads=4, stores=2)),
    ("adamw_ema_kernel, all bf16", Budget(registers=80, loads=5, stores=6)),
    ("adamw_ema_kernel, *", Budget(registers=80, loads=8, stores=6)),
    ("sum_squares_kernel, *", Budget(registers=64, loads=4, stores=0)),
    ("scale_kernel, *", Budget(registers=64, loads=4, stores=4)),
    # A thread works on one pixel of a row, so that shifted accesses are coalesced too.
    ("multi_crop_*", Budget(loads=0, stores=0)),
    # These work on a few values, so wide accesses do not matter.
    ("prepare_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("norms_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("*", Budget()),
)


# Tuned for NVIDIA, compiled for AMD. 64 registers allow all 8 waves of a SIMD, 112 allow 4. A wave
# has 64 threads, so where NVIDIA's threads access 128 bits, AMD's often access 64.
AMD_BUDGETS: tuple[tuple[str, Budget], ...] = (
    ("pairwise_* K odd*", Budget(registers=112, loads=0, stores=0)),
    ("pairwise_* K 1000", Budget(registers=112, loads=0, stores=0)),
    ("pairwise_forward_kernel, *probs*", Budget(registers=64, loads=2, stores=0)),
    ("pairwise_forward_kernel, * patches", Budget(registers=64, bits=64, loads=6, stores=4)),
    ("pairwise_forward_kernel, *", Budget(registers=112, bits=64, loads=10, stores=4)),
    ("pairwise_finish_kernel, *", Budget(registers=64, stores=0)),
    ("pairwise_backward_kernel, *", Budget(registers=64, bits=64)),
    ("sinkhorn_* K odd*", Budget(registers=64, loads=0, stores=0)),
    ("sinkhorn_rows_kernel, *", Budget(registers=80, bits=64, stores=0)),
    ("sinkhorn_merge_kernel, *", Budget(registers=64, bits=64, stores=0)),
    ("sinkhorn_*", Budget(registers=80, bits=64)),
    ("prepare_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("norms_kernel, *", Budget(registers=64, loads=0, stores=0)),
    ("sum_squares_kernel, *", Budget(registers=64, loads=2, stores=0)),
    ("multi_crop_*", Budget(registers=96, loads=0, stores=0)),
    ("*", Budget(registers=64, bits=64)),
)


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture, and the reasons why it fails (empty if it passes)."""

    case: str
    target: str
    warps: int
    shared_bytes: int
    code: MachineCode
    problems: tuple[str, ...]


def name_of(arch: Arch) -> str:
    """Return the name of an architecture in the table."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def budget_of(case: str, arch: Arch) -> Budget:
    """Return the budget of a case."""
    budgets = BUDGETS if isinstance(arch, int) else AMD_BUDGETS
    return next(budget for pattern, budget in budgets if fnmatch.fnmatch(case, pattern))


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
        wide = sum(count for bits, count in getattr(code, kind).items() if bits >= budget.bits)
        least = getattr(budget, kind)
        if wide < least:
            problems.append(f"{wide} {kind} of {budget.bits} bits, at least {least} expected")
    return problems


def read_machine_code(launch: Launch) -> MachineCode:
    """Return the counts of a compiled launch."""
    if isinstance(launch.arch, int):
        return replace(read_cubin(launch.binary), fused=count_fused(launch.text("ptx")))
    return read_amdgcn(launch.text("amdgcn"), len(launch.binary))


def check_launch(case: str, launch: Launch) -> Compiled:
    """Compare the machine code of a launch with the budget of its case."""
    code = read_machine_code(launch)
    problems = problems_of(code, launch.shared_bytes, budget_of(case, launch.arch))
    if code.fused and not launch.fp_fusion:
        problems.append(f"{code.fused} fused multiply-adds, which round once and not twice")
    return Compiled(
        case,
        name_of(launch.arch),
        launch.num_warps,
        launch.shared_bytes,
        code,
        tuple(problems),
    )


# By the hash of the machine code and by whether it may fuse products and sums.
Checked = dict[tuple[str, bool], Compiled]

_checked: Checked = {}  # of this process


def check_call(module: str, index: int, arch: Arch) -> Checked:
    """Check the kernels that one of a module's calls launches."""
    name, call = list(importlib.import_module(module).kernel_calls())[index]
    compiled: Checked = {}
    with record_launches(arch, device=GPU) as launches, emulated_gpu():
        call(GPU)
        for launch in launches:
            key = hashlib.sha256(launch.binary).hexdigest(), launch.fp_fusion
            if key not in _checked:
                _checked[key] = check_launch(f"{launch.kernel}, {name}", launch)
            compiled[key] = _checked[key]
    return compiled


def run_gates(module: str, archs: Sequence[Arch]) -> list[Compiled]:
    """Check each kernel that a module's calls launch, once, in parallel processes."""
    count = len(list(importlib.import_module(module).kernel_calls()))
    indices, targets = zip(*product(range(count), archs), strict=True)
    checked: Checked = {}
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for compiled in pool.map(check_call, repeat(module), indices, targets, chunksize=4):
            checked = compiled | checked  # the first call that launched a kernel names it
    order = {name_of(arch): place for place, arch in enumerate(archs)}
    return sorted(
        checked.values(), key=lambda each: (each.case.split(",")[0], order[each.target], each.case)
    )


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{bits}:{counts[bits]}" for bits in sorted(counts, reverse=True)) or "-"


def table(results: Sequence[Compiled]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| kernel | target | warps | registers | spilled B | shared B | loads | stores | code | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        code = result.code
        cells = (
            result.case, result.target, result.warps, code.registers, code.stack,
            result.shared_bytes, _widths(code.loads), _widths(code.stores), code.cubin_bytes,
            "**" + "; ".join(result.problems) + "**" if result.problems else "ok",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(results: Sequence[Compiled], folder: Path) -> None:
    """Write a Markdown and a JSON file, named after Triton's version."""
    version = triton.__version__
    text = (
        f"# The kernels, compiled ahead of time by Triton {version}\n\n"
        "Written by `make gates`, without a GPU. gfx942 (AMD MI300) is compiled, not run. Each\n"
        "row is a kernel and the first call that launches it. Registers and spills are per\n"
        "thread. Loads and stores count the instructions on global memory, by their width in bits\n"
        "per thread. The code's size is in bytes.\n\n"
        f"{table(results)}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"compile_gates_triton_{'.'.join(version.split('.')[:2])}"
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    rows = ",\n".join(json.dumps(asdict(result)) for result in results)
    record = f'{{"triton": "{version}", "results": [\n{rows}\n]}}\n'
    (folder / f"{stem}.json").write_text(record, encoding="utf-8")


def _arch(text: str) -> Arch:
    arch = int(text) if text.isdigit() else text
    if arch not in ARCHS:
        known = ", ".join(map(str, ARCHS))
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text}")
    return arch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=_arch, nargs="+", default=ARCHS)
    parser.add_argument(
        "--calls",
        default="benchmarks.gpu.kernel_calls",
        help="module whose kernel_calls() yields the calls (default: %(default)s)",
    )
    parser.add_argument("--write", type=Path, help="folder for the table and its JSON")
    options = parser.parse_args(arguments)
    results = run_gates(options.calls, options.arch)
    print(table(results))
    if options.write:
        write(results, options.write)
    failed = [result for result in results if result.problems]
    for result in failed:
        print(f"{result.case} on {result.target}: {'; '.join(result.problems)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every shipped kernel ahead of time, with no GPU, and refuses what would be slow on one.

    python -m benchmarks.gpu.compile_gates [--arch 80 90 100] [--modules ...] [--write FOLDER]

Every *_triton.py of fastdino_kernels says with compile_cases() what it ships. A case fails where it
spills, touches local memory, adds floats atomically (the results would differ from run to run),
exceeds its budget, misses the 128-bit accesses that its budget asks for, or fuses products and sums
whose separate roundings its results depend on.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastdino_kernels
import triton
from fastdino_kernels.compile_case import CompileCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu.sass import MachineCode, read_cubin

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Budget:
    """What a case may use; loads and stores: how many of them are 128 bits wide, at least."""

    registers: int = 128
    shared_bytes: int = 16 * 1024
    loads: int = 1
    stores: int = 1


# The first pattern that fits a case's name decides. A row whose length is odd starts anywhere, so
# nothing of it is wide. The counts are those of one pass over a program's tile: for the loss at
# least the logits of T + S = 12 crops, for the others 4 vectors a thread of each tensor.
BUDGETS: tuple[tuple[str, Budget], ...] = (
    ("pairwise * K odd*", Budget(registers=168, loads=0, stores=0)),
    ("pairwise forward*probs*", Budget(loads=2, stores=0)),
    ("pairwise backward*probs*", Budget(loads=2, stores=1)),
    ("pairwise forward*", Budget(registers=136, loads=24, stores=4)),
    ("pairwise backward*", Budget(loads=12, stores=10)),
    ("pairwise finish*", Budget(registers=64, stores=0)),
    ("ema-*", Budget(registers=64, loads=4, stores=2)),
    ("adamw-ema-bf16-*", Budget(registers=80, loads=5, stores=6)),
    ("adamw-ema-*", Budget(registers=80, loads=8, stores=6)),
    ("clip-sum-squares-*", Budget(registers=64, loads=4, stores=0)),
    ("clip-scale-*", Budget(registers=64, loads=4, stores=4)),
    ("multi_crop *", Budget(loads=2, stores=2)),
    # These work on a few values, of which none need be wide.
    ("adamw-prepare-*", Budget(registers=64, loads=0, stores=0)),
    ("adamw-decide-*", Budget(registers=64, loads=0, stores=0)),
    ("clip-norms*", Budget(registers=64, loads=0, stores=0)),
    ("clip-total-norm*", Budget(registers=64, loads=0, stores=0)),
    ("*", Budget()),
)


@dataclass(frozen=True)
class Compiled:
    """One case on one architecture, and why it fails, if it does."""

    case: str
    arch: int
    warps: int
    shared_bytes: int
    code: MachineCode
    problems: tuple[str, ...]


def shipped_modules() -> list[str]:
    """The modules that hold kernels."""
    files = sorted(Path(fastdino_kernels.__file__).parent.glob("*_triton.py"))
    return [f"fastdino_kernels.{file.stem}" for file in files]


def cases_of(modules: Iterable[str]) -> list[CompileCase]:
    """What these modules ship; an error where one ships nothing."""
    cases: list[CompileCase] = []
    for name in modules:
        found = list(importlib.import_module(name).compile_cases())
        if not found:
            raise RuntimeError(f"{name}.compile_cases() yields nothing")
        cases += found
    return cases


def budget_of(name: str) -> Budget:
    """The budget of the case of this name."""
    return next(budget for pattern, budget in BUDGETS if fnmatch.fnmatch(name, pattern))


def problems_of(code: MachineCode, shared_bytes: int, budget: Budget) -> list[str]:
    """Why a compiled kernel is not good enough to ship; empty where it is."""
    problems = []
    if code.stack:
        problems.append(f"spills {code.stack} bytes a thread")
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


def compile_case(case: CompileCase, arch: int, budget: Budget | None = None) -> Compiled:
    """Compile one case for one compute capability (90 is sm_90) and hold it to its budget."""
    names = list(case.signature)
    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature),
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
        "maxnreg": case.maxnreg,
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    code, shared = read_cubin(kernel.asm["cubin"]), kernel.metadata.shared
    problems = problems_of(code, shared, budget or budget_of(case.name))
    if code.fused and not case.fp_fusion:
        problems.append(f"{code.fused} fused multiply-adds, which round once and not twice")
    return Compiled(case.name, arch, kernel.metadata.num_warps, shared, code, tuple(problems))


def run_gates(cases: Iterable[CompileCase], archs: Sequence[int]) -> list[Compiled]:
    """Every case on every architecture."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels: unset it to compile them")
    return [compile_case(case, arch) for case in cases for arch in archs]


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{bits}:{counts[bits]}" for bits in sorted(counts, reverse=True)) or "-"


def table(results: Sequence[Compiled]) -> str:
    """The results as Markdown."""
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
    """compile_gates.md and .json."""
    versions = f"Triton {triton.__version__}"
    text = (
        "# The kernels, compiled ahead of time\n\n"
        f"Written by `make gates` with {versions}; no GPU took part. Registers and spills are a\n"
        "thread's. Loads and stores count the instructions on global memory, by their width in\n"
        f"bits a thread.\n\n{table(results)}\n"
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
    parser.add_argument("--modules", nargs="+", help="with compile_cases(); all that are shipped")
    parser.add_argument("--write", type=Path, help="folder for compile_gates.md and .json")
    options = parser.parse_args(arguments)
    results = run_gates(cases_of(options.modules or shipped_modules()), options.arch)
    print(table(results))
    if options.write:
        write(results, options.write)
    failed = [result for result in results if result.problems]
    for result in failed:
        print(f"{result.case} on sm_{result.arch}: {'; '.join(result.problems)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Registers, spills and widths of memory accesses of a compiled kernel.

cuobjdump and nvdisasm come with Triton's wheel, so no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
# A product without a rounding modifier may be fused by ptxas. FFMA and DFMA in the machine code do
# not tell: divisions consist of them.
_FUSED = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(?:fma(?:\.\w+)*|mul(?:\.ftz|\.sat)*)\.f(?:32|64)(?:x2)?\s", re.MULTILINE
)
_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
_LOADS = {"LDG", "LDGSTS"}
_STORES = {"STG"}
_LOCAL = {"LDL", "STL"}
_ATOMICS = {"ATOMG", "RED", "REDG"}
_BITS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True)
class MachineCode:
    """Registers per thread, and bytes of local memory per thread (stack), which only spills use.

    loads and stores count the instructions on global memory by their width in bits per thread.
    """

    registers: int
    stack: int
    cubin_bytes: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    local_accesses: int = 0
    float_atomics: int = 0
    fused: int = 0  # products and sums with one rounding; those inside divisions do not count


def read_cubin(cubin: bytes) -> MachineCode:
    """Return resource usage and instruction counts of a cubin with one kernel."""
    usage = _run("cuobjdump", cubin, "-res-usage")
    listing = _run("nvdisasm", cubin, "-c", "-ndf")  # only code; data flow takes longer
    resources = {name: int(value) for name, value in _RESOURCE.findall(usage)}
    return MachineCode(
        registers=resources["REG"],
        stack=resources["STACK"] + resources["LOCAL"],
        cubin_bytes=len(cubin),
        **count_instructions(listing),
    )


def instruction_listing(cubin: bytes) -> str:
    """Return nvdisasm's listing of a cubin with the instructions' encodings."""
    return _run("nvdisasm", cubin, "-c", "-ndf", "-hex")


def count_instructions(listing: str) -> dict[str, Any]:
    """Return the counts of MachineCode from nvdisasm's listing."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    local = atomics = 0
    for opcode in _OPCODE.findall(listing):
        name, *modifiers = opcode.split(".")
        if name in _LOADS:
            loads[_width(modifiers)] += 1
        elif name in _STORES:
            stores[_width(modifiers)] += 1
        elif name in _LOCAL:
            local += 1
        elif name in _ATOMICS:
            atomics += any(
                modifier.startswith(("F16", "F32", "F64", "BF16")) for modifier in modifiers
            )
    return {
        "loads": dict(loads),
        "stores": dict(stores),
        "local_accesses": local,
        "float_atomics": atomics,
    }


def count_fused(ptx: str) -> int:
    """Count the products and sums, fp32 and fp64, that are or may be rounded once."""
    return len(_FUSED.findall(ptx))


def _width(modifiers: list[str]) -> int:
    return next((_BITS[modifier] for modifier in modifiers if modifier in _BITS), 32)


def _run(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(TOOLS / tool), *options, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout

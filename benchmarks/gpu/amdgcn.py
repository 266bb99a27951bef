"""Registers, spills, widths of memory accesses and fused products of a kernel compiled for AMD.

They are read from the assembly that Triton's compiler writes, so no ROCm toolkit is needed.
"""

from __future__ import annotations

import re
from collections import Counter

from benchmarks.gpu.sass import MachineCode

_OPCODE = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)
_METADATA = re.compile(r"\.(\w+):\s+(\d+)\s*$", re.MULTILINE)
_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
_FLOAT_ATOMIC = re.compile(r"(?:global|buffer|flat)_atomic_(?:pk_)?(?:add|min|max)_b?f\d+")
_FUSED = re.compile(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_f(32|64)")
# How many fused products LLVM expands a correctly rounded division or square root into.
_EXPANDED = {
    "v_div_fixup_f32": 5,
    "v_div_fixup_f64": 5,
    "v_rsq_f64_e32": 7,
}


def read_amdgcn(assembly: str, binary_bytes: int) -> MachineCode:
    """Return the counts of a kernel from its AMD assembly, which ends with its metadata."""
    code, _, metadata = assembly.partition(".amdgpu_metadata")
    numbers = {name: int(value) for name, value in _METADATA.findall(metadata)}
    opcodes = Counter(_OPCODE.findall(code))
    return MachineCode(
        registers=numbers["vgpr_count"],
        # Spilled scalar registers go to lanes of vector registers and take no memory.
        stack=numbers["private_segment_fixed_size"] + 4 * numbers["vgpr_spill_count"],
        cubin_bytes=binary_bytes,
        loads=_widths(opcodes, "load"),
        stores=_widths(opcodes, "store"),
        local_accesses=_total(opcodes, re.compile(r"scratch_(?:load|store)")),
        float_atomics=_total(opcodes, _FLOAT_ATOMIC),
        fused=_total(opcodes, _FUSED)
        - sum(opcodes[name] * count for name, count in _EXPANDED.items()),
    )


def _total(opcodes: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(count for opcode, count in opcodes.items() if pattern.match(opcode))


def _widths(opcodes: Counter[str], direction: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        match = _ACCESS.match(opcode)
        if match and match[1] == direction:
            kind = next(name for name in _BITS if name in match[2])
            widths[_BITS[kind]] += count
    return dict(widths)

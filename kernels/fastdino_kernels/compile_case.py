"""What it takes to compile one shipped variant of a kernel ahead of time, with no GPU present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One variant, in the words of triton.compiler.ASTSource.

    signature names every argument in order: "*fp32", "*i64", "i32", "fp32", ..., or "constexpr";
    constexprs has the value of each of those; divisible names the arguments (pointers, integers)
    that the launch always passes as multiples of 16, as Triton's launcher would find.
    """

    name: str
    kernel: Any  # a function decorated with triton.jit; Triton may be absent, so not its type
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True  # products and sums may become one rounding
    maxnreg: int | None = None

"""The kernel package, but for its losses."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PACKAGE = "kernels/fastdino_kernels"

MUTANTS = (
    Mutant(
        f"{PACKAGE}/adamw_ema_optimizer.py",
        "self.momentum if momentum is None else momentum",
        "momentum or self.momentum",
    ),
    Mutant(
        f"{PACKAGE}/ema_triton.py",
        "(teacher | student | shadow) % 16",
        "(teacher | student) % 16",
        ("tests/test_ema.py",),
    ),
)

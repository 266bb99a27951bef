"""The kernel package."""

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
        f"{PACKAGE}/compat/solo_learn.py",
        "self.epoch if epoch is None else epoch",
        "epoch or self.epoch",
        ("tests/test_compat_solo_learn.py",),
    ),
    Mutant(
        f"{PACKAGE}/dino_module.py",
        "index_select(0, epoch.reshape(1))",
        "index_select(0, (epoch - 1).clamp(min=0).reshape(1))",
    ),
    Mutant(
        f"{PACKAGE}/ema_triton.py",
        "(teacher | student | shadow) % 16",
        "(teacher | student) % 16",
        ("tests/test_ema.py",),
    ),
)

"""The library that this package's operators are registered in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix, ops

__all__ = ["LIBRARY", "add_op_namespace_prefix", "ops", "register_fake"]

LIBRARY = torch.library.Library(ops.name, "FRAGMENT")


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Register the implementation of an operator for tensors without memory."""
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=LIBRARY)

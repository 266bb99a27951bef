"""The library that this package's operators are registered in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._ops import add_op_namespace_prefix, ops

__all__ = [
    "LIBRARY",
    "add_op_namespace_prefix",
    "keeps_graph",
    "needs_dispatcher",
    "ops",
    "register_fake",
]

_PLAIN_TYPES = {Tensor, nn.Parameter}

LIBRARY = torch.library.Library(ops.name, "FRAGMENT")


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Register the implementation of an operator for tensors without memory."""
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=LIBRARY)


def needs_dispatcher(tensors: Sequence[Tensor]) -> bool:
    """Return False if an operator's function can be called directly, which saves 5 us.

    That is so for plain tensors (not meta, fake, distributed, negative views, ...) while nothing
    traces or transforms the operations.
    """
    return (
        torch.compiler.is_compiling()
        or not set(map(type, tensors)) <= _PLAIN_TYPES
        or tensors[0].is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(map(Tensor.is_neg, tensors))
    )


def keeps_graph() -> bool:
    """Return True if another backward pass may follow the running one: with retain_graph=True."""
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keeps

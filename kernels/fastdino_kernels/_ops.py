"""Namespace of the operators of this copy of the package.

The names are those of Hugging Face's kernel builder, which replaces this file: a copy from the Hub
registers its operators under a name of its own, so that it can be loaded next to this one.
"""

import torch

_NAME = "fastdino_kernels"
ops = getattr(torch.ops, _NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the qualified name of an operator, as torch.library expects it."""
    return f"{_NAME}::{op_name}"

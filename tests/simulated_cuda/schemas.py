"""The tensors that an operation of PyTorch reads and writes, and its waits, by schema and name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operations whose result has a size, or is a number, that the host must read from the device.
_WAITING = {
    "_local_scalar_dense", "argwhere", "bincount", "equal", "is_nonzero", "linalg_eigh",
    "linalg_svd", "masked_select", "nonzero", "unique_consecutive", "unique_dim", "_unique2",
}  # fmt: skip
# Operations that take the value of a 0-d CPU tensor, in addition to those tagged "pointwise".
TAKES_HOST_SCALARS = {"copy_", "fill_", "index_put_", "masked_fill", "masked_fill_", "where"}
TAKES_HOST_INDICES = {"index", "index_put", "index_put_"}


def device_of(leaves: Sequence[Any]) -> torch.device:
    return next(x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda)


def returns_view(func: Any) -> bool:
    returns = func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return view or func in (aten._unsafe_view.default, aten._reshape_alias.default)


def arguments_of(func: Any, args: Any, kwargs: Any, *, written: bool) -> list[Tensor]:
    """Return the tensors that an operation reads, or that it writes."""
    selected = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if value is not None and writes == written:
            selected += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return selected


def written_results(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the arguments that an in-place operation returns; None if its results are fresh."""
    returns = func._schema.returns
    if not returns or any(r.alias_info is None for r in returns):
        return None
    values = []
    for result in returns:
        for i, argument in enumerate(func._schema.arguments):
            alias = argument.alias_info
            if alias is not None and alias.after_set == result.alias_info.after_set:
                values.append(args[i] if i < len(args) else kwargs[argument.name])
    return values[0] if len(values) == 1 else tuple(values)


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    name = func._schema.name.partition("::")[2]
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in TAKES_HOST_INDICES:
        masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        scalar = name != "index" and args[2].numel() == 1
        return not scalar and any(x.dtype in (torch.bool, torch.uint8) for x in masks)
    return name in _WAITING

"""Lists of tensors as arguments: their checks, and the tables of those that Triton takes.

Tensors of the same index belong together. Triton takes the lists of a call if all tensors are on
one device and those that belong together are dense with equal strides; else PyTorch takes all of
them. Checks and tables are cached by what they depend on: addresses, dtypes, sizes, layouts and
missing tensors, read again by each call (a quarter of a microsecond of host time per tensor).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import (
    FLOAT_DTYPES,
    check_float_tensor,
    check_memory,
    check_same_device,
    check_same_shape,
)
from .dispatch import choose_impl
from .memory import are_flat
from .pointer_table import Chunks, Pointers, make_chunks, make_pointers, thread_cache

Some = Sequence["Tensor | None"]
Lists = Mapping[str, Some]  # by the argument's name, or its form, as "parameters[].grad"

_PLAIN_TYPES = {Tensor, nn.Parameter}
_NONE = type(None)
dtype_of: Callable[[Tensor], torch.dtype] = Tensor.dtype.__get__  # type: ignore[attr-defined]
device_of: Callable[[Tensor], torch.device] = Tensor.device.__get__
_layout_of: Callable[[Tensor], torch.layout] = Tensor.layout.__get__  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of lists that Triton takes."""

    chunks: Chunks
    pointers: Pointers


def present(lists: Iterable[Some]) -> list[Tensor]:
    """Return all tensors of some lists."""
    return [tensor for some in lists for tensor in some if tensor is not None]


def by_dtype(tensors: Some) -> list[tuple[list[int], list[Tensor]]]:
    """Return (indices, tensors) that one multi-tensor operation can process at once."""
    groups: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            indices, group = groups.setdefault(tensor.dtype, ([], []))
            indices.append(index)
            group.append(tensor)
    return list(groups.values())


def are_plain(lists: Iterable[Sequence[object]]) -> bool:
    """Return True if all are plain tensors or None: no subclass (fake, distributed, ...)."""
    return all(set(map(type, some)) - {_NONE} <= _PLAIN_TYPES for some in lists)


def are_traced(lists: Iterable[Some]) -> bool:
    """Return True under torch.compile, and for tensors that have no memory of their own."""
    if torch.compiler.is_compiling():
        return True
    lists = list(lists)
    first = next((tensor for some in lists for tensor in some if tensor is not None), None)
    return not are_plain(lists) or (first is not None and first.is_meta)


def holes(some: Some) -> tuple[int, ...]:
    """Return the indices without a tensor."""
    if _NONE not in set(map(type, some)):
        return ()
    return tuple(i for i, tensor in enumerate(some) if tensor is None)


def key_of(lists: Iterable[Some]) -> Hashable | None:
    """Return what checks and tables depend on; None if a tensor has no address.

    Contiguous tensors of one size are alike in memory, whatever their shape.
    """
    lists = list(lists)
    gaps = tuple(map(holes, lists))
    # `present` takes longer.
    tensors: list[Any] = list(itertools.chain(*lists)) if not any(gaps) else present(lists)
    try:
        pointers = tuple(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # a sparse tensor
        return None
    simple = all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors))
    return (
        pointers,
        tuple(map(dtype_of, tensors)),
        tuple(map(Tensor.numel, tensors)),
        None if simple else tuple((t.shape, t.stride(), t.is_neg()) for t in tensors),
        gaps,
        tuple(map(len, lists)),
    )


def tables_for(lists: Lists, written: int, impl: str, kernels: str) -> Tables | None:
    """Check lists of tensors; return their tables, or None if PyTorch takes them. Both are cached.

    Args:
        lists: of one length, with at least one tensor in the first.
        written: number of lists that are written, which are the first.
        impl: as in choose_impl.
        kernels: the module of the kernels, whose CHUNK elements are one program's.

    Raises: TypeError, ValueError: as check_lists and check_no_overlap; `impl` cannot run.
    """
    first, *_ = roles = list(lists.values())
    one = next(tensor for tensor in first if tensor is not None)

    def make() -> Tables | None:
        check_lists(lists)
        check_no_overlap(lists, written)
        if choose_impl(impl, present(roles)) == "torch" or not triton_takes(roles):
            return None
        numels = tuple(0 if tensor is None else tensor.numel() for tensor in first)
        chunk = importlib.import_module(kernels, __package__).CHUNK
        return Tables(cached_chunks(numels, chunk, one.device), make_pointers(roles, one.device))

    if (key := key_of(roles)) is None:
        return make()
    key = tuple(lists), impl, choose_impl(impl, [one]), key
    tables: Tables | None = thread_cache(next(iter(lists))).get(key, one.device, make)
    return tables


def cached_chunks(numels: Sequence[int], chunk: int, device: torch.device) -> Chunks:
    """Return make_chunks(...), from this thread's cache: sizes change less often than addresses."""
    key = tuple(numels), chunk, device
    chunks: Chunks = thread_cache("chunks").get(key, device, lambda: make_chunks(*key))
    return chunks


def triton_takes(lists: Sequence[Some]) -> bool:
    """Return True if all tensors are on one device and the lists are flat, index by index."""
    tensors = present(lists)
    if len(set(map(device_of, tensors))) > 1 or any(map(Tensor.is_neg, tensors)):
        return False
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    together = ([t for t in some if t is not None] for some in zip(*lists))
    return all(are_flat(some) for some in together if some)


def label(name: str, index: int) -> str:
    """Return the name of one tensor of a list."""
    return name.replace("[]", f"[{index}]") if "[]" in name else f"{name}[{index}]"


def check_lists(lists: Lists) -> None:
    """Check types, and shapes and devices against the first list's; no memory is read.

    Raises: TypeError, ValueError: the message has the tensors' names.
    """
    (first, references), *_ = lists.items()
    for name, some in lists.items():
        if _all_fit(references, some):
            continue
        for i, (reference, tensor) in enumerate(zip(references, some)):
            if tensor is not None:
                check_float_tensor(label(name, i), tensor)
                assert reference is not None
                check_same_shape(label(first, i), reference, label(name, i), tensor)
                check_same_device(label(first, i), reference, label(name, i), tensor)


def _all_fit(references: Some, some: Some) -> bool:
    """Return True if check_lists accepts the tensors, quickly; False if that is not certain."""
    if torch.compiler.is_compiling() or not are_plain([references, some]):
        return False
    pairs = [(r, t) for r, t in zip(references, some) if t is not None]
    xs, ys = zip(*pairs) if pairs else ((), ())
    return (
        set(map(dtype_of, ys)) <= set(FLOAT_DTYPES)
        and set(map(_layout_of, ys)) <= {torch.strided}
        and list(map(Tensor.size, xs)) == list(map(Tensor.size, ys))
        and list(map(device_of, xs)) == list(map(device_of, ys))
    )


def check_no_overlap(lists: Lists, written: int) -> None:
    """Raise ValueError if writing to the first lists would change other values as well."""
    named = [
        (label(name, i), tensor)
        for name, some in lists.items()
        for i, tensor in enumerate(some)
        if tensor is not None
    ]
    check_memory(named, written=len(present(list(lists.values())[:written])))

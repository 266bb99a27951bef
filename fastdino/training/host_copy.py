"""Copies of a training state in host memory, which later steps do not change."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdino.checkpoint import local_part
from fastdino.host_memory import available_memory

Place = tuple[Hashable, ...]  # the keys that lead to a tensor


class HostCopy:
    """Copies nested dicts, lists and tuples of tensors into buffers that the next copy reuses.

    It copies only this rank's shard of a sharded tensor.

    The buffers of tensors on a GPU are pinned, and filled in the order of the current stream: what
    is queued later may change the tensors, and the host does not wait.
    """

    def __init__(self) -> None:
        self._buffers: dict[Place, Tensor] = {}
        self._filled: torch.cuda.Event | None = None

    def copy(self, state: Any) -> Any:
        """Return `state` with contiguous copies of its tensors, valid until the next call.

        The copies may be read after `wait`.

        Raises: MemoryError, RuntimeError: not enough host memory; all buffers are freed.
        """
        try:
            self._reserve(state)
            with torch.no_grad():
                copied = self._copy(state, ())
        except (MemoryError, RuntimeError):
            self.clear()
            raise
        self._filled = None
        if any(tensor.is_cuda for _, tensor in tensors_of(state)):
            self._filled = torch.cuda.Event()
            self._filled.record()
        return copied

    def clear(self) -> None:
        """Free the buffers that no copy refers to."""
        self._buffers.clear()

    def wait(self) -> None:
        """Wait until the last copy is complete."""
        if self._filled is not None:
            self._filled.synchronize()

    def _reserve(self, state: Any) -> None:
        """Allocate the buffers; drop those of tensors that the state has no more."""
        old, self._buffers = self._buffers, {}
        missing = []
        for place, tensor in tensors_of(state):
            tensor = local_part(tensor)
            buffer = old.get(place)
            if buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
                self._buffers[place] = buffer
            else:
                missing.append((place, tensor))
        del old
        needed, available = sum(tensor.nbytes for _, tensor in missing), available_memory()
        if needed > available:
            raise MemoryError(f"{needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB available")
        for place, tensor in missing:
            self._buffers[place] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )

    def _copy(self, value: Any, place: Place) -> Any:
        if isinstance(value, Tensor):
            buffer = self._buffers[place].copy_(local_part(value), non_blocking=True)
            return _with_shard(value, buffer) if isinstance(value, DTensor) else buffer
        if isinstance(value, dict):
            copied = copy.copy(value)  # of the same type, with its attributes
            copied.update((key, self._copy(item, (*place, key))) for key, item in value.items())
            return copied
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, (*place, i)) for i, item in enumerate(value))
        return value


def tensors_of(value: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors of nested dicts, lists and tuples with their keys."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, (*place, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_of(item, (*place, i))


def _with_shard(tensor: DTensor, shard: Tensor) -> Tensor:
    """Return a sharded tensor like `tensor` whose shard on this rank may be on another device."""
    names, layout = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names} | {"_local_tensor": shard}
    return DTensor.__tensor_unflatten__(parts, layout, tensor.shape, tensor.stride())

"""The device "meta" in place of a GPU, so that calls can be launched, and recorded, without one.

Tensors on it have a device, strides and an address, but no memory, and operations on them compute
nothing. So a call costs only its host code, and mistakes that need a GPU to be seen fail here:

- a tensor that was left on the CPU, in a kernel's argument or in a table of addresses;
- a value that is read back on the host, which would wait for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from fastdino_kernels import dispatch
from fastdino_kernels.operators import ops
from torch import Tensor

GPU = torch.device("meta")

_SPACING = 1 << 32  # bytes from one storage to the next: more than any call's tensors take


@contextmanager
def emulated_gpu() -> Iterator[torch.device]:
    """Give the tensors of a device addresses, and run this package's operators on them.

    Yields: the device. Also sets FASTDINO_KERNELS=triton, for functions without `impl`.
    """
    with (
        _operators_as_on_a_gpu(),
        mock.patch.object(Tensor, "data_ptr", _addresses()),
        mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "triton"}),
    ):
        yield GPU


def _addresses() -> Callable[[Tensor], int]:
    """Return a replacement of Tensor.data_ptr, which is 0 for all tensors without memory."""
    numbers: dict[int, int] = {}

    def data_ptr(tensor: Tensor) -> int:
        if tensor.device != GPU:
            raise ValueError(
                f"a GPU cannot use the address of a tensor on {tensor.device}: expected all "
                f"tensors of a launch on {GPU}, got one of shape {tuple(tensor.shape)}"
            )
        if tensor.numel() == 0:
            return 0
        number = numbers.setdefault(tensor.untyped_storage()._cdata, len(numbers) + 1)
        return number * _SPACING + int(tensor.storage_offset()) * tensor.element_size()

    return data_ptr


@contextmanager
def _operators_as_on_a_gpu() -> Iterator[None]:
    """Replace the operators' fake implementations by those that launch kernels."""
    prefix = f"{ops.name}::"
    names = [
        name.removeprefix(prefix)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(prefix)
    ]
    with torch.library._scoped_library(ops.name, "IMPL") as library:
        for name in names:
            launching = _launching(getattr(ops, name).default)
            library.impl(name, launching, "Meta", allow_override=True)
        yield


def _launching(operator: Any) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *arguments, **options: operator.redispatch(keys, *arguments, **options)

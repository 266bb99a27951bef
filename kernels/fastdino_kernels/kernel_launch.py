"""Launches that skip Triton's specialisation if an earlier one was the same.

Triton inspects every argument of a launch to find the kernel compiled for its types, alignment and
constants, which takes 8 us of host time. A caller that knows what these depend on passes it as a
`signature`; a compiled kernel is then called directly, in 2 us.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_CACHED = 1024  # compiled kernels by signature; all are forgotten if there are more
_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    signature: Hashable,
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    **options: Any,
) -> None:
    """Do kernel[grid](*arguments, **constants, **options).

    Args:
        kernel: a function of triton.jit, interpreted or not.
        grid: programs in each dimension.
        signature: everything else that the arguments' types, the alignment of their addresses and
            their divisibility depend on, such as dtypes, shapes and strides.
        arguments, constants: all of the kernel's parameters, in their order.
        options: options of the compiler.
    """
    if type(kernel) is not JITFunction or kernel.pre_run_hooks:
        kernel[grid](*arguments, **constants, **options)
        return
    values = tuple(constants.values())
    # The device is the current one; a driver that compiles for another machine has its own.
    device = driver.active.get_current_device()
    key = (kernel.fn, device, signature, values, *options.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *values)
        return
    assert kernel.arg_names[len(arguments) :] == list(constants), "parameters out of order"
    compiled = kernel[grid](*arguments, **constants, **options)
    if len(_compiled) >= _CACHED:
        _compiled.clear()
    _compiled[key] = compiled


def alignment(*values: Any) -> tuple[int | None, ...]:
    """Return each tensor's address modulo 16, which decides how wide its loads are; else None."""
    return tuple([v.data_ptr() & 15 if isinstance(v, Tensor) else None for v in values])

"""NumPy values in pickles, rebuilt from checked bytes instead of by NumPy's own functions.

Those trust the state of a dtype, through which a crafted file makes NumPy follow any address.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers, booleans and text; neither objects nor fields.
_CODE = re.compile(r"[biuf][1248]|\?|c(?:8|16)|[US]\d{1,4}")


class PlainDtype:
    """Stands in for numpy.dtype in a pickle; refuses everything but numbers, booleans and text.

    Raises: ValueError: objects, fields, dates, or a size beyond what a name or a number needs.
    """

    def __init__(self, code: str, *_flags: object) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ValueError(f"a NumPy dtype {code!r:.40}, expected numbers or text")
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        """Take the byte order of numpy.dtype's state, in which all else must be empty."""
        order, *structure = state[1:5]
        if order not in (*"<>|=",) or structure != [None, None, None] or len(state) > 8:
            raise ValueError(f"a NumPy dtype {self._code} with fields, expected numbers or text")
        self._order = "=" if order == "|" else order

    def resolve(self) -> np.dtype[Any]:
        """Return the dtype."""
        return np.dtype(self._code).newbyteorder(self._order)  # type: ignore[arg-type]


def scalar(dtype: PlainDtype, data: bytes | str = b"") -> Any:
    """Rebuild a NumPy scalar; Python 2 pickles hold its bytes as text."""
    return _array(dtype, data, ()).reshape(1)[0]


def frombuffer(data: bytes, dtype: PlainDtype, shape: tuple[int, ...], order: str) -> NDArray[Any]:
    """Rebuild an array from a pickle of protocol 5."""
    return _array(dtype, data, shape, order)


def reconstruct(_type: object, _shape: object, _code: object) -> PlainArray:
    """Return the empty array that older protocols fill in by __setstate__."""
    return np.empty(0).view(PlainArray)


class PlainArray(np.ndarray):
    """An array whose content comes from checked bytes."""

    def __setstate__(self, state: Any) -> None:
        """Fill in the content: (version, shape, dtype, is Fortran order, data)."""
        _, shape, dtype, fortran, data = state
        checked: Any = _array(dtype, data, shape, "F" if fortran else "C").__reduce__()[2]
        super().__setstate__(checked)


def _array(
    dtype: PlainDtype, data: bytes | str, shape: tuple[int, ...], order: str = "C"
) -> NDArray[Any]:
    if not isinstance(dtype, PlainDtype):
        raise ValueError(f"a {type(dtype).__name__} in place of a NumPy dtype")
    kind, content = dtype.resolve(), data.encode("latin1") if isinstance(data, str) else bytes(data)
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"a NumPy array of shape {shape!r:.40}")
    if len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"a NumPy array of shape {shape!r:.40} in {len(content)} bytes")
    return np.frombuffer(content, kind).reshape(shape, order=order)  # type: ignore[call-overload]

"""Changes of Triton's interpreter for the tests: it rounds as GPUs do, and is faster."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


def patch_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply all changes, if Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    _round_to_bf16(interpreter, monkeypatch)
    _patch_language_once_per_launch(interpreter, monkeypatch)
    _compute_no_unused_checks(interpreter, monkeypatch)
    _cache_types(interpreter, monkeypatch)
    _skip_equal_types(interpreter, monkeypatch)


def _round_to_bf16(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round fp32 to bf16 as GPUs do; the interpreter truncates."""
    convert = interpreter._convert_float

    def rounding(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        floats = torch.from_numpy(np.array(values).view(np.float32))
        return floats.bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


def _patch_language_once_per_launch(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace triton.language once per launch and module, not for each call of a device function.

    A launch replaces the functions of the language by interpreted ones, and restores them at its
    end. A call of a device function inspects the whole language to do so again, which takes more
    time than most such functions.
    """
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # global names of modules, by their identity
    nothing = SimpleNamespace(restore=lambda: None)

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return nothing
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return call(executor, *args, **kwargs)
        finally:
            patched.clear()  # for launches of other threads: all is restored now

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


def _compute_no_unused_checks(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check of integers for overflow, which only the option `debug` would report."""
    semantic = type(interpreter.interpreter_semantic)
    check = semantic.binary_op_sanitize_overflow_impl

    def check_if_reported(self: Any, *operands: Any) -> None:
        if self.builder.options.debug:
            check(self, *operands)

    monkeypatch.setattr(semantic, "binary_op_sanitize_overflow_impl", check_if_reported)


def _cache_types(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the types of blocks, their shapes and NumPy's dtypes once for equal arguments."""
    core = importlib.import_module("triton.language.core")
    new_block, new_tensor = core.block_type.__init__, core.tensor.__init__
    find_dtype = interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            new_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def dtype_of(type: Any) -> Any:
        name = type.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(type)
        return dtypes[name]

    monkeypatch.setattr(core.block_type, "__init__", block)
    monkeypatch.setattr(core.tensor, "__init__", tensor)
    monkeypatch.setattr(interpreter, "_get_np_dtype", dtype_of)


def _skip_equal_types(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return operands as they are if their shapes, or the dtype of a cast, are equal already."""
    semantic = type(interpreter.interpreter_semantic)
    broadcast, cast = semantic.broadcast_impl_value, semantic.cast

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        blocks = left.is_block(), right.is_block()
        if not any(blocks) or (all(blocks) and left.shape.values == right.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_if_needed(self: Any, value: Any, dtype: Any, rounding: Any = None) -> Any:
        if rounding is None and value.type.scalar is dtype.scalar:
            return value
        return cast(self, value, dtype, rounding)

    monkeypatch.setattr(semantic, "broadcast_impl_value", broadcast_if_needed)
    monkeypatch.setattr(semantic, "cast", cast_if_needed)

"""Changes of Triton's interpreter for the tests: it rounds as GPUs do, and is twice as fast."""

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

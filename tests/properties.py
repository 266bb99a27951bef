"""hypothesis, or stand-ins that skip its tests if it is not installed."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import given as given
    from hypothesis import settings as settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _NoStrategies:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: self

    def given(*args: Any, **kwargs: Any) -> Any:
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*args: Any, **kwargs: Any) -> Any:
        return lambda test: test

    st = _NoStrategies()

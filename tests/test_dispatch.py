"""Which implementation of a kernel runs, and why Triton's cannot."""

from __future__ import annotations

import pytest
from fastdino_kernels import dispatch
from fastdino_kernels.dispatch import triton_problem


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """A folder that is all of PATH; no CC."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    dispatch._compiler_problem.cache_clear()
    yield tmp_path
    dispatch._compiler_problem.cache_clear()


def test_triton_on_a_gpu_needs_a_c_compiler(compilers):
    assert "a C compiler: install gcc or clang, or" in triton_problem("cuda")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_either_compiler_will_do(compilers, name):
    (compilers / name).touch(mode=0o755)
    assert triton_problem("cuda") is None


def test_a_compiler_may_be_named(compilers, monkeypatch):
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton_problem("cuda") is None


def test_the_interpreter_needs_none(compilers, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_problem("cpu") is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "Triton needs CUDA tensors" in triton_problem("cpu")

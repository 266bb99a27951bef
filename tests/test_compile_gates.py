"""The gates of ahead-of-time compilation: what ships passes them, and what is slow does not.

In processes of their own: under the interpreter, which the other tests use, nothing compiles.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent

BAD_KERNELS = '''
import triton
import triton.language as tl
from fastdino_kernels.compile_case import CompileCase


@triton.jit
def rows(x, y, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr, FUSED: tl.constexpr):
    """A whole row at once, so the registers of a few warps may not hold it."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(x + columns, mask=columns < n, other=float("-inf"))
    if FUSED:
        row = tl.fma(row, row, row)
    row = row - tl.max(row, 0)
    if ATOMIC:
        tl.atomic_add(y + columns, row, mask=columns < n)
    else:
        tl.store(y + columns, row * tl.sum(row, 0), mask=columns < n)


def case(name, block=1024, atomic=False, divisible=("x", "y", "n"), fused=False):
    return CompileCase(
        name=name,
        kernel=rows,
        signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr",
                   "ATOMIC": "constexpr", "FUSED": "constexpr"},
        constexprs={"BLOCK": block, "ATOMIC": atomic, "FUSED": fused},
        divisible=divisible,
        num_warps=1,
        fp_fusion=False,
    )


def compile_cases():
    yield case("good")
    yield case("spilling", block=8192)
    yield case("narrow", divisible=())
    yield case("unordered", atomic=True)
    yield case("greedy", block=4096)
    yield case("fused", fused=True)
'''


def run_gates(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "kernels", ROOT, path)))
    command = [sys.executable, "-m", "benchmarks.gpu.compile_gates", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def rows_of(output: str) -> dict[str, str]:
    """Name of each case -> the last cell of its row."""
    rows = [line.strip("| ").split(" | ") for line in output.splitlines()]
    return {cells[0]: cells[-1] for cells in rows if len(cells) == 10}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "arch", [pytest.param("80", marks=slow), "90", pytest.param("100", marks=slow)]
)
def test_every_shipped_kernel_passes_the_gates(arch):
    if Version(triton.__version__) < Version("3.7"):
        pytest.skip("3.6 takes 10 registers more for the loss than its budget")
    done = run_gates("--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(list(rows_of(done.stdout).values())[1:]) == {"ok"}


def test_the_gates_refuse_what_would_be_slow_or_inexact(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS, encoding="utf-8")
    done = run_gates(
        "--arch", "90", "--modules", "bad_kernels", "--write", str(tmp_path), path=tmp_path
    )
    assert done.returncode == 1, done.stderr
    verdicts = rows_of(done.stdout)
    assert verdicts["good"] == "ok"
    assert "spills" in verdicts["spilling"]
    assert "local memory" in verdicts["spilling"]
    assert "0 loads of 128 bits" in verdicts["narrow"]
    assert "0 stores of 128 bits" in verdicts["narrow"]
    assert "atomic additions of floats" in verdicts["unordered"]
    assert "registers, the budget is 128" in verdicts["greedy"]
    assert "fused multiply-adds" in verdicts["fused"]
    assert rows_of((tmp_path / "compile_gates.md").read_text(encoding="utf-8")) == verdicts


def test_kernels_that_would_be_interpreted_are_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from benchmarks.gpu import compile_gates

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_gates.run_gates([], [90])

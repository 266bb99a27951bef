"""The gates of ahead-of-time compilation pass the shipped kernels and refuse slow or inexact ones.

They run in a process of their own: under the interpreter, which the other tests use, nothing is
compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

compile_gates = importlib.import_module("benchmarks.gpu.compile_gates")

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_90", "gfx942")

BAD_KERNELS = '''
from functools import partial

import torch
import triton
import triton.language as tl


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


@triton.jit
def polynomial(x, y, BLOCK: tl.constexpr, FUSED: tl.constexpr):
    """Products and sums in fp64, with a division and a root, which consist of fused products."""
    columns = tl.arange(0, BLOCK)
    z = tl.load(x + columns).to(tl.float64)
    numerator = tl.fma(z, z, z) if FUSED else z * z + z
    z = numerator / tl.sqrt(z)
    tl.store(y + columns, z.to(tl.float32))


def call(device, block=1024, first=0, fusion=False, num_warps=1, **options):
    x, y = (torch.zeros(block + 16, device=device)[first:] for _ in range(2))
    flags = {"ATOMIC": False, "FUSED": False} | options
    rows[(1,)](x, y, block, block, **flags, num_warps=num_warps, enable_fp_fusion=fusion)


def call_polynomial(device, fused):
    x, y = torch.zeros(256, device=device), torch.zeros(256, device=device)
    polynomial[(1,)](x, y, 256, fused, num_warps=1, enable_fp_fusion=False)


def kernel_calls():
    yield "good", call
    yield "spilling", partial(call, block=1 << 17, num_warps=16)
    yield "narrow", partial(call, first=1)
    yield "unordered", partial(call, ATOMIC=True)
    yield "greedy", partial(call, block=4096)
    yield "fused", partial(call, FUSED=True)
    yield "allowed to fuse", partial(call, FUSED=True, fusion=True)
    yield "separate fp64", partial(call_polynomial, fused=False)
    yield "fused fp64", partial(call_polynomial, fused=True)
'''


def run_gates(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "kernels", ROOT, path)))
    command = [sys.executable, "-m", "benchmarks.gpu.compile_gates", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def rows_of(output: str) -> dict[tuple[str, str], str]:
    """Map the name and the target of each case to the last cell of its row."""
    rows = [line.strip("| ").split(" | ") for line in output.splitlines()]
    return {(cells[0], cells[1]): cells[-1] for cells in rows if len(cells) == 10}


@pytest.mark.slow  # make gates does the same
def test_every_shipped_kernel_passes_the_gates():
    done = run_gates()
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(rows_of(done.stdout).values()) == {"ok"}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[tuple[str, str], str]:
    """The last cell of each row of the table of BAD_KERNELS."""
    folder = tmp_path_factory.mktemp("gates")
    (folder / "bad_kernels.py").write_text(BAD_KERNELS, encoding="utf-8")
    done = run_gates(
        "--arch", "90", "gfx942", "--calls", "bad_kernels", "--write", str(folder), path=folder
    )
    assert done.returncode == 1, done.stderr
    rows = rows_of(done.stdout)
    version = ".".join(triton.__version__.split(".")[:2])
    table = (folder / f"compile_gates_triton_{version}.md").read_text(encoding="utf-8")
    assert f"Triton {triton.__version__}" in table
    assert rows_of(table) == rows
    record = json.loads((folder / f"compile_gates_triton_{version}.json").read_text("utf-8"))
    assert [(result["case"], result["target"]) for result in record["results"]] == list(rows)
    return rows


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("rows, spilling", "spills"),
        ("rows, spilling", "local memory"),
        ("rows, narrow", "0 loads of"),
        ("rows, narrow", "0 stores of"),
        ("rows, unordered", "atomic additions of floats"),
        ("rows, greedy", "registers, the budget is"),
        ("rows, fused", "fused multiply-adds"),
        ("polynomial, fused fp64", "fused multiply-adds"),
    ],
)
def test_slow_and_inexact_kernels_are_refused(verdicts, case, problem, target):
    assert problem in verdicts[case, target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "case", ["rows, good", "rows, allowed to fuse", "polynomial, separate fp64"]
)
def test_good_kernels_pass(verdicts, case, target):
    assert verdicts[case, target] == "ok"


def test_unknown_architecture_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        compile_gates.main(["--arch", "75"])
    assert error.value.code == 2
    assert "expected one of 80, 90, 100, gfx942, got 75" in capsys.readouterr().err

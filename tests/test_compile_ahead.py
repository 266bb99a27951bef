"""benchmarks.gpu.compile_ahead: kernels compiled by one process are found by another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.comparison import Baseline, Comparison
from benchmarks.gpu import compile_ahead, gpu_report

pytest.importorskip("triton")

# A launch of each kind of call, in one of two processes that share them. Then once more in another
# process: both are forks of one that has the imports and compiles nothing.
FEW = """
import json, os
from benchmarks.gpu import compile_ahead
calls = [call for call in compile_ahead.calls() if "multi_crop" not in str(call)]
few = [next(call for call in calls if name in str(call)) for name in ("_patch_loss", "clip")]
few.append(calls[-1])
compile_ahead.calls = lambda: iter(few)
for _ in range(2):
    if os.fork() == 0:
        shares = [compile_ahead.compile_share(index, 2, 90) for index in range(2)]
        print(json.dumps(shares), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_a_second_process_compiles_nothing(tmp_path):
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        (sys.executable, "-c", FEW), env=environment, capture_output=True, text=True, check=True
    )
    shares = [json.loads(line) for line in done.stdout.splitlines()]
    compiled, cached = (sum(column) for column in zip(*shares[0], strict=True))
    assert compiled >= 5  # the loss and AdamW have three kernels, the clip at least one
    assert all(compiled for compiled, _ in shares[0])  # both shares have work
    assert [tuple(share) for share in shares[1]] == [(0, sum(share)) for share in shares[0]], (
        "kernels were compiled again"
    )
    assert compiled + cached == sum(sum(share) for share in shares[1])


def test_every_suite_and_kernel_is_compiled(monkeypatch):
    ran = []
    monkeypatch.setattr(compile_ahead, "run_ours", ran.append)
    calls = list(compile_ahead.calls())
    names = {name for name, _ in compile_ahead.kernel_calls()}
    assert len(calls) > len(names)
    for call in compile_ahead.suite_calls():
        call()
    made = {str(call.func.__module__) for call in ran}
    suites = {file.removesuffix(".py").replace("/", ".") for file in gpu_report.suites()}
    assert made == suites - {"benchmarks.bench_overhead"}  # the same kernels on tiny inputs


def test_only_our_baselines_are_called():
    called = []
    baselines = [
        Baseline(name, lambda name=name: lambda: called.append(name), role=role)
        for name, role in (("the paper's", "paper"), ("ours", "ours"), ("torch", ""))
    ]
    compile_ahead.run_ours(lambda: Comparison("x", baselines))
    assert called == ["ours"]


def test_without_a_gpu_an_h100s_architecture_is_compiled():
    if torch.cuda.is_available():
        pytest.skip("a GPU decides")
    assert compile_ahead.device_arch() == 90


def test_an_unknown_architecture_is_compiled_when_it_is_used(capsys):
    assert compile_ahead.main(["--arch", "61"]) == 0
    assert "not compiled ahead: sm_61 is none of 80, 90" in capsys.readouterr().out

"""The loss's forward pass keeps what its speed depends on, as far as machine code shows it.

In a process of its own: under the interpreter, which the other tests use, nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def test_forward_pass_is_one_wave_near_its_floor(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "kernels", ROOT)))
    command = [sys.executable, "-m", "benchmarks.gpu.predict", "bf16 S10 K65536"]
    done = subprocess.run(
        [*command, "--write", str(tmp_path)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "predictions.json").read_text("utf-8"))
    assert "not measured" in record["note"]
    assert "not measured" in (tmp_path / "predictions.md").read_text("utf-8")
    kernels = {p["kernel"]: p for p in record["predictions"]}
    forward, backward = kernels["pairwise_forward_kernel"], kernels["pairwise_backward_kernel"]
    assert forward["spilled_bytes"] == backward["spilled_bytes"] == 0
    assert forward["waves"] <= 1
    assert sum(forward["instructions"].values()) < 13
    for kernel, factor in ((forward, 1.4), (backward, 1.15)):
        assert kernel["floor"]["H200"] < kernel["time"]["H200"] < factor * kernel["floor"]["H200"]

"""Every kernel can be launched: Triton's launch path binds its arguments and compiles it.

Launches are recorded by a driver that needs no GPU, in a process without the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fastdino_kernels
import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
KERNELS = Path(fastdino_kernels.__file__).parent

LAUNCH_EVERYTHING = """
from benchmarks.gpu.kernel_calls import kernel_calls
from benchmarks.gpu.recording_driver import record_launches

with record_launches(90) as launches:
    for name, call in kernel_calls():
        call()
print(*sorted({launch.kernel for launch in launches}))
"""

LAUNCH_RESERVED_NAME = """
import torch
import triton
import triton.language as tl
from benchmarks.gpu.recording_driver import record_launches

@triton.jit
def reserved_kernel(params):
    tl.store(params, 0)

with record_launches(90):
    reserved_kernel[(1,)](torch.zeros(16))
"""


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script from a file, whose source Triton can read, without the interpreter."""
    file = folder / "script.py"
    file.write_text(script, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "kernels", ROOT)))
    command = [sys.executable, str(file)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_public_functions_launch_every_kernel(tmp_path):
    sources = "".join(file.read_text("utf-8") for file in KERNELS.glob("*_triton.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)
    done = run_script(tmp_path, LAUNCH_EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(kernels)


def test_argument_name_that_the_launcher_reserves_is_an_error(tmp_path):
    done = run_script(tmp_path, LAUNCH_RESERVED_NAME)
    assert done.returncode != 0
    assert "failed to specialize argument of type: dict" in done.stderr


def test_interpreted_kernels_cannot_be_recorded(monkeypatch):
    from benchmarks.gpu.recording_driver import record_launches

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), record_launches(90):
        pass

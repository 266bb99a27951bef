"""The command on a benchmark's page has the variables and arguments that it was started with."""

from __future__ import annotations

import json

import pytest

from benchmarks import save_times
from benchmarks.command_line import VARIABLES, command_line


@pytest.mark.parametrize(
    ("variables", "prefix"),
    [
        ({}, ""),
        ({"OMP_NUM_THREADS": ""}, ""),
        ({"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS=1 "),
        ({"OMP_NUM_THREADS": "2,1", "TRITON_INTERPRET": "1"},
         "OMP_NUM_THREADS=2,1 TRITON_INTERPRET=1 "),
        ({"OTHER": "1"}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_variables_that_are_set_and_quoted_arguments(monkeypatch, variables, prefix):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command_line("a_module", []) == f"{prefix}python -m benchmarks.a_module"
    words = ["--write", "a folder"]
    assert command_line("a_module", words) == (
        f"{prefix}python -m benchmarks.a_module --write 'a folder'"
    )


def test_pages_show_it(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(save_times, "measure", lambda *_: ([dict.fromkeys(save_times.PARTS, 1)], 1))
    monkeypatch.setattr(save_times, "copy_bandwidth", lambda: 1e9)
    words = ["--rounds", "1", "--write", str(tmp_path)]
    assert save_times.main(words) == 0
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.save_times {' '.join(words)}"
    assert json.loads((tmp_path / "save_times.json").read_text())["command"] == command
    assert f"`{command}`" in " ".join((tmp_path / "save_times.md").read_text().split())

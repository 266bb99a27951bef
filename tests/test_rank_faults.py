"""Faults of a rank in whole runs: the others end, name it, and the run resumes with the same bits.

The reduced form, without training, is in test_liveness.py and test_rendezvous.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from benchmarks import rank_faults
from benchmarks.rank_faults import FAULTS, Result
from tests.processes import PRELOADED


def run_faults(folder: Path) -> None:
    os._exit(rank_faults.main(["--write", str(folder)]))


@pytest.mark.slow
def test_every_fault_ends_the_other_ranks_and_the_run_resumes(tmp_path):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    process = server.Process(target=run_faults, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    faults = json.loads((tmp_path / "rank_faults.json").read_text())["faults"]
    assert [fault["name"] for fault in faults] == [fault.name for fault in FAULTS]
    for fault in faults:
        assert fault["resumed"] == "equal" or fault["problem"].startswith("not run"), fault


def test_unexpected_results_are_reported():
    fault = FAULTS[0]
    good = Result(fault.name, 1.0, (75, -9), (f"fastdino train: error: {fault.expected}",))
    assert rank_faults._problem(fault, good) == ""
    for changes, text in (
        ({"statuses": (2, -9)}, "rank 0 ended with 2, expected 75"),
        ({"seconds": -1.0}, "another rank did not end"),
        ({"lines": ("error: other",)}, "expected a line with 'rank 1 gave no sign of life'"),
    ):
        bad = Result(**{**vars(good), **changes})
        assert rank_faults._problem(fault, bad) == text

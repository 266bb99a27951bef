"""The benchmark of the signs of life: both kinds of rounds, and the ratio in its report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import liveness_cost
from tests.processes import run_two
from tests.small_networks import shrink_networks


def measure_both(folder: Path) -> None:
    shrink_networks(pytest.MonkeyPatch())
    results = [liveness_cost.measure(1.5, watched=watched) for watched in (False, True)]
    (folder / os.environ["RANK"]).write_text(json.dumps(results))


def test_only_rounds_with_the_thread_have_its_time(tmp_path):
    run_two(measure_both, tmp_path)
    for rank in "01":
        without, watched = json.loads((tmp_path / rank).read_text())
        assert without["step"] > 0
        assert without["share"] == 0 < watched["share"] < 1


def test_the_ratio_is_the_median_of_those_of_the_rounds():
    rounds = [
        [[{"step": 0.1, "share": 0.0}, {"step": 0.1 * ratio, "share": 0.002}] for ratio in ratios]
        for ratios in ((0.9, 1.0, 1.1), (1.0, 1.0, 5.0))
    ]
    text = " ".join(liveness_cost.report(rounds, "command", {"device": "cpu"}).split())
    assert "without them: 1.000 (1.000 to 1.075;" in text
    assert "2.00 ms per second on rank 0, 2.00 on rank 1" in text

"""benchmarks.gpu.tune: candidates of launch configurations, their check, the ranking."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from benchmarks.comparison import Comparison
from benchmarks.gpu import tune
from benchmarks.gpu.tune import SWEEPS, try_setting

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SWEEPS)
def test_the_shipped_configuration_is_a_candidate(name):
    sweep = SWEEPS[name]
    module = importlib.import_module(f"fastdino_kernels.{sweep.module}")
    assert {key: getattr(module, key) for key in sweep.candidates} in list(sweep.settings())


@pytest.mark.parametrize("name", SWEEPS)
def test_a_setting_is_checked_timed_and_undone(name, monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", "triton")
    sweep = SWEEPS[name]
    module = importlib.import_module(f"fastdino_kernels.{sweep.module}")
    before = {key: getattr(module, key) for key in sweep.candidates}
    setting = next(s for s in sweep.settings() if s != before)
    timing = try_setting(sweep, setting, True, CPU)
    assert not timing.outcome.reason, timing.outcome.traceback
    assert len(timing.seconds) == 1
    assert {key: getattr(module, key) for key in sweep.candidates} == before


def test_a_wrong_result_and_a_failed_launch_are_ranked_last():
    sweep = SWEEPS["ema"]

    def broken(tiny: bool, device: torch.device) -> Comparison:
        made = sweep.comparison(tiny, device)

        def check() -> None:
            raise AssertionError("teacher[0] is off by 1")

        return replace(made, baselines=[replace(one, check=check) for one in made.baselines])

    setting = {"CHUNK": 1024, "NUM_WARPS": 4}
    wrong = try_setting(replace(sweep, comparison=broken), setting, True, CPU)
    good = try_setting(sweep, setting, True, CPU)
    lines = tune.ranking([(setting, wrong), (setting, good)]).splitlines()
    assert "GB/s  CHUNK=1024, NUM_WARPS=4" in lines[0]
    assert lines[1] == "CHUNK=1024, NUM_WARPS=4: AssertionError: teacher[0] is off by 1"

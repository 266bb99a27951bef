"""The modelled collectives of a step are those that runs of two ranks make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_collectives
from benchmarks.step_collectives import Case
from fastdino.bench import step_messages
from fastdino.models.vit import VIT_ARCHS
from tests.processes import run_two

CASES = (
    Case("parity", passes=2),
    Case("fast", fsdp=True, passes=2, by_global=True),
    Case("fast", sinkhorn=True),
)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Give the network 3 blocks: the gradients of the patches fill the second bucket of DDP."""
    patch.setitem(VIT_ARCHS, "vit_tiny", VIT_ARCHS["vit_tiny"] | {"depth": 3})


def count(folder: Path) -> None:
    shorten(pytest.MonkeyPatch())
    step_collectives.count_cases(CASES, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder with the counts of two ranks."""
    path: Path = tmp_path_factory.mktemp("collectives")
    step_collectives.write_images(path / "data")
    run_two(count, path)
    return path


@pytest.fixture(autouse=True)
def short_network(monkeypatch) -> None:
    shorten(monkeypatch)


def test_the_model_has_the_number_and_the_bytes_of_each_counted_collective(folder):
    counts = step_collectives.read_counts(CASES, 2, folder)
    assert [count.problem for count in counts] == [""] * len(CASES)
    assert [count.calls.total() for count in counts] == [4, 38, 9]


def test_the_bytes_on_the_network_are_those_of_rings_and_gloo_reduces_before_it_scatters(folder):
    for case, count in zip(CASES, step_collectives.read_counts(CASES, 2, folder), strict=True):
        scattered = sum(n * size for (kind, size), n in count.calls.items() if "scatter" in kind)
        assert (scattered > 0) == case.fsdp
        assert count.sent == pytest.approx(count.ring + scattered / 2, rel=0.05)


def test_entropy_and_signals_are_counted(folder):
    count = step_collectives.read_counts(CASES, 2, folder)[0]
    assert count.logging == [["all-reduce", 4]]
    assert [kind for kind, _ in count.signals] == ["all-gather", "all-gather"]
    text = step_collectives.markdown([count], "command", {"device": "cpu"})
    assert "the entropy: all-reduce of 4 bytes." in text


def test_another_model_and_unequal_ranks_are_reported(folder, tmp_path, monkeypatch):
    for file in folder.glob("2_*.json"):
        counts = json.loads(file.read_text())
        if file.stem == "2_1":
            counts[0]["step"][-1].pop()
        (tmp_path / file.name).write_text(json.dumps(counts))
    monkeypatch.setattr(step_messages, "GATHERS_PER_PASS", 2)
    first, second, *_ = step_collectives.read_counts(CASES, 2, tmp_path)
    assert first.problem == "the steps or ranks differ"
    assert second.problem.startswith("counted {('all-gather', ")

"""Eager runs, capture and replay of a step.

Without CUDA, the fixture `captures` replaces torch.cuda's graphs: a replay calls the step again.
"""

import contextlib

import pytest
import torch

from fastdino.errors import UserError
from fastdino.training.cuda_graph import WARMUP_STEPS, GraphedStep

CPU = torch.device("cpu")


class FakeGraph:
    """Stores the function that ran during capture; `replay` calls it again."""

    capturing = None

    def __init__(self):
        self.function = None

    def replay(self):
        self.function()


@pytest.fixture
def captures(monkeypatch):
    """Emulate the parts of torch.cuda that GraphedStep uses; return the list of captures."""
    captured = []

    class FakeStream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(graph, **options):
        assert options["capture_error_mode"] == "thread_local"
        FakeGraph.capturing = graph
        captured.append(graph)
        try:
            yield
        except RuntimeError as error:  # in CUDA, ending a failed capture is an error too
            raise RuntimeError("operation failed due to a previous error") from error
        finally:
            FakeGraph.capturing = None

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    return captured


class Doubler:
    """A step that writes to the same memory in every replay and counts its runs."""

    def __init__(self):
        self.runs = 0
        self.outputs = {}

    def __call__(self, crops, *, measure):
        out = self.outputs.setdefault(measure, torch.empty(()))

        def run():
            self.runs += 1
            out.copy_(2 * crops[0].sum() + 100 * measure)

        if FakeGraph.capturing is None:
            run()
        else:  # captured kernels do not run
            FakeGraph.capturing.function = run
        return out, (out if measure else None)


def test_every_step_runs_once_with_a_graph_per_combination_of_flags(captures):
    step = Doubler()
    graphed = GraphedStep(step, CPU)
    crops = [[torch.full((2,), float(i))] for i in range(4 * WARMUP_STEPS)]
    results = [graphed(crop, measure=i % 2 == 0) for i, crop in enumerate(crops)]
    for i, (value, measured) in enumerate(results):  # a replay does not change earlier results
        assert value == 4.0 * i + 100 * (i % 2 == 0)
        assert (measured is None) == (i % 2 == 1)
    assert len(captures) == 2
    assert step.runs == 4 * WARMUP_STEPS


def test_batch_of_another_size_is_rejected(captures):
    graphed = GraphedStep(Doubler(), CPU)
    graphed([torch.zeros(2)], measure=False)
    with pytest.raises(ValueError, match=r"crop 0 must be \(2,\) of torch.float32, got \(3,\)"):
        graphed([torch.zeros(3)], measure=False)
    with pytest.raises(ValueError, match="got \\(2,\\) of torch.float16: with --cuda_graph"):
        graphed([torch.zeros(2, dtype=torch.float16)], measure=False)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            RuntimeError("operation not permitted when stream is capturing\nand more"),
            UserError,
            r"cannot be captured \(operation not .* capturing\); use --cuda_graph false",
        ),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), torch.OutOfMemoryError, "2 GiB"),
    ],
)
def test_failed_capture_reports_the_first_error(captures, error, raised, message):
    doubler = Doubler()

    def step(crops, *, measure):
        if FakeGraph.capturing is not None:
            raise error
        return doubler(crops, measure=measure)

    graphed = GraphedStep(step, CPU)
    for _ in range(WARMUP_STEPS):
        graphed([torch.zeros(2)], measure=False)
    with pytest.raises(raised, match=message):
        graphed([torch.zeros(2)], measure=False)

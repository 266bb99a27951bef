"""fastdino.training.cuda_graph: when a step runs, is recorded, is replayed, with what.

There is no CUDA here: `recorder` stands in for its graphs, and replays a step by
calling it again.
"""

import contextlib

import pytest
import torch

from fastdino.errors import UserError
from fastdino.training.cuda_graph import WARM_UPS, GraphedStep


class FakeGraph:
    """Remembers the step that was called while it recorded; `replay` calls it again."""

    recording = None

    def __init__(self):
        self.again = None

    def replay(self):
        self.again()


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda as far as GraphedStep needs it, on a CPU; counts recordings."""
    recordings = []

    class FakeStream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(graph, **options):
        assert options["capture_error_mode"] == "thread_local"
        FakeGraph.recording = graph
        recordings.append(graph)
        try:
            yield
        except RuntimeError as error:  # as CUDA: to end what has failed is an error too
            raise RuntimeError("operation failed due to a previous error") from error
        finally:
            FakeGraph.recording = None

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    return recordings


class Doubler:
    """A step that writes to the same memory at every replay, and counts its runs."""

    def __init__(self):
        self.runs = 0
        self.outputs = {}

    def __call__(self, crops, *, measure):
        def run():
            self.runs += 1
            out = self.outputs.setdefault(measure, torch.empty(()))
            out.copy_(2 * crops[0].sum() + 100 * measure)

        if FakeGraph.recording is None:
            run()
        else:  # what is recorded does not run
            FakeGraph.recording.again = run
            self.outputs.setdefault(measure, torch.empty(()))
        return self.outputs[measure], (self.outputs[measure] if measure else None)


def test_every_step_runs_once_on_its_own_crops(recorder):
    step = Doubler()
    graphed = GraphedStep(step, torch.device("cpu"))
    results = [graphed([torch.full((2,), float(i))], measure=False)[0] for i in range(8)]
    assert [result.item() for result in results] == [4.0 * i for i in range(8)]
    assert step.runs == 8
    assert len(recorder) == 1


def test_each_kind_of_step_has_its_own_graph(recorder):
    step = Doubler()
    graphed = GraphedStep(step, torch.device("cpu"))
    for i in range(4 * WARM_UPS):
        value, measured = graphed([torch.full((2,), float(i))], measure=i % 2 == 0)
        assert value == 4.0 * i + 100 * (i % 2 == 0)
        assert (measured is None) == (i % 2 == 1)
    assert len(recorder) == 2
    assert step.runs == 4 * WARM_UPS


def test_a_batch_of_another_size_is_refused(recorder):
    graphed = GraphedStep(Doubler(), torch.device("cpu"))
    graphed([torch.zeros(2)], measure=False)
    with pytest.raises(ValueError, match=r"crop 0 must be \(2,\) of torch.float32, got \(3,\)"):
        graphed([torch.zeros(3)], measure=False)
    with pytest.raises(ValueError, match="got \\(2,\\) of torch.float16: with --cuda_graph"):
        graphed([torch.zeros(2, dtype=torch.float16)], measure=False)


@pytest.mark.parametrize(
    ("error", "told", "message"),
    [
        (
            RuntimeError("operation not permitted when stream is capturing\nand more"),
            UserError,
            r"cannot be recorded \(operation not .* capturing\); use --cuda_graph false",
        ),
        (torch.OutOfMemoryError("2 GiB are not there"), torch.OutOfMemoryError, "2 GiB"),
    ],
)
def test_a_step_that_cannot_be_recorded_says_why(recorder, error, told, message):
    doubler = Doubler()

    def step(crops, *, measure):
        if FakeGraph.recording is not None:
            raise error
        return doubler(crops, measure=measure)

    graphed = GraphedStep(step, torch.device("cpu"))
    for _ in range(WARM_UPS):
        graphed([torch.zeros(2)], measure=False)
    with pytest.raises(told, match=message):
        graphed([torch.zeros(2)], measure=False)

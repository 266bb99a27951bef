"""Compiled clips on a CPU: shapes that change, layouts and long gradients, against float64."""

import itertools

import pytest
import torch
from fastdino_kernels import clip_grad_norm_, clip_grad_norms_, reference
from fastdino_kernels.norms import ROW
from torch._dynamo.testing import CompileCounterWithBackend

from tests.multi_tensor import FLOATS, LONG, long_normal

CLIPS = (clip_grad_norms_, clip_grad_norm_)
# The gradients of each call.
SHAPES = {
    "rows": [[(100, 300)], [(101, 300)], [(200, 300)]],
    "columns": [[(100, 300)], [(100, 301)]],
    "shorter than a row": [[(100, 300)], [(3, 4)], [(1, 5)]],
    "longer than a row": [[(3, 4)], [(100, 300)]],
    "around a row": [[(ROW - 1,)], [(ROW,)], [(ROW + 1,)], [(2 * ROW,)]],
    "another width next to it": [[(64, 128), (64,)], [(64, 192), (64,)], [(96, 192), (96,)]],
    "dimensions": [[(100, 300)], [(10, 20, 150)], [(30_000,)], [()]],
    "more gradients": [[(100, 300)], [(100, 300), (200, 300)]],
}


def parameters(shapes, *, dtype=torch.float32, transposed=False):
    """Make parameters with gradients; half of the norms are below 1."""
    params = []
    for index, shape in enumerate(shapes):
        grad = long_normal(torch.Size(shape).numel(), seed=index).view(shape).to(dtype)
        grad = (grad.T if transposed else grad) * 1e-4 ** (index % 2)
        params.append(torch.nn.Parameter(torch.zeros_like(grad)))
        params[-1].grad = grad
    return params


def compiled_clip(clip, **options):
    torch._dynamo.reset()
    return torch.compile(lambda params: clip(params, 1.0), **({"backend": "aot_eager"} | options))


def assert_clips(compiled, clip, params):
    gradients = [p.grad.double() for p in params if p.grad is not None]
    if clip is clip_grad_norm_:
        clipped, expected = reference.clip_grad_norm(gradients, 1.0)
    else:
        clipped, each = reference.clip_grad_norms(gradients, 1.0)
        held = iter(each)
        expected = torch.stack(
            [gradients[0].new_zeros(()) if p.grad is None else next(held) for p in params]
        )
    norms = compiled(params)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)
    for grad, exact in zip((p.grad for p in params if p.grad is not None), clipped, strict=True):
        rtol = torch.finfo(grad.dtype).eps if grad.dtype.itemsize == 2 else 1e-6
        torch.testing.assert_close(grad.double(), exact, rtol=rtol, atol=6e-8)


def shape_cases():
    """Yield each clip, name of SHAPES and value of `dynamic`; most combinations are slow tests."""
    for clip, shapes, dynamic in itertools.product(CLIPS, SHAPES, (None, True, False)):
        quick = shapes == "rows" or (clip is clip_grad_norms_ and dynamic is None)
        yield pytest.param(clip, shapes, dynamic, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("clip", "shapes", "dynamic"), list(shape_cases()))
def test_shapes_may_change(clip, shapes, dynamic):
    compiled = compiled_clip(clip, dynamic=dynamic, fullgraph=True)
    for each in SHAPES[shapes]:
        assert_clips(compiled, clip, parameters(each))


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_may_be_transposed(clip, dynamic, fullgraph):
    compiled = compiled_clip(clip, dynamic=dynamic, fullgraph=fullgraph)
    for transposed in (True, False):
        for shapes in ([(100, 300)], [(101, 300)], [(64, 64)]):
            assert_clips(compiled, clip, parameters(shapes, transposed=transposed))


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_every_dtype_next_to_missing_ones(dtype, dynamic):
    compiled = compiled_clip(clip_grad_norms_, dynamic=dynamic, fullgraph=True)
    for shape in ((100, 300), (101, 300)):
        params = parameters([shape]) + parameters([shape], dtype=dtype)
        params.insert(1, torch.nn.Parameter(torch.zeros(shape)))
        assert_clips(compiled, clip_grad_norms_, params)


@pytest.mark.parametrize("clip", CLIPS)
def test_millions_of_elements_are_clipped_accurately(clip):
    compiled = compiled_clip(clip, fullgraph=True)
    assert_clips(compiled, clip, parameters([(LONG,), (3,)]))


@pytest.mark.parametrize("clip", CLIPS)
@torch._dynamo.config.patch(force_parameter_static_shapes=False)
def test_one_graph_serves_lengths_on_both_sides_of_a_row(clip):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiled_clip(clip, backend=counter, dynamic=True, fullgraph=True)
    for rows in (5, 100, 200):
        assert_clips(compiled, clip, parameters([(rows, 300)]))
    assert counter.frame_count == 1

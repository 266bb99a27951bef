"""clip_grad_norms_ and clip_grad_norm_ against plain loops in float64."""

import math

import pytest
import torch
from fastdino_kernels import clip, clip_grad_norm_, clip_grad_norms_, pointer_table, reference
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import multi_tensor
from tests.multi_tensor import (
    EPS,
    FLOATS,
    LONG,
    assert_frame,
    capture,
    far_tables,
    frames_around,
    long_normal,
    needs_cuda,
    numpy_warns,
    triton_only,
)
from tests.properties import given, settings, st

SHAPES = [(3, 5), (7,), (), (64, 32), (2, 3, 4), (0, 3)]
DRAWN = "draw(torch.float32)"
both = pytest.mark.parametrize("clip_", [clip_grad_norms_, clip_grad_norm_])


def parameter(grad):
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    return param


def draw(*dtypes, device="cpu", shapes=SHAPES, seed=0):
    """Make parameters with gradients whose norms are below and above 1; dtypes take turns."""
    drawn = multi_tensor.draw(dtypes, seed, device, shapes)
    return [parameter(x * 0.5**index) for index, x in enumerate(drawn)]


def truth(clip_, params, max_norm):
    """Return the clipped gradients and the norm or norms of the reference in float64."""
    gradients = [p.grad.double() for p in params]
    if clip_ is clip_grad_norm_:
        return reference.clip_grad_norm(gradients, max_norm)
    clipped, norms = reference.clip_grad_norms(gradients, max_norm)
    return clipped, torch.stack(norms)


def assert_one_rounding(params, expected, *, factor_eps=0.0):
    """One rounding to the gradient's dtype, after arithmetic in fp32 or fp64."""
    for p, e in zip(params, expected, strict=True):
        double = p.dtype == torch.float64
        slack = 0.51 * torch.finfo(p.dtype).eps + 4 * max(factor_eps, 1e-16 if double else EPS)
        torch.testing.assert_close(p.grad.double(), e, rtol=slack, atol=6e-8 * (1 - double))


@pytest.mark.accuracy
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in FLOATS] + [FLOATS[1:], FLOATS])
def test_each_gradient_is_clipped_by_its_own_norm(dtypes, target):
    if target["impl"] == "triton" and torch.float64 in dtypes:
        pytest.skip("Triton computes in fp32")
    params = draw(*dtypes, device=target["device"])
    before = [p.grad.clone() for p in params]
    expected, expected_norms = truth(clip_grad_norms_, params, 1.0)
    norms = clip_grad_norms_(params, 1.0, impl=target["impl"])
    double = dtypes == [torch.float64]
    assert norms.dtype == (torch.float64 if double else torch.float32)
    rtol = 1e-14 if double else 4 * EPS
    torch.testing.assert_close(norms.double(), expected_norms, rtol=rtol, atol=0)
    assert_one_rounding(params, expected)
    untouched = [torch.equal(p.grad, b) for p, b in zip(params, before, strict=True)]
    assert untouched == [norm <= 1 for norm in expected_norms]
    assert any(untouched)
    assert not all(untouched)


def test_factor_uses_the_papers_epsilon():
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad = torch.full((1,), 1e-5, dtype=torch.float64)
    clip_grad_norms_([param], 1e-6)
    assert param.grad.item() == pytest.approx(1e-5 * 1e-6 / (1e-5 + 1e-6), rel=1e-12)


@both
def test_factor_of_small_norms_has_the_papers_epsilon(clip_, target):
    """1e-6 is added to the norm, which it halves here."""
    param = parameter(torch.full((1,), 1e-6, device=target["device"]))
    norms = clip_([param], 1e-6, impl=target["impl"])
    assert norms.item() == pytest.approx(1e-6, rel=1e-6)
    assert param.grad.item() == pytest.approx(0.5e-6, rel=1e-6)


def test_missing_gradients_are_skipped(target):
    params = draw(torch.float32, device=target["device"])
    expected, expected_norms = truth(clip_grad_norms_, params, 0.5)
    params[0].grad = params[3].grad = None
    expected_norms[[0, 3]] = 0
    norms = clip_grad_norms_(iter(params), 0.5, impl=target["impl"])
    torch.testing.assert_close(norms.double(), expected_norms, rtol=1e-6, atol=0)
    assert params[0].grad is None
    assert params[3].grad is None
    torch.testing.assert_close(params[1].grad.double(), expected[1], rtol=1e-6, atol=1e-8)


def test_same_gradients_at_other_list_positions(target):
    x, y = (parameter(torch.full((4,), v, device=target["device"])) for v in (1.0, 2.0))
    without = torch.nn.Parameter(torch.zeros(4, device=target["device"]))
    for params in ([x, without, y], [without, x, y], [x, y], [x, y, without]):
        expected = [0.0 if p is without else p.grad.norm().item() for p in params]
        norms = clip_grad_norms_(params, math.inf, impl=target["impl"])
        assert norms.tolist() == pytest.approx(expected)


@both
def test_no_gradients(clip_, target):
    params = [torch.nn.Parameter(torch.zeros(2, device=target["device"])) for _ in range(3)]
    for some in (params, []):
        norms = clip_(some, 1.0, impl=target["impl"])
        shape = () if clip_ is clip_grad_norm_ else len(some)
        assert torch.equal(norms, torch.zeros(shape, device=norms.device))
        with pytest.raises(ValueError, match=r"impl must be one of .*got 'foo'"):
            clip_(some, 1.0, impl="foo")


def test_single_tensor_is_accepted(target):
    param = draw(torch.float32, device=target["device"])[0]
    expected = param.grad.norm()
    norms = clip_grad_norms_(param, 1.0, impl=target["impl"])
    torch.testing.assert_close(norms, expected[None])
    assert param.grad.norm().item() == pytest.approx(1.0)
    assert clip_grad_norm_(param, 1.0, impl=target["impl"]).shape == ()


@numpy_warns
def test_infinite_and_nan_norms_match_the_paper_code(target):
    values = torch.tensor([[1.0, math.inf], [1.0, math.nan], [3.0, 4.0], [0.0, 0.0]])
    params = [parameter(value.to(target["device"])) for value in values.clone()]
    norms = clip_grad_norms_(params, 1.0, impl=target["impl"])
    expected = torch.tensor([math.inf, math.nan, 5.0, 0.0])
    torch.testing.assert_close(norms.cpu(), expected, equal_nan=True)
    after = torch.stack([param.grad for param in params]).cpu()
    kept = torch.tensor([[0.0, math.nan], [1.0, math.nan], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(after, kept, equal_nan=True, rtol=1e-6, atol=0)


@both
def test_norm_may_overflow_half_precision(clip_, target):
    grad = torch.full((10_000,), 1000.0, dtype=torch.float16, device=target["device"])
    param = parameter(grad)
    norms = clip_([param], 100.0, impl=target["impl"])
    assert norms.item() == pytest.approx(1e5, rel=1e-5)
    assert torch.equal(param.grad, torch.full_like(grad, 1.0))


@both
def test_infinite_max_norm_only_measures(clip_, target):
    params = draw(torch.float32, device=target["device"])
    before = [p.grad.clone() for p in params]
    norms = clip_(params, math.inf, impl=target["impl"])
    expected = torch.stack([b.norm() for b in before])
    torch.testing.assert_close(norms, expected if norms.dim() else expected.norm())
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


@pytest.mark.accuracy
@pytest.mark.parametrize("max_norm", [0.3, 100.0])
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in FLOATS] + [FLOATS[1:], FLOATS])
def test_gradients_are_clipped_by_the_global_norm(dtypes, max_norm, target):
    if target["impl"] == "triton" and torch.float64 in dtypes:
        pytest.skip("Triton computes in fp32")
    params = draw(*dtypes, device=target["device"])
    params[1].grad = None
    present = [p for p in params if p.grad is not None]
    before = [p.grad.clone() for p in present]
    expected, expected_norm = truth(clip_grad_norm_, present, max_norm)
    norm = clip_grad_norm_(params, max_norm, impl=target["impl"])
    double = dtypes == [torch.float64]
    assert norm.dtype == (torch.float64 if double else torch.float32)
    rtol = 1e-14 if double else 4 * EPS
    torch.testing.assert_close(norm.double(), expected_norm, rtol=rtol, atol=0)
    # The common norm is no better than that of the fp32 gradients among them.
    assert_one_rounding(present, expected, factor_eps=0.0 if double else EPS)
    kept = all(torch.equal(p.grad, b) for p, b in zip(present, before, strict=True))
    assert kept == (max_norm == 100.0)
    assert params[1].grad is None


@numpy_warns
@pytest.mark.parametrize("odd", [1.0, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.5, 5.0, 1e-5])
def test_global_norm_matches_torch(max_norm, odd, target):
    ours, theirs = (
        draw(torch.float32, device=target["device"], shapes=[(3, 4), (5,), (2,)]) for _ in range(2)
    )
    for params in (ours, theirs):
        params[1].grad[2] = odd
    norm = clip_grad_norm_(iter(ours), max_norm, impl=target["impl"])
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, equal_nan=True)


@both
@pytest.mark.parametrize("size", [65536 * 256, LONG])
def test_millions_of_elements_are_clipped_accurately(clip_, size):
    params = [parameter(long_normal(size)), parameter(torch.ones(3))]
    expected, expected_norms = truth(clip_, params, 1.0)
    norms = clip_(params, 1.0)
    torch.testing.assert_close(norms.double(), expected_norms, rtol=1e-6, atol=0)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad.double(), e, rtol=1e-6, atol=0)


@both
def test_gradients_with_gaps_or_other_strides(clip_, target):
    wide = torch.randn(4, 6, device=target["device"])
    params = [parameter(torch.randn(5, 4, device=target["device"]).t()) for _ in range(2)]
    params.append(torch.nn.Parameter(torch.zeros(4, 3, device=target["device"])))
    for grad in (torch.randn(4, 3, device=target["device"]), wide[:, ::2]):
        params[-1].grad = grad
        gaps = wide[:, 1::2].clone()
        expected, _ = truth(clip_, params, 0.1)
        clip_(params, 0.1, impl=target["impl"])
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad.double(), e, rtol=1e-6, atol=1e-9)
        assert torch.equal(wide[:, 1::2], gaps)


@triton_only
def test_transposed_gradients_use_the_kernel(target, monkeypatch):
    monkeypatch.delattr(clip, "measure")
    params = [parameter(torch.randn(5, 4, device=target["device"]).t())]
    expected, _ = truth(clip_grad_norms_, params, 0.1)
    clip_grad_norms_(params, 0.1, impl="triton")
    assert_one_rounding(params, expected)


@both
@triton_only
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_lengths_around_a_chunk_write_nothing_outside(clip_, target, dtype):
    from fastdino_kernels.clip_triton import CHUNK

    frames = frames_around(CHUNK, [math.nan], dtype, target["device"])
    params = [parameter(frame[0, inside].fill_(1.0)) for frame, inside in frames]
    squares = torch.tensor([float(p.numel()) for p in params], device=target["device"])
    norms = clip_(params, 0.5, impl="triton")
    expected = squares.sqrt() if norms.dim() else squares.sum().sqrt()
    torch.testing.assert_close(norms, expected, rtol=2 * EPS, atol=0)
    factors = (0.5 / expected).to(dtype).expand(len(params)).tolist()
    for (frame, inside), factor in zip(frames, factors, strict=True):
        assert_frame(frame, inside, [math.nan], [factor], rtol=1e-5)


@both
@triton_only
def test_more_chunks_than_one_reduction_step(clip_, target, monkeypatch):
    from fastdino_kernels import clip_triton

    monkeypatch.setattr(clip_triton, "PARTIALS", 2)
    monkeypatch.setattr(clip_triton, "TOTAL_PARTIALS", 4)
    sizes = [5 * clip_triton.CHUNK, 2 * clip_triton.CHUNK + 1]
    params = [parameter(torch.ones(size, device=target["device"])) for size in sizes]
    norms = clip_(params, math.inf, impl="triton")
    expected = [size**0.5 for size in sizes] if norms.dim() else sum(sizes) ** 0.5
    assert norms.tolist() == pytest.approx(expected)


@triton_only
def test_offsets_beyond_31_bits(target):
    from fastdino_kernels.clip_triton import CHUNK, launch_scale, launch_sum_squares

    grad = torch.full((100,), 2.0, device=target["device"])
    tables = far_tables(CHUNK, [grad])
    assert launch_sum_squares(tables).item() == 400.0
    launch_scale(tables, torch.full((1,), 0.25, device=target["device"]), each=True)
    assert torch.equal(grad, torch.full_like(grad, 0.5))


@triton_only
def test_unclipped_gradients_are_not_written(target, monkeypatch):
    """The table's address of the unclipped gradient is invalid when the scaling starts."""
    from fastdino_kernels import clip_triton

    scale = clip_triton.launch_scale
    small, large = (parameter(torch.full((4,), x, device=target["device"])) for x in (0.1, 9.0))

    def spoil_and_scale(tables, *arguments, **options):
        tables.pointers.words[0] = pointer_table.FP32
        scale(tables, *arguments, **options)

    monkeypatch.setattr(clip_triton, "launch_scale", spoil_and_scale)
    clip_grad_norms_([small, large], 1.0, impl="triton")
    torch.testing.assert_close(small.grad, torch.full_like(small.grad, 0.1))
    torch.testing.assert_close(large.grad, torch.full_like(large.grad, 0.5))


@both
def test_gradients_may_be_new_or_missing_in_each_call(clip_, target):
    params = draw(*FLOATS[1:], device=target["device"])
    kept = []
    for step in range(4):
        for index, param in enumerate(params):
            kept.append(param.grad)
            param.grad = None
            if index != step:
                param.grad = torch.randn_like(param)
        present = [p for p in params if p.grad is not None]
        expected, expected_norms = truth(clip_, present, 0.7)
        norms = clip_(params, 0.7, impl=target["impl"])
        assert_one_rounding(present, expected)
        if norms.dim():
            assert norms[step] == 0
            norms = torch.stack([n for i, n in enumerate(norms) if i != step])
        torch.testing.assert_close(norms.double(), expected_norms, rtol=4 * EPS, atol=0)


@both
def test_same_input_gives_same_bits(clip_, target):
    runs = []
    for _ in range(2):
        params = draw(torch.float32, device=target["device"], shapes=[(20_000,), (77,)])
        norms = clip_(params, 0.1, impl=target["impl"])
        runs.append([norms, *(p.grad for p in params)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@both
def test_autograd_versions_are_incremented(clip_, target):
    params = draw(torch.float32, device=target["device"])
    versions = [p.grad._version for p in params]
    clip_(params, 0.1, impl=target["impl"])
    assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))


@given(
    sizes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(FLOATS[1:]), min_size=1, max_size=3),
    max_norm=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
    clip_=st.sampled_from([clip_grad_norms_, clip_grad_norm_]),
)
@settings(max_examples=25, deadline=None)
def test_random_lists_of_gradients(sizes, dtypes, max_norm, seed, clip_):
    impl = "torch" if torch.cuda.is_available() else "triton"
    params = draw(*dtypes, shapes=sizes, seed=seed)
    expected, norms = truth(clip_, params, max_norm)
    measured = clip_(params, max_norm, impl=impl)
    torch.testing.assert_close(measured.double(), norms, rtol=4 * EPS, atol=1e-12)
    assert_one_rounding(params, expected)


@both
def test_compiles_as_one_graph(clip_, target):
    params, expected = (draw(*FLOATS[1:], device=target["device"]) for _ in range(2))
    for some in (params, expected):
        some[2].grad = None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(params):
        return clip_(params, 0.6, impl=target["impl"])

    torch.testing.assert_close(run(params), clip_(expected, 0.6, impl=target["impl"]))
    for p, e in zip(params, expected, strict=True):
        if e.grad is not None:
            torch.testing.assert_close(p.grad, e.grad)


@triton_only
def test_opcheck(target):
    def grads():
        return [p.grad for p in draw(*FLOATS[1:], device=target["device"])]

    operators = torch.ops.fastdino_kernels
    positions = [1, 2, 3, 5, 6, 7]
    torch.library.opcheck(operators.clip_grad_norms_.default, (grads(), positions, 8, 0.5))
    torch.library.opcheck(operators.clip_grad_norm_.default, (grads(), 0.5))


def test_fake_tensors_have_fake_norms(target):
    with FakeTensorMode():
        params = draw(torch.bfloat16, device=target["device"])
        norms = clip_grad_norms_(params, 1.0, impl=target["impl"])
        assert (norms.shape, norms.dtype) == ((len(params),), torch.float32)
        norm = clip_grad_norm_(params, 1.0, impl=target["impl"])
        assert (norm.shape, norm.dtype) == ((), torch.float32)


@both
@pytest.mark.gpu
@needs_cuda
def test_captured_graph_with_new_gradients(clip_):
    params = draw(torch.float32, device="cuda")
    inputs = [torch.randn_like(p) for p in params]

    def step():
        for p in params:
            p.grad = None
        torch.stack([(p * x).sum() for p, x in zip(params, inputs, strict=True)]).sum().backward()
        return clip_(params, 0.5)

    graph, norms = capture(step)
    for _ in range(3):
        for x in inputs:
            x.normal_()
        expected, expected_norms = truth(clip_, [parameter(x.clone()) for x in inputs], 0.5)
        graph.replay()
        assert_one_rounding(params, expected)
        torch.testing.assert_close(norms.double(), expected_norms, rtol=4 * EPS, atol=0)


@both
def test_gradients_that_share_memory_are_an_error(clip_, target):
    buffer = torch.ones(6, device=target["device"])
    params = [parameter(buffer[:4]), parameter(buffer[4:])]
    clip_(params, 10.0, impl=target["impl"])
    params[1].grad = buffer[3:5]
    with pytest.raises(ValueError, match=r"parameters\[0\].grad and parameters\[1\].grad share"):
        clip_(params, 0.1, impl=target["impl"])
    with pytest.raises(ValueError, match=r"parameters\[1\].grad and parameters\[2\].grad share"):
        clip_([torch.nn.Parameter(buffer), params[0], params[0]], 0.1, impl=target["impl"])
    assert torch.equal(buffer, torch.ones_like(buffer))


GOOD = parameter(torch.ones(2))


def sparse_parameter():
    weight = torch.nn.Embedding(3, 2, sparse=True).weight
    weight.grad = torch.ones(3, 2).to_sparse()
    return weight


def overlapping_parameter():
    param = torch.nn.Parameter(torch.zeros(3, 3))
    param.grad = torch.ones(5).as_strided((3, 3), (1, 1))
    return param


@pytest.mark.parametrize(
    ("params", "max_norm", "options", "raises", "match"),
    [
        (DRAWN, 0.0, {}, ValueError, r"max_norm must be > 0, got 0\.0"),
        (DRAWN, -3, {}, ValueError, "max_norm must be > 0, got -3"),
        (DRAWN, math.nan, {}, ValueError, "max_norm must be > 0, got nan"),
        (DRAWN, "3", {}, TypeError, "max_norm must be a float, got str"),
        (DRAWN, 1.0, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ([torch.zeros(2), 1.0], 1.0, {}, TypeError, r"parameters\[1\] .*got float"),
        ([parameter(torch.zeros(2).double())], 1.0, {"impl": "triton"}, ValueError, "float64"),
        ([GOOD, sparse_parameter()], 1.0, {}, TypeError, r"\[1\].grad .* dense .*sparse_coo"),
        ([GOOD, overlapping_parameter()], 1.0, {}, ValueError, r"\[1\].grad .* strides \(1, 1\)"),
        (None, 1.0, {}, TypeError, "parameters must be .*iterable of them, got NoneType"),
        (3, 1.0, {}, TypeError, "parameters must be .*iterable of them, got int"),
    ],
)
@both
def test_invalid_arguments_change_nothing(clip_, params, max_norm, options, raises, match):
    params = draw(torch.float32) if params is DRAWN else params
    iterable = params if isinstance(params, list) else ()
    present = [p for p in iterable if getattr(p, "grad", None) is not None]
    before = [p.grad.clone() for p in present]
    with pytest.raises(raises, match=match):
        clip_(params, max_norm, **options)
    for p, b in zip(present, before, strict=True):
        assert torch.equal(p.grad.to_dense(), b.to_dense())

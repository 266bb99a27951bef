"""fastdino_kernels.clip_grad_norms_ against the paper code's loop in float64."""

import math

import pytest
import torch
from fastdino_kernels import clip_grad_norms_, reference

SHAPES = [(3, 5), (7,), (), (64, 32), (2, 3, 4)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def draw(*dtypes):
    """Parameters whose gradients' norms lie on both sides of 1."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for index, shape in enumerate(SHAPES):
        dtype = dtypes[index % len(dtypes)]
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = (torch.randn(shape, generator=generator) * 0.5**index).to(dtype)
        params.append(param)
    return params


def truth(params, max_norm):
    return reference.clip_grad_norms([p.grad.double() for p in params], max_norm)


@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in FLOATS] + [FLOATS])
def test_each_gradient_is_clipped_by_its_own_norm(dtypes, impl):
    params = draw(*dtypes)
    before = [p.grad.clone() for p in params]
    expected, expected_norms = truth(params, 1.0)
    norms = clip_grad_norms_(params, 1.0, impl=impl)
    double = dtypes == [torch.float64]
    assert norms.dtype == (torch.float64 if double else torch.float32)
    rtol = 1e-14 if double else 4 * EPS
    torch.testing.assert_close(norms.double(), torch.stack(expected_norms), rtol=rtol, atol=0)
    for p, e in zip(params, expected, strict=True):
        # One rounding to the gradient's dtype, after arithmetic in fp32 or fp64.
        slack = 0.51 * torch.finfo(p.dtype).eps + 4 * (1e-16 if p.dtype == torch.float64 else EPS)
        torch.testing.assert_close(p.grad.double(), e, rtol=slack, atol=6e-8 * (1 - double))
    untouched = [torch.equal(p.grad, b) for p, b in zip(params, before, strict=True)]
    assert untouched == [norm <= 1 for norm in expected_norms]
    assert any(untouched)
    assert not all(untouched)


def test_the_factor_has_the_papers_epsilon():
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad = torch.full((1,), 1e-5, dtype=torch.float64)
    clip_grad_norms_([param], 1e-6)
    assert param.grad.item() == pytest.approx(1e-5 * 1e-6 / (1e-5 + 1e-6), rel=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_missing_gradients_are_passed_over(impl):
    params = draw(torch.float32)
    expected, expected_norms = truth(params, 0.5)
    for index in (0, 3):
        params[index].grad = None
        expected_norms[index] = torch.zeros((), dtype=torch.float64)
    norms = clip_grad_norms_(iter(params), 0.5, impl=impl)
    torch.testing.assert_close(norms.double(), torch.stack(expected_norms), rtol=1e-6, atol=0)
    assert params[0].grad is None
    assert params[3].grad is None
    torch.testing.assert_close(params[1].grad.double(), expected[1], rtol=1e-6, atol=1e-8)


def test_no_gradients_at_all():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert torch.equal(clip_grad_norms_(params, 1.0), torch.zeros(3))
    assert clip_grad_norms_([], 1.0).shape == (0,)


def test_one_tensor_stands_for_a_list_of_one():
    (param,) = draw(torch.float32)[:1]
    expected = param.grad.norm()
    assert torch.equal(clip_grad_norms_(param, 1.0), expected[None])
    torch.testing.assert_close(param.grad.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_infinite_and_nan_norms_do_what_the_paper_code_does(impl):
    values = torch.tensor([[1.0, math.inf], [1.0, math.nan], [3.0, 4.0], [0.0, 0.0]])
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in values]
    for param, value in zip(params, values, strict=True):
        param.grad = value.clone()
    norms = clip_grad_norms_(params, 1.0, impl=impl)
    expected = torch.tensor([math.inf, math.nan, 5.0, 0.0])
    torch.testing.assert_close(norms, expected, equal_nan=True)
    after = torch.stack([param.grad for param in params])
    kept = torch.tensor([[0.0, math.nan], [1.0, math.nan], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(after, kept, equal_nan=True, rtol=1e-6, atol=0)


def test_half_gradients_whose_norm_overflows_half():
    param = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.float16))
    param.grad = torch.full_like(param, 1000.0)
    norms = clip_grad_norms_([param], 100.0)
    assert norms.item() == pytest.approx(1e5, rel=1e-5)
    assert torch.equal(param.grad, torch.full_like(param, 1.0))


def test_infinite_max_norm_only_measures():
    params = draw(torch.float32)
    before = [p.grad.clone() for p in params]
    norms = clip_grad_norms_(params, math.inf)
    torch.testing.assert_close(norms, torch.stack([b.norm() for b in before]))
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


def test_non_contiguous_gradients():
    param = torch.nn.Parameter(torch.zeros(5, 4).t())
    param.grad = torch.randn(5, 4).t()
    expected, _ = truth([param], 0.1)
    clip_grad_norms_([param], 0.1)
    torch.testing.assert_close(param.grad.double(), expected[0], rtol=1e-6, atol=0)


def test_environment_variable_names_an_implementation(monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", "abacus")
    with pytest.raises(ValueError, match=r"FASTDINO_KERNELS must be one of 'auto'.*'abacus'"):
        clip_grad_norms_(draw(torch.float32), 1.0)


@pytest.mark.parametrize(
    ("params", "max_norm", "options", "raises", "match"),
    [
        (None, 0.0, {}, ValueError, r"max_norm must be > 0, got 0\.0"),
        (None, -3, {}, ValueError, "max_norm must be > 0, got -3"),
        (None, math.nan, {}, ValueError, "max_norm must be > 0, got nan"),
        (None, "3", {}, TypeError, "max_norm must be a float, got str"),
        (None, 1.0, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ([torch.zeros(2), 1.0], 1.0, {}, TypeError, r"parameters\[1\] .*got float"),
    ],
)
def test_callers_mistakes_change_nothing(params, max_norm, options, raises, match):
    params = draw(torch.float32) if params is None else params
    before = [p.grad.clone() for p in params if getattr(p, "grad", None) is not None]
    with pytest.raises(raises, match=match):
        clip_grad_norms_(params, max_norm, **options)
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=False))

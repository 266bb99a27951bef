"""fastdino_kernels.koleo_loss against the reference in float64.

Legend: B rows, D features.
"""

import importlib
import math

import pytest
import torch
from fastdino_kernels import koleo_loss, reference
from fastdino_kernels.operators import ops
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdino.bench.measurement import peak_bytes
from tests.logits import run
from tests.processes import run_ranks

koleo = importlib.import_module("fastdino_kernels.koleo")


def draw(B=9, D=5, dtype=torch.float64, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)


def truth(x: Tensor, topk=1, **options) -> tuple[Tensor, Tensor]:
    return run(lambda x: reference.koleo_loss(x, x, 0, topk, **options), x.double())


@pytest.mark.parametrize("block", [1, 20, 1 << 22])
@pytest.mark.parametrize(("B", "D", "topk"), [(2, 3, 1), (9, 5, 1), (9, 5, 4), (30, 2, 3)])
def test_matches_the_reference_in_float64(B, D, topk, block, monkeypatch):
    monkeypatch.setattr(koleo, "BLOCK_ELEMENTS", block)
    got = run(koleo_loss, draw(B, D), topk=topk)
    torch.testing.assert_close(got, truth(draw(B, D), topk), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0])  # rows of norm below eps, and above
def test_eps_is_added_to_differences_and_distances_and_is_the_least_norm(scale):
    x = scale * draw()
    got = run(koleo_loss, x, eps=0.1)
    torch.testing.assert_close(got, truth(x, eps=0.1), rtol=1e-12, atol=1e-12)
    assert abs(got[0] - koleo_loss(x)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_fp32(dtype):
    x = draw(20, 30, dtype)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            loss, grad = run(koleo_loss, x)
        expected, expected_grad = truth(x)
        assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        slack = torch.finfo(dtype).eps * expected_grad.abs().max().item()
        assert (grad - expected_grad).abs().max() < slack + 1e-7


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda x: koleo_loss(x, topk=2), draw(6, 4).requires_grad_())


def test_first_of_equal_neighbours_is_chosen():
    corner = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    nearest = ops.nearest_rows(corner, corner, 0, 2)
    assert nearest.tolist() == [[4, 1], [2, 3], [1, 3], [1, 2], [0, 1]]


def test_rows_that_are_equal_zero_or_alone_are_finite():
    twice = draw(3, 4)[[0, 1, 2, 2]]
    for x in (twice, torch.zeros(3, 4, dtype=torch.float64), draw(1, 4)):
        got, expected = run(koleo_loss, x), truth(x)
        torch.testing.assert_close(got, expected)
        assert all(part.isfinite().all() for part in got)
    assert run(koleo_loss, draw(1, 4))[0].item() == pytest.approx(-math.log(3e-8))


def test_no_rows_have_loss_zero():
    loss, grad = run(koleo_loss, draw(0, 4, torch.float32))
    assert loss == 0
    assert grad.shape == (0, 4)


def test_nan_row_makes_the_loss_nan():
    x = draw()
    x[3, 2] = math.nan
    assert koleo_loss(x).isnan()


def test_memory_is_bounded_by_a_block(monkeypatch):
    monkeypatch.setattr(koleo, "BLOCK_ELEMENTS", 1 << 16)
    x = draw(2048, 8, torch.float32)
    assert peak_bytes(lambda: koleo_loss(x), torch.device("cpu")) < 2048**2 * 4 / 8


def test_opcheck():
    x = draw(dtype=torch.float32)
    torch.library.opcheck(ops.nearest_rows.default, (x, x, 0, 2))
    torch.library.opcheck(ops.nearest_rows.default, (x[3:5], x, 3, 1, -2.0))


def test_compiles_as_one_graph():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(koleo_loss, fullgraph=True, dynamic=True, backend=counter)
    for rows in (8, 5, 2, 11):
        x = draw(rows, dtype=torch.float32)
        torch.testing.assert_close(run(compiled, x), run(koleo_loss, x))
    assert counter.frame_count == 1


def gather() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    every = draw(4 * world, 5)
    own, whole = every.split(4)[rank], torch.distributed.group.WORLD
    for topk in (1, 3):
        loss, grad = run(koleo_loss, own, group=whole, topk=topk)
        torch.testing.assert_close(loss, reference.koleo_loss(own, every, 4 * rank, topk))
        # The gradients of one rank's rows come from the losses of all ranks.
        _, total = run(lambda x, topk=topk: world * reference.koleo_loss(x, x, 0, topk), every)
        torch.testing.assert_close(grad, total.split(4)[rank])
    torch.testing.assert_close(koleo_loss(own), truth(own)[0])  # without a group: this rank only
    others = torch.distributed.new_group(list(range(1, world)))
    if rank == 0:
        with pytest.raises(ValueError, match="group must contain this rank"):
            koleo_loss(own, group=others)
    else:
        rows = torch.cat(every.split(4)[1:])
        expected = reference.koleo_loss(own, rows, 4 * (rank - 1), 1)
        loss, grad = run(koleo_loss, own, group=others)
        torch.testing.assert_close(loss, expected)
        _, total = run(lambda x: (world - 1) * reference.koleo_loss(x, x, 0, 1), rows)
        torch.testing.assert_close(grad, total.split(4)[rank - 1])
    with pytest.raises(ValueError, match=rf"\[B, D\] must be the same .* got \[{rank + 2}, 5\]"):
        koleo_loss(draw(rank + 2), group=whole)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compare_their_rows(ranks):
    run_ranks(ranks, gather)


X = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("x", "options", "raises", "match"),
    [
        (X[0], {}, ValueError, r"x must be \[B, D\] with D >= 1, got shape \(5,\)"),
        (X[:, :0], {}, ValueError, r"got shape \(4, 0\)"),
        (X.long(), {}, TypeError, "x must have one of .*torch.int64"),
        (X, {"topk": 0}, ValueError, r"topk must be in 1..3 for 4 rows on all ranks, got 0"),
        (X, {"topk": 4}, ValueError, r"topk must be in 1..3 .*got 4"),
        (X, {"topk": 1.0}, TypeError, "topk must be an int, got float"),
        (X, {"eps": 0.0}, ValueError, "eps must be > 0 and finite, got 0.0"),
        (X, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    ],
)
def test_invalid_arguments(x, options, raises, match):
    with pytest.raises(raises, match=match):
        koleo_loss(x, **options)


def test_tensors_without_memory():
    x = torch.randn(6, 4, device="meta", requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert (loss.shape, x.grad.shape) == ((), (6, 4))

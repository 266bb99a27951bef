"""fastdino_kernels.linear_sinkhorn_center against sinkhorn_center of the logits.

Legend: N rows, D features, K prototypes.
"""

import importlib
import math

import pytest
import torch
from fastdino_kernels import linear_patch_loss, linear_sinkhorn_center, reference, sinkhorn_center
from fastdino_kernels.operators import ops

from fastdino.bench.measurement import peak_bytes
from tests.linear_layers import TEMPS, draw, error, run
from tests.processes import run_ranks

TEMP = 0.07
CPU = torch.device("cpu")


def draw_layer(N=23, D=6, K=60, dtype=torch.float64, seed=0):
    inputs = draw((N,), D=D, K=K, dtype=dtype, seed=seed)
    return inputs.x_student, inputs.weight_student


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 100])
@pytest.mark.parametrize("n_iterations", [1, 3])
def test_matches_the_reference_in_float64(n_iterations, chunk_rows, keep_logits):
    x, weight = draw_layer()
    center = linear_sinkhorn_center(
        x, weight, TEMP, n_iterations, chunk_rows=chunk_rows, keep_logits=keep_logits
    )
    logits = x @ weight.t()
    expected = reference.sinkhorn_knopp(logits, TEMP, n_iterations)
    got = ((logits - center) / TEMP).softmax(dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)
    same = sinkhorn_center(logits, TEMP, n_iterations)
    torch.testing.assert_close(center, same, rtol=1e-12, atol=1e-13)


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_equals_the_center_of_the_logits(keep_logits, dtype, target):
    x, weight = (t.to(target["device"]) for t in draw_layer(K=600, dtype=dtype))
    options = {"keep_logits": keep_logits, "chunk_rows": 9, "impl": target["impl"]}
    center = linear_sinkhorn_center(x, weight, torch.tensor(TEMP, device=x.device), **options)
    expected = sinkhorn_center(x @ weight.t(), TEMP, impl=target["impl"])
    assert center.dtype == torch.float32
    torch.testing.assert_close(center, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_autocast_multiplies_in_its_dtype(keep_logits):
    x, weight = draw_layer(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        center = linear_sinkhorn_center(x, weight, TEMP, keep_logits=keep_logits)
    expected = linear_sinkhorn_center(x.bfloat16(), weight.bfloat16(), TEMP)
    torch.testing.assert_close(center, expected)


def test_the_patch_loss_with_it_has_sinkhorn_targets():
    inputs = draw((9,))
    logits = inputs.x_teacher @ inputs.weight_teacher.t()
    center = linear_sinkhorn_center(inputs.x_teacher, inputs.weight_teacher, TEMP, chunk_rows=4)
    loss, *_ = run(linear_patch_loss, inputs._replace(center=center), teacher_temp=TEMP)
    probs = reference.sinkhorn_knopp(logits, TEMP, 3)
    student = inputs.x_student @ inputs.weight_student.t()
    rows = reference.soft_cross_entropy(student[None], probs[None], TEMPS["student_temp"], False)
    torch.testing.assert_close(loss, rows.mean(), rtol=1e-12, atol=0)


def test_huge_logits_do_not_overflow():
    x, weight = draw_layer(dtype=torch.float32)
    x[3:5] *= 1e5
    center = linear_sinkhorn_center(x, weight, TEMP, chunk_rows=4)
    assert center.isfinite().all()
    torch.testing.assert_close(center, sinkhorn_center(x @ weight.t(), TEMP), rtol=1e-5, atol=0.1)


def test_a_chunk_of_only_minus_infinity_counts_nothing():
    x, weight = torch.eye(4, 3), draw_layer(D=3)[1].float()
    weight[5, 0] = -math.inf
    logits = x[:, :1] @ weight[:, :1].t()  # inf * 0 elsewhere
    assert logits[0, 5] == -math.inf
    first, later = (linear_sinkhorn_center(x[:1, :1], weight[:, :1], TEMP, n, chunk_rows=1)
                    for n in (1, 2))  # fmt: skip
    torch.testing.assert_close(first, sinkhorn_center(logits[:1], TEMP, 1), equal_nan=True)
    torch.testing.assert_close(later, sinkhorn_center(logits[:1], TEMP, 2), equal_nan=True)


@pytest.mark.parametrize("n_iterations", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_a_chunk_has_only_minus_infinity_where_another_is_finite(flip, n_iterations, target):
    """The products of the rows of 10 overflow in one column."""
    x, weight = torch.tensor([[10.0], [10.0], [0.0], [0.0]]), draw_layer(D=1)[1].float()
    weight[5] = -3e38
    x = x.flip(0) if flip else x
    logits = x @ weight.t()
    assert logits[:, 5].isinf().tolist() == x[:, 0].gt(0).tolist()
    options = {"chunk_rows": 2, "impl": target["impl"]}
    layer = (x.to(target["device"]), weight.to(target["device"]))
    center = linear_sinkhorn_center(*layer, TEMP, n_iterations, **options).cpu()
    got = ((logits.double() - center) / TEMP).softmax(dim=1)
    expected = reference.sinkhorn_knopp(logits.double(), TEMP, n_iterations)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_no_rows_give_a_center_of_zeros(target):
    x, weight = (t.to(target["device"]) for t in draw_layer(N=0, dtype=torch.float32))
    for keep_logits in (False, True):
        center = linear_sinkhorn_center(x, weight, TEMP, keep_logits=keep_logits)
        assert torch.equal(center.cpu(), torch.zeros(60))


def test_memory_is_that_of_a_chunk_unless_logits_are_kept(monkeypatch):
    sinkhorn_torch = importlib.import_module("fastdino_kernels.sinkhorn_torch")
    monkeypatch.setattr(sinkhorn_torch, "BLOCK_ELEMENTS", 1 << 14)
    x, weight = draw_layer(N=128, K=8192, dtype=torch.float32)
    logits = 128 * 8192 * 4

    def peak(**options):
        return peak_bytes(lambda: linear_sinkhorn_center(x, weight, TEMP, **options), CPU)

    assert peak(chunk_rows=16) < logits / 4
    assert logits < peak(keep_logits=True) < logits * 5 / 4


def test_nothing_is_modified_and_nothing_gets_a_gradient():
    x, weight = (t.requires_grad_() for t in draw_layer())
    before = [t.detach().clone() for t in (x, weight)]
    assert not linear_sinkhorn_center(x, weight, TEMP).requires_grad
    assert all(map(torch.equal, before, (x, weight)))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("temp", [(0.07, None), (0.0, torch.tensor(0.07))])
def test_opcheck(impl, temp):
    x, weight = draw_layer(N=5, dtype=torch.bfloat16)
    options = (*temp, impl, torch.bfloat16, 2)
    for rows in (x, x[:0]):
        torch.library.opcheck(ops.linear_sinkhorn_columns.default, (rows, weight, *options))
        arguments = (rows, weight, torch.zeros(60), *options)
        torch.library.opcheck(ops.linear_sinkhorn_masses.default, arguments)


def test_compiles_as_one_graph(target):
    x, weight = (t.to(target["device"]) for t in draw_layer(dtype=torch.float32))

    def center(x, weight):
        return linear_sinkhorn_center(x, weight, TEMP, chunk_rows=9, impl=target["impl"])

    compiled = torch.compile(center, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), center(x, weight))


def balance_on_ranks() -> None:
    x, weight = draw_layer(N=9)
    expected = sinkhorn_center(x @ weight.t(), TEMP)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for counts in ((3, 6), (0, 9)):
        own = x.split(counts)[rank]
        for keep_logits in (False, True):
            center = linear_sinkhorn_center(
                own, weight, TEMP, keep_logits=keep_logits, chunk_rows=2
            )
            torch.testing.assert_close(center, expected)
    with pytest.raises(ValueError, match=rf"same on all ranks, got \[{60 - rank}, 3\]"):
        linear_sinkhorn_center(x, weight[: 60 - rank], TEMP)
    torch.distributed.destroy_process_group()


def test_ranks_with_unequal_counts():
    run_ranks(2, balance_on_ranks)


X, W = torch.zeros(4, 6), torch.zeros(7, 6)


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize(
    ("x", "weight", "options", "raises", "match"),
    [
        (X[0], W, {}, ValueError, r"x_teacher must be \[N, D\], got shape \(6,\)"),
        (X[None], W, {}, ValueError, r"got shape \(1, 4, 6\)"),
        (X, W.t(), {}, ValueError, r"weight_teacher must be .* D = 6 .*got shape \(6, 7\)"),
        (X, W[:0], {}, ValueError, "K >= 1"),
        (X.long(), W, {}, TypeError, "x_teacher .*torch.int64"),
        (X, [1.0], {}, TypeError, "weight_teacher must be a torch.Tensor, got list"),
        (X, W.half(), {}, ValueError, "same dtype .*got torch.float32 and torch.float16"),
        (X, W, {"temp": 0.0}, ValueError, r"temp must be > 0 .*got 0\.0"),
        (X, W, {"n_iterations": 0}, ValueError, "n_iterations must be >= 1, got 0"),
        (X, W, {"chunk_rows": -1}, ValueError, "chunk_rows must be >= 1 or None, got -1"),
        (X, W, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    ],
)
def test_invalid_arguments(x, weight, options, raises, match, keep_logits):
    with pytest.raises(raises, match=match):
        linear_sinkhorn_center(x, weight, **({"temp": TEMP, "keep_logits": keep_logits} | options))


def test_error_of_targets_is_small_in_fp32():
    x, weight = draw_layer(dtype=torch.float32)
    logits = x.double() @ weight.double().t()
    center = linear_sinkhorn_center(x, weight, TEMP, chunk_rows=5)
    got = ((logits - center) / TEMP).softmax(dim=1)
    assert error(got, reference.sinkhorn_knopp(logits, TEMP, 3)) < 1e-4

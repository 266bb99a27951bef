"""fastdino_kernels.sinkhorn_center and sinkhorn_knopp against the reference in float64.

`target` is an implementation and a device: PyTorch, and Triton on a GPU or interpreted on a CPU.
Legend: N rows, K prototypes.
"""

import importlib
import math
from unittest import mock

import pytest
import torch
from fastdino_kernels import (
    dino_loss,
    reference,
    sinkhorn_center,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from fastdino_kernels.operators import ops
from torch import Tensor

from fastdino.bench.measurement import peak_bytes
from tests.multi_tensor import capture, needs_cuda
from tests.processes import run_ranks

TEMP = 0.07
# Of fp32 targets: 1/TEMP times the rounding of a center of about 2.
LIMIT = 1e-5
# NumPy warns when the interpreter computes with NaN, inf - inf or 1 / 0.
numpy_warns = pytest.mark.filterwarnings(
    "ignore:(invalid value|All-NaN slice|divide by zero):RuntimeWarning"
)
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def draw(N=9, K=600, dtype=torch.float32, spread=1.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(N, K, generator=generator, dtype=torch.float64)).to(dtype)


def balance(teacher: Tensor, temp: float = TEMP, n_iterations: int = 3) -> Tensor:
    """Compute the targets in float64 in log space, where no logits overflow."""
    log_q = teacher.double() / temp
    for _ in range(n_iterations):
        log_q = log_q - log_q.logsumexp(dim=0)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


def targets_of(teacher: Tensor, center: Tensor, temp: float = TEMP) -> Tensor:
    return ((teacher.double() - center.double()) / temp).softmax(dim=1)


def on(target, teacher: Tensor, *args, function=sinkhorn_center, temp=TEMP) -> Tensor:
    temp = temp.to(target["device"]) if isinstance(temp, Tensor) else temp
    return function(teacher.to(target["device"]), temp, *args, impl=target["impl"]).cpu()


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("n_iterations", [1, 2, 3, 7])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 9), (40, 1), (5, 7), (70, 33), (3, 4096)])
def test_matches_the_reference_in_float64(N, K, n_iterations):
    teacher = draw(N, K, torch.float64)
    expected = reference.sinkhorn_knopp(teacher, TEMP, n_iterations)
    center = sinkhorn_center(teacher, TEMP, n_iterations)
    got = sinkhorn_knopp(teacher, TEMP, n_iterations)
    assert center.dtype == got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(targets_of(teacher, center), expected, rtol=1e-12, atol=1e-14)


def test_log_space_equals_the_reference():
    teacher = draw(dtype=torch.float64)
    torch.testing.assert_close(
        balance(teacher), reference.sinkhorn_knopp(teacher, TEMP, 3), rtol=1e-12, atol=1e-14
    )


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 7), (13, 600), (30, 33), (11, 1024), (6, 2500)])
def test_is_as_accurate_as_plain_pytorch_in_fp32(N, K, dtype, target):
    teacher = draw(N, K, dtype)
    expected = reference.sinkhorn_knopp(teacher.double(), TEMP, 3)
    plain = reference.sinkhorn_knopp(teacher.float(), TEMP, 3)
    center, probs = on(target, teacher), on(target, teacher, function=sinkhorn_knopp)
    assert center.dtype == probs.dtype == torch.float32
    # The center is stored in fp32, whose rounding is multiplied by 1/temp.
    slack = 2e-6 + center.abs().max().item() * 1.2e-7 / TEMP
    assert error(probs, expected) <= error(plain, expected) + slack
    assert error(targets_of(teacher, center), expected) <= error(plain, expected) + slack


@pytest.mark.parametrize("constants", [{"COLUMN_PROGRAMS": 1}, {"MAX_GROUPS": 3}, {"MAX_ROWS": 1},
                                       {"ROW_PROGRAMS": 3}, {"COLUMN_ROWS": 1}])  # fmt: skip
def test_launches_of_any_shape_agree(constants, target, monkeypatch):
    if target["impl"] != "triton":
        pytest.skip("constants of the Triton kernels")
    teacher = draw(23, 300)
    for name, value in constants.items():
        monkeypatch.setattr(
            importlib.import_module("fastdino_kernels.sinkhorn_triton"), name, value
        )
    assert error(targets_of(teacher, on(target, teacher)), balance(teacher)) < LIMIT


def test_dino_loss_with_the_center_has_sinkhorn_targets(target):
    student, teacher = draw(8, 100).reshape(4, 2, 100), draw(4, 100, seed=1)
    probs = reference.sinkhorn_knopp(teacher.double(), TEMP, 3).reshape(2, 2, 100)
    expected = soft_cross_entropy(student, probs, student_temp=0.1, ignore_diagonal=True)
    loss, _ = dino_loss(
        student, teacher.reshape(2, 2, 100), on(target, teacher), student_temp=0.1,
        teacher_temp=TEMP,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), expected.sum() / (6 * 2), rtol=1e-6, atol=0)


def test_center_has_the_documented_constant(target):
    teacher, center = draw(), torch.zeros(600)
    columns = (teacher.double() / TEMP).logsumexp(dim=0)
    center = TEMP * (columns - columns.logsumexp(dim=0) + math.log(600))
    torch.testing.assert_close(on(target, teacher, 1), center.float(), rtol=1e-5, atol=1e-6)
    center += TEMP * (600 * targets_of(teacher, center).mean(dim=0)).log()
    torch.testing.assert_close(on(target, teacher, 2), center.float(), rtol=1e-5, atol=1e-6)


def extreme(size: float, dtype: torch.dtype) -> Tensor:
    """Draw logits of which some rows, columns and elements are huge."""
    teacher = draw(9, 600, torch.float32)
    teacher[0, ::2], teacher[1] = size, -size
    teacher[:, 7], teacher[:, 8] = size, -size
    teacher[3:, 100:200] *= size
    return teacher.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 1e4), (torch.float32, 1e30)],
)
def test_huge_logits_do_not_overflow(dtype, size, target):
    teacher = extreme(size, dtype)
    center = on(target, teacher)
    assert center.isfinite().all()
    probs = on(target, teacher, function=sinkhorn_knopp)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(9), rtol=1e-6, atol=0)
    # fp32 has 24 bits: a center of this size is rounded to 2^-24 of it.
    if size == 1e4:
        assert error(probs, balance(teacher)) < 3e-7 * size / TEMP


def test_huge_logits_in_float64_match_log_space():
    teacher = extreme(1e4, torch.float64)
    torch.testing.assert_close(
        sinkhorn_knopp(teacher, TEMP), balance(teacher), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", [sinkhorn_center, sinkhorn_knopp])
def test_autocast_changes_nothing(function, dtype, target):
    teacher = draw(30, 700, dtype).to(target["device"])
    expected = function(teacher, TEMP, impl=target["impl"])
    with torch.autocast(target["device"], torch.bfloat16):
        assert torch.equal(function(teacher, TEMP, impl=target["impl"]), expected)


def test_each_rows_constant_changes_the_targets():
    """Subtracting each row's own maximum, as some ports do, computes something else."""
    teacher = draw(dtype=torch.float64)
    teacher[0] += 1
    shifted = teacher - teacher.amax(dim=1, keepdim=True)
    assert (sinkhorn_knopp(teacher, TEMP) - sinkhorn_knopp(shifted, TEMP)).abs().max() > 0.02


def test_same_input_gives_the_same_bits(target):
    teacher = draw(40, 1000, torch.bfloat16)
    assert torch.equal(on(target, teacher), on(target, teacher))


def test_input_is_not_modified_and_gets_no_gradient(target):
    teacher = draw().requires_grad_()
    before = teacher.detach().clone()
    for function in (sinkhorn_center, sinkhorn_knopp):
        assert not on(target, teacher, function=function).requires_grad
    assert torch.equal(teacher.detach(), before)


def test_strides(target):
    teacher = draw(6, 70)
    expected = on(target, teacher)
    for strided in (
        teacher.t().contiguous().t(),  # K is not contiguous: copied for Triton
        teacher.repeat_interleave(2, dim=1)[:, ::2],
        torch.cat([teacher, teacher], dim=1)[:, :70],
    ):
        assert not strided.is_contiguous()
        torch.testing.assert_close(on(target, strided), expected, rtol=1e-6, atol=1e-7)
    repeated = teacher[:1].expand(6, 70)
    assert error(targets_of(repeated, on(target, repeated)), balance(repeated)) < LIMIT


def test_offsets_beyond_32_bits(target):
    # The last row is at an offset of 2^31 elements, in reserved memory that is not touched.
    dense, stride = draw(3, 24, torch.float16), 1 << 30
    storage = torch.empty((2 << 30) + 24, dtype=torch.float16, device=target["device"])
    far = storage.as_strided((3, 24), (stride, 1))
    far.copy_(dense)
    for function in (sinkhorn_center, sinkhorn_knopp):
        got = function(far, TEMP, impl=target["impl"]).cpu()
        assert torch.equal(got, on(target, dense, function=function))


@numpy_warns
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_or_inf_makes_everything_nan(value, target):
    teacher = draw()
    teacher[4, 500] = value
    assert on(target, teacher).isnan().all()
    assert on(target, teacher, 1).isnan().all()
    assert on(target, teacher, function=sinkhorn_knopp).isnan().all()


@numpy_warns
def test_minus_infinity_is_probability_zero(target):
    teacher = draw()
    teacher[4, 100:500], teacher[:7, 3] = -math.inf, -math.inf
    probs = on(target, teacher, function=sinkhorn_knopp)
    assert probs[teacher == -math.inf].count_nonzero() == 0
    assert error(probs, balance(teacher)) < LIMIT
    for empty in ((slice(None), 3), 4):  # a prototype, a row
        teacher = draw()
        teacher[empty] = -math.inf
        assert on(target, teacher).isnan().all()


@numpy_warns
def test_columns_of_only_minus_infinity_have_sum_zero(target):
    """Other ranks may have finite logits of the same prototype."""
    teacher = draw()
    teacher[:, 3], teacher[:5, 7] = -math.inf, -math.inf
    largest, sums = ops.sinkhorn_columns(teacher.to(target["device"]), TEMP, None, target["impl"])
    exact = teacher.double()
    expected = ((exact - exact.amax(dim=0)) / TEMP).exp().sum(dim=0).nan_to_num(0)
    assert torch.equal(largest.cpu(), teacher.amax(dim=0))
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-5, atol=0)


@numpy_warns
@pytest.mark.parametrize("K", [24, 521])
def test_only_the_rows_are_read(K, target):
    """The last group of rows is not a full one, and NaN surrounds the logits."""
    dense = draw(9, K)
    memory = dense.new_full((16, K + 3), math.nan, device=target["device"])
    teacher = memory[:9, :K].copy_(dense)
    for function in (sinkhorn_center, sinkhorn_knopp):
        got = function(teacher, TEMP, impl=target["impl"]).cpu()
        torch.testing.assert_close(got, on(target, dense, function=function), rtol=1e-6, atol=1e-7)


def test_no_rows_give_a_center_of_zeros(target):
    empty = draw(0, 40, torch.bfloat16)
    assert torch.equal(on(target, empty), torch.zeros(40))
    assert on(target, empty, function=sinkhorn_knopp).shape == (0, 40)


def test_temperature_may_be_a_tensor(target):
    teacher = draw(dtype=torch.bfloat16)
    for temp in (torch.tensor(TEMP), torch.tensor(TEMP, dtype=torch.float64)):
        for function in (sinkhorn_center, sinkhorn_knopp):
            got, expected = (on(target, teacher, function=function, temp=t) for t in (temp, TEMP))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_cpu_memory_is_bounded_by_a_block_of_rows(monkeypatch):
    sinkhorn_torch = importlib.import_module("fastdino_kernels.sinkhorn_torch")
    monkeypatch.setattr(sinkhorn_torch, "BLOCK_ELEMENTS", 1 << 17)  # 2 rows of 64
    teacher = draw(64, 65536)
    center = peak_bytes(lambda: sinkhorn_center(teacher, TEMP), torch.device("cpu"))
    assert center < teacher.nbytes / 4
    probs = peak_bytes(lambda: sinkhorn_knopp(teacher, TEMP), torch.device("cpu"))
    assert probs < teacher.nbytes * 5 / 4


def test_triton_allocates_no_matrix_of_logits(monkeypatch):
    shapes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: shapes.append(a[0]) or empty(*a, **k))
    sinkhorn_center(draw(64, 600, torch.bfloat16), TEMP, impl="triton")
    assert max(math.prod(shape) for shape in shapes) <= 64 / 4 * 600
    assert len(shapes) > 5


@pytest.mark.parametrize("n_iterations", [1, 3])
def test_reads_of_the_logits(n_iterations, target):
    """One for the first iteration and two for each later one."""
    with mock.patch.object(
        importlib.import_module("fastdino_kernels.sinkhorn"), "ops", wraps=ops
    ) as counted:
        on(target, draw(), n_iterations)
    calls = [call[0] for call in counted.mock_calls]
    assert calls == ["sinkhorn_columns"] + ["sinkhorn_masses"] * (n_iterations - 1)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("temp", [(0.07, None), (0.0, torch.tensor(0.07))])
def test_opcheck(impl, temp):
    teacher, center = draw(5, 40, torch.bfloat16), torch.zeros(40)
    for arguments in ((teacher,), (teacher[:0],)):
        torch.library.opcheck(ops.sinkhorn_columns.default, (*arguments, *temp, impl))
        for op in (ops.sinkhorn_masses, ops.sinkhorn_probabilities):
            torch.library.opcheck(op.default, (*arguments, center, *temp, impl))


@pytest.mark.parametrize("function", [sinkhorn_center, sinkhorn_knopp])
def test_compiles_as_one_graph(function, target):
    teacher = draw().to(target["device"])

    def call(teacher, temp):
        return function(teacher, temp, impl=target["impl"])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for temp in (TEMP, torch.tensor(TEMP, device=target["device"])):
        torch.testing.assert_close(compiled(teacher, temp), call(teacher, temp))


@pytest.mark.gpu
@needs_cuda
def test_captured_graph_reads_logits_and_temperature_anew():
    teacher, temp = draw(64, 1000).cuda(), torch.tensor(TEMP, device="cuda")
    graph, center = capture(lambda: sinkhorn_center(teacher, temp))
    teacher.copy_(draw(64, 1000, seed=1))
    temp.fill_(0.05)
    graph.replay()
    torch.testing.assert_close(center, sinkhorn_center(teacher, 0.05))


# Several ranks

COUNTS = {2: [(3, 3), (5, 2), (0, 4)], 3: [(1, 7, 4), (0, 0, 6), (0, 0, 0)]}


def balance_on_ranks() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for counts in COUNTS[world]:
        for impl, dtype, size in (
            ("torch", torch.float64, 1), ("triton", torch.float32, 1), ("torch", torch.float32, 1e4)
        ):  # fmt: skip
            every = draw(sum(counts), 50, dtype, spread=size)
            own = every.split(counts)[rank]
            reduced = mock.Mock(wraps=torch.distributed.all_reduce)
            with mock.patch.object(torch.distributed, "all_reduce", reduced):
                center = sinkhorn_center(own, TEMP, impl=impl)
            sizes = [call.args[0].numel() for call in reduced.mock_calls]
            assert sizes.count(50) == 3 + 1  # a sum per iteration, and the maximum
            assert sum(sizes) <= 4 * 50 + 4
            if sum(counts) == 0:
                assert torch.equal(center, torch.zeros(50))
                continue
            probs = sinkhorn_knopp(own, TEMP, impl=impl)
            limit = 1e-12 if dtype == torch.float64 else 5e-7 * size / TEMP
            for got in (probs, targets_of(own, center)):
                assert len(own) == 0 or error(got, balance(every).split(counts)[rank]) < limit
            same = [torch.empty_like(center) for _ in range(world)]
            torch.distributed.all_gather(same, center)
            assert all(torch.equal(other, center) for other in same)
    check_minus_infinity(rank, world)
    check_groups(rank, world)
    torch.distributed.destroy_process_group()


def check_minus_infinity(rank: int, world: int) -> None:
    """Balance logits of which one rank has only -inf for a prototype."""
    every = draw(3 * world, 50, torch.float64)
    every[:3, 7] = -math.inf
    for n_iterations in (1, 3):
        probs = sinkhorn_knopp(every.split(3)[rank], TEMP, n_iterations)
        expected = balance(every, n_iterations=n_iterations).split(3)[rank]
        torch.testing.assert_close(probs, expected, rtol=1e-11, atol=1e-14)


def check_groups(rank: int, world: int) -> None:
    others = torch.distributed.new_group([rank_ for rank_ in range(world) if rank_ > 0])
    alone = torch.distributed.new_group([0])
    teacher = draw(4, 50, seed=rank)
    if rank == 0:
        expected = sinkhorn_center(teacher, TEMP, group=alone)
        assert error(targets_of(teacher, expected), balance(teacher)) < LIMIT
        with pytest.raises(ValueError, match="group must contain this rank"):
            sinkhorn_center(teacher, TEMP, group=others)
    elif world == 3:
        both = torch.cat([draw(4, 50, seed=1), draw(4, 50, seed=2)])
        probs = sinkhorn_knopp(teacher, TEMP, group=others)
        assert error(probs, balance(both).split(4)[rank - 1]) < LIMIT
    with pytest.raises(ValueError, match=rf"same on all ranks, got \[{50 + rank}, 3\] on this one"):
        sinkhorn_center(draw(4, 50 + rank), TEMP)
    compiled = torch.compile(sinkhorn_center, fullgraph=True, backend="aot_eager")
    teacher = draw(4, 50, torch.float64, seed=rank)
    torch.testing.assert_close(compiled(teacher, TEMP), sinkhorn_center(teacher, TEMP))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_unequal_counts(ranks):
    run_ranks(ranks, balance_on_ranks)


@pytest.mark.usefixtures("one_process_group")
def test_a_group_of_one_rank_equals_none():
    teacher = draw()
    assert error(targets_of(teacher, sinkhorn_center(teacher, TEMP)), balance(teacher)) < LIMIT


X = torch.zeros(4, 5)


@pytest.mark.parametrize("function", [sinkhorn_center, sinkhorn_knopp])
@pytest.mark.parametrize(
    ("teacher", "options", "raises", "match"),
    [
        (X[0], {}, ValueError, r"teacher must be \[N, K\] with K >= 1, got shape \(5,\)"),
        (X[None], {}, ValueError, r"got shape \(1, 4, 5\)"),
        (X[:, :0], {}, ValueError, r"got shape \(4, 0\)"),
        (X.long(), {}, TypeError, r"teacher .*torch.int64"),
        ([[1.0]], {}, TypeError, "teacher must be a torch.Tensor, got list"),
        (X, {"temp": 0.0}, ValueError, r"temp must be > 0 .*got 0\.0"),
        (X, {"temp": -1}, ValueError, "temp must be > 0 .*got -1"),
        (X, {"temp": math.inf}, ValueError, "finite, got inf"),
        (X, {"temp": math.nan}, ValueError, "finite, got nan"),
        (X, {"temp": "0.1"}, TypeError, "temp must be a float or a 0-d tensor, got str"),
        (X, {"temp": torch.ones(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
        (X, {"temp": torch.tensor(1.0, device="meta")}, ValueError, "on cpu .*got meta"),
        (X, {"n_iterations": 0}, ValueError, "n_iterations must be >= 1, got 0"),
        (X, {"n_iterations": 1.0}, TypeError, "n_iterations must be an int, got float"),
        (X, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        (X.double(), {"impl": "triton"}, ValueError, "torch.float64"),
    ],
)
def test_invalid_arguments(function, teacher, options, raises, match):
    with pytest.raises(raises, match=match):
        function(teacher, **({"temp": TEMP} | options))

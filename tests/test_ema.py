"""fastdino_kernels.ema_update_ against m*teacher + (1 - m)*student in float64."""

import math

import pytest
import torch
from fastdino_kernels import ema, ema_update_, pointer_table, reference
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.multi_tensor import (
    FLOATS,
    HALVES,
    SHAPES,
    assert_frame,
    capture,
    draw,
    far_tables,
    frames_around,
    needs_cuda,
    numpy_warns,
    strided,
    triton_only,
)
from tests.properties import given, settings, st


def truth(teacher, student, momentum):
    return reference.ema_update(
        [t.double() for t in teacher], [s.double() for s in student], momentum
    )


def assert_one_rounding(teacher, expected, *, roundings=1.0):
    for t, e in zip(teacher, expected, strict=True):
        slack = roundings * torch.finfo(t.dtype).eps
        torch.testing.assert_close(t.double(), e, rtol=slack, atol=slack)


def assert_shadows(shadow, teacher):
    for copy, t in zip(shadow, teacher, strict=True):
        assert torch.equal(copy, t.to(copy.dtype))


@pytest.mark.accuracy
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("student_dtype", FLOATS)
@pytest.mark.parametrize("teacher_dtype", FLOATS)
def test_update_is_exact_to_one_rounding(teacher_dtype, student_dtype, momentum, target):
    if target["impl"] == "triton" and torch.float64 in (teacher_dtype, student_dtype):
        pytest.skip("Triton computes in fp32")
    device = target["device"]
    teacher, student = draw(teacher_dtype, 0, device), draw(student_dtype, 1, device)
    expected = truth(teacher, student, momentum)
    before = [s.clone() for s in student]
    ema_update_(teacher, student, momentum, impl=target["impl"])
    assert_one_rounding(teacher, expected)
    assert all(t.dtype == teacher_dtype for t in teacher)
    assert all(map(torch.equal, student, before))


def test_a_hundred_steps_in_float64_agree_to_1e_12():
    teacher = draw(torch.float64)
    expected = [t.clone() for t in teacher]
    for step in range(100):
        momentum = 1 - 0.004 * (1 + math.cos(math.pi * step / 100)) / 2
        student = draw(torch.float64, seed=step)
        ema_update_(teacher, student, momentum)
        expected = reference.ema_update(expected, student, momentum)
    torch.testing.assert_close(teacher, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_momentum_may_be_a_tensor(student_dtype, teacher_dtype, target):
    if target["impl"] == "triton" and teacher_dtype == torch.float64:
        pytest.skip("Triton computes in fp32")
    device = target["device"]
    teacher, student = draw(teacher_dtype, 0, device), draw(student_dtype, 1, device)
    expected = truth(teacher, student, 0.3)
    momentum = torch.tensor(0.3, dtype=torch.float64, device=device)
    ema_update_(teacher, student, momentum, impl=target["impl"])
    # Half is rounded once, from fp32.
    eps, half = torch.finfo(teacher_dtype).eps, teacher_dtype in (torch.bfloat16, torch.float16)
    rounding = 0.51 * eps if half else 2 * eps
    for t, e in zip(teacher, expected, strict=True):
        assert t.dtype == teacher_dtype
        torch.testing.assert_close(t.double(), e, rtol=rounding, atol=1e-6 if half else rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp64_momentum_is_not_rounded_to_fp32(target, dtype):
    teacher = [torch.zeros(3, device=target["device"])]
    student = [torch.ones(3, device=target["device"])]
    momentum = torch.tensor(0.9996, dtype=dtype, device=target["device"])
    ema_update_(teacher, student, momentum, impl=target["impl"])
    error = abs(teacher[0][0].double().item() / (1 - 0.9996) - 1)
    assert error < 1e-7 if dtype == torch.float64 else 1e-5 < error < 1e-4


def test_momentum_of_one_keeps_the_teacher_bit_exact(target):
    teacher, student = draw(device=target["device"]), draw(seed=1, device=target["device"])
    before = [t.clone() for t in teacher]
    ema_update_(teacher, student, 1.0, impl=target["impl"])
    assert all(torch.equal(t, b) for t, b in zip(teacher, before, strict=True))


@triton_only
@numpy_warns
@pytest.mark.parametrize("as_tensor", [False, True])
def test_momenta_of_zero_and_one_are_exact_with_nan_and_inf(target, as_tensor):
    odd = torch.tensor([-0.0, math.inf, math.nan, 1e-40, 3.0], device=target["device"])
    even = torch.tensor([1.0, 1.0, 2.0, 1e30, math.nan], device=target["device"])
    for momentum, kept in ((1.0, odd), (0.0, even)):
        teacher = odd.clone()
        value = torch.tensor(momentum, device=target["device"]) if as_tensor else momentum
        ema_update_([teacher], [even], value, impl="triton")
        assert torch.equal(teacher.view(torch.int32), kept.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shadow_is_rounded_from_the_stored_teacher(dtype, target):
    """Rounding to fp16 and then to bf16 is not rounding to bf16."""
    from fastdino_kernels.ema_triton import CHUNK

    device, shapes = target["device"], [*SHAPES, (CHUNK + 5,), (2, CHUNK), (100,)]
    teacher, student = (draw(dtype, seed, device, shapes) for seed in (0, 1))
    shadow = [torch.full_like(t, math.nan, dtype=torch.bfloat16) for t in teacher]
    ema_update_(teacher, student, 0.3, shadow=shadow, impl=target["impl"])
    assert_shadows(shadow, teacher)


def test_dtypes_may_differ_within_one_call(target):
    shapes = [(n,) for n in (5, 9, 1, 4100, 33, 70, 8, 2, 6)]
    device = target["device"]
    teacher = draw(HALVES, 0, device, shapes)
    student = draw([HALVES[i // 3] for i in range(9)], 1, device, shapes)
    shadow = [torch.full_like(s, math.nan) for s in draw(HALVES[1:], 2, device, shapes)]
    expected = truth(teacher, student, 0.4)
    ema_update_(teacher, student, 0.4, shadow=shadow, impl=target["impl"])
    assert_one_rounding(teacher, expected, roundings=3)  # differences of normal numbers reach 8
    assert_shadows(shadow, teacher)


def test_module_parameters_are_updated_without_autograd(target):
    student, teacher = (torch.nn.Linear(3, 4, device=target["device"]) for _ in range(2))
    expected = truth(list(teacher.parameters()), list(student.parameters()), 0.9)
    versions = [t._version for t in teacher.parameters()]
    read = [s._version for s in student.parameters()]
    shadow = [torch.zeros_like(t) for t in teacher.parameters()]
    ema_update_(teacher.parameters(), student.parameters(), 0.9, shadow=shadow, impl=target["impl"])
    assert all(copy._version > 0 for copy in shadow)
    assert [s._version for s in student.parameters()] == read
    for t, e, version in zip(teacher.parameters(), expected, versions, strict=True):
        assert t.is_leaf
        assert t.requires_grad
        assert t.grad_fn is None
        assert t._version > version  # autograd refuses a graph that saved the old values
        torch.testing.assert_close(t.double(), e, rtol=1e-6, atol=1e-7)


@triton_only
def test_pairs_with_equal_strides_use_the_kernel(target, monkeypatch):
    teacher, student = (strided(target["device"]) for _ in range(2))
    assert not any(tensor.is_contiguous() for tensor in teacher + student)
    expected = truth(teacher, student, 0.7)
    monkeypatch.delattr(ema, "torch_ema_")
    ema_update_(teacher, student, 0.7, impl="triton")
    assert_one_rounding(teacher, expected, roundings=2)


def test_non_contiguous_tensors(target):
    device = target["device"]
    pairs = [
        (torch.randn(4, 6, device=device)[:, ::2], torch.randn(3, 4, device=device).t()),
        (torch.randn(4, 3, device=device), torch.randn(3, 4, device=device).t()),
        (torch.randn(5, device=device), torch.randn(1, device=device).expand(5)),
        (torch.randn(7, device=device), torch.randn(7, device=device)),
    ]
    teacher, student = map(list, zip(*pairs, strict=True))
    shadow = [t.bfloat16().contiguous() for t in teacher]
    expected = truth(teacher, student, 0.7)
    ema_update_(teacher, student, 0.7, shadow=shadow, impl=target["impl"])
    assert_one_rounding(teacher, expected, roundings=2)
    assert_shadows(shadow, teacher)


@triton_only
@pytest.mark.parametrize("dtype", HALVES)
def test_lengths_around_a_chunk_write_nothing_outside(target, dtype):
    from fastdino_kernels.ema_triton import CHUNK

    frames = frames_around(CHUNK, [7.0, math.nan], dtype, target["device"])
    teacher = [frame[0, inside].fill_(2.0) for frame, inside in frames]
    student = [frame[1, inside].fill_(4.0) for frame, inside in frames]
    ema_update_(teacher, student, 0.5, impl="triton")
    for frame, inside in frames:
        assert_frame(frame, inside, [7.0, math.nan], [3.0, 4.0])


@triton_only
def test_offsets_beyond_31_bits(target):
    from fastdino_kernels.ema_triton import CHUNK, launch_ema

    device = target["device"]
    teacher, student = torch.zeros(100, device=device), torch.ones(100, device=device)
    launch_ema(far_tables(CHUNK, [teacher, student]), 0.25)
    assert torch.equal(teacher, torch.full_like(teacher, 0.75))


@triton_only
def test_storage_may_move_between_calls(target):
    device = target["device"]
    teacher, student = draw(device=device), draw(seed=1, device=device)
    ema_update_(teacher, student, 0.5, impl="triton")
    kept = []
    for change in (
        lambda t: t.clone(),  # another address
        lambda t: t.bfloat16(),
        lambda t: t.view(-1),  # same address, another shape
        lambda t: t[: len(t) // 2],  # same address, another size
        lambda t: t.float(),
    ):
        for tensors in (teacher, student):
            for tensor in tensors:
                kept.append(tensor.data)  # so that addresses are not reused
                tensor.data = change(tensor.data.view(-1))
        expected = truth(teacher, student, 0.5)
        ema_update_(teacher, student, 0.5, impl="triton")
        assert_one_rounding(teacher, expected)


def test_new_size_layout_and_dtype_at_the_same_address_are_checked(target):
    t, s = (torch.zeros(6, device=target["device"]) for _ in range(2))
    ema_update_([t], [s], 0.5, impl=target["impl"])
    for other in (s[:5], s.view(2, 3).t()):
        with pytest.raises(ValueError, match=r"must have the same shape, got \(6,\) and"):
            ema_update_([t], [other], 0.5, impl=target["impl"])
    with pytest.raises(TypeError, match="int32"):
        ema_update_([t.view(torch.int32)], [s], 0.5, impl=target["impl"])


def test_same_input_gives_same_bits(target):
    runs = []
    for _ in range(2):
        teacher = draw(device=target["device"], shapes=[(5000,), (77,)])
        student = draw(torch.bfloat16, 1, target["device"], [(5000,), (77,)])
        ema_update_(teacher, student, 0.9, impl=target["impl"])
        runs.append(teacher)
    assert all(map(torch.equal, *runs))


@given(
    sizes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    dtypes=st.tuples(*[st.lists(st.sampled_from(HALVES), min_size=1, max_size=3)] * 3),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_random_lists_of_tensors(sizes, dtypes, momentum, seed):
    impl = "torch" if torch.cuda.is_available() else "triton"
    teacher, student, shadow = (draw(d, seed + i, "cpu", sizes) for i, d in enumerate(dtypes))
    expected = truth(teacher, student, momentum)
    ema_update_(teacher, student, momentum, shadow=shadow, impl=impl)
    assert_one_rounding(teacher, expected, roundings=6)  # differences of normal numbers reach 9
    assert_shadows(shadow, teacher)


def test_empty_lists_and_tensors(target):
    ema_update_([], [], 0.9, impl=target["impl"])
    ema_update_([], [], torch.tensor(0.9), shadow=[], impl=target["impl"])
    empty = [torch.zeros(0, 3, device=target["device"])]
    ema_update_(empty, [empty[0].clone()], 0.9, impl=target["impl"])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_as_one_graph(target, as_tensor):
    device = target["device"]
    teacher, student = draw(device=device), draw(torch.bfloat16, 1, device)
    expected, copies = [t.clone() for t in teacher], [t.bfloat16() for t in teacher]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(teacher, student, copies, momentum):
        ema_update_(teacher, student, momentum, shadow=copies, impl=target["impl"])
        return teacher[0] + 1  # reads the updated value

    for momentum in (0.9, 0.25):
        ema_update_(expected, student, momentum, impl=target["impl"])
        value = torch.tensor(momentum, dtype=torch.float64, device=device)
        after = update(teacher, student, copies, value if as_tensor else momentum)
        torch.testing.assert_close(teacher, expected)
        torch.testing.assert_close(copies, [e.bfloat16() for e in expected])
        torch.testing.assert_close(after, expected[0] + 1)


@triton_only
@pytest.mark.parametrize("with_shadow", [False, True])
def test_opcheck(target, with_shadow):
    device = target["device"]
    teacher, student = draw(device=device), draw(seed=1, device=device)
    shadow = [t.half() for t in teacher] if with_shadow else []
    momentum = torch.tensor(0.5, device=device) if with_shadow else None
    operator = torch.ops.fastdino_kernels.ema_update_.default
    torch.library.opcheck(operator, (teacher, student, shadow, 0.5, momentum))


def test_fake_tensors_are_checked_and_not_updated(target):
    with FakeTensorMode():
        teacher, student = draw(device=target["device"]), draw(device=target["device"])
        ema_update_(teacher, student, 0.9, impl=target["impl"])
        with pytest.raises(ValueError, match="same shape"):
            ema_update_(teacher[:1], student[1:2], 0.9, impl=target["impl"])


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("impl", ["torch"] if torch.cuda.is_available() else ["torch", "triton"])
def test_distributed_tensors_are_updated_shard_by_shard(mesh, impl):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    teacher, student = torch.randn(4, 3), torch.randn(4, 3)
    expected = truth([teacher], [student], 0.7)
    shards = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (teacher, student)]
    ema_update_(shards[:1], shards[1:], 0.7, impl=impl)
    assert_one_rounding([shards[0].full_tensor()], expected)
    whole = distribute_tensor(student, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"teacher_tensors\[0\] .*sharded alike.*Replicate"):
        ema_update_(shards[:1], [whole], 0.7, impl=impl)


@pytest.mark.gpu
@needs_cuda
def test_captured_graph_reads_the_momentum_anew():
    teacher, student = draw(device="cuda"), draw(torch.bfloat16, 1, "cuda")
    copies = [t.bfloat16() for t in teacher]
    momentum = torch.tensor(1.0, dtype=torch.float64, device="cuda")
    graph, _ = capture(lambda: ema_update_(teacher, student, momentum, shadow=copies))
    for value in (0.9, 0.25, 0.0):
        expected = truth(teacher, student, value)
        momentum.fill_(value)
        graph.replay()
        assert_one_rounding(teacher, expected)
        assert_shadows(copies, teacher)


@pytest.mark.gpu
@needs_cuda
def test_captured_graph_keeps_its_table_alive():
    teacher, student = draw(device="cuda"), draw(seed=1, device="cuda")
    graph, _ = capture(lambda: ema_update_(teacher, student, 0.5))
    for _ in range(2 * pointer_table._CACHED):
        ema_update_(draw(device="cuda"), draw(seed=1, device="cuda"), 0.5)
    torch.cuda.empty_cache()
    expected = truth(teacher, student, 0.5)
    graph.replay()
    assert_one_rounding(teacher, expected)


@pytest.mark.gpu
@needs_cuda
def test_streams_wait_for_shared_tables():
    shapes = [(n,) for n in (40_001, 3, 12_345)]  # unique, so that their owners are made here
    pairs = [[draw(seed=seed + i, device="cuda", shapes=shapes) for i in (0, 1)] for seed in (0, 2)]
    expected = [truth(*pair, 0.5) for pair in pairs]
    late, early = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        torch.cuda._sleep(2 * 10**8)  # a tenth of a second
        ema_update_(*pairs[0], 0.5, impl="triton")
    with torch.cuda.stream(early):
        ema_update_(*pairs[1], 0.5, impl="triton")
    torch.cuda.synchronize()
    for (teacher, _), values in zip(pairs, expected, strict=True):
        assert_one_rounding(teacher, values, roundings=3)


A, B = torch.zeros(2, 3), torch.ones(2, 3)
SPARSE, REPEATED = torch.ones(2, 3).to_sparse(), torch.zeros(1, 3).expand(2, 3)
OVERLAPPING = torch.zeros(5).as_strided((2, 3), (2, 1))


@pytest.mark.parametrize(
    ("teacher", "student", "options", "raises", "match"),
    [
        ([A], [B, B], {}, ValueError, "same length, got 1 and 2"),
        ([A, A], [B, B.t()], {}, ValueError, r"\[1\] .*got \(2, 3\) and \(3, 2\)"),
        ([A, A], [B, A], {}, ValueError, r"teacher_tensors\[0\] and teacher_tensors\[1\] share"),
        ([A], [A.detach()], {}, ValueError, "share memory"),
        ([A], [B.to("meta")], {}, ValueError, "same device, got cpu and meta"),
        ([A], [B.long()], {}, TypeError, r"student_tensors\[0\] .*torch.int64"),
        ([A.long()], [B], {}, TypeError, r"teacher_tensors\[0\] .*torch.int64"),
        ([A], [1.0], {}, TypeError, r"student_tensors\[0\] .*got float"),
        ([A, A + 0], [B, SPARSE], {}, TypeError, r"student.*\[1\] .*dense.*sparse_coo"),
        ([SPARSE], [B], {}, TypeError, r"teacher_tensors\[0\] .*dense.*sparse_coo"),
        ([A], [B], {"shadow": [SPARSE]}, TypeError, r"shadow\[0\] .*dense"),
        ([A], [B], {"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\], got 1\.1"),
        ([A], [B], {"momentum": math.nan}, ValueError, "momentum .*got nan"),
        ([A], [B], {"momentum": "most"}, TypeError, "momentum .*got str"),
        ([A], [B], {"momentum": torch.ones(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
        ([A], [B], {"shadow": []}, ValueError, "shadow .*got 1 and 0"),
        ([A], [B], {"shadow": [A]}, ValueError, r"teacher_tensors\[0\] and shadow\[0\] share"),
        ([A, B], [B + 1, A], {}, ValueError, r"teacher_tensors\[0\] and student_tensors\[1\]"),
        ([A, A], [B, B + 1], {}, ValueError, r"teacher_tensors\[0\] and teacher_tensors\[1\]"),
        ([A], [B], {"shadow": [B]}, ValueError, r"shadow\[0\] and student_tensors\[0\]"),
        ([A[0], A.view(-1)[1:4]], [B[0], B[1]], {}, ValueError, r"\[1\] share memory"),
        ([A], [A[:1].expand(2, 3)], {}, ValueError, "share memory"),
        ([OVERLAPPING], [A], {}, ValueError, r"teacher_tensors\[0\] .*no memory, .* \(2, 1\)"),
        ([A], [B], {"shadow": [REPEATED]}, ValueError, r"shadow\[0\] .*no memory, .* \(0, 1\)"),
        ([A], [B], {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ([], [], {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ([A.double()], [B], {"impl": "triton"}, ValueError, "fp32.*float64"),
    ],
)
def test_invalid_arguments_change_nothing(teacher, student, options, raises, match):
    with pytest.raises(raises, match=match):
        ema_update_(teacher, student, **({"momentum": 0.9} | options))
    assert torch.equal(A, torch.zeros(2, 3))
    assert torch.equal(B, torch.ones(2, 3))

"""fastdino_kernels.dino_loss against the reference in float64.

`target` is an implementation and a device: PyTorch, and Triton on a GPU or interpreted on a CPU.
Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import importlib
import math

import pytest
import torch
import triton
from fastdino_kernels import dino_loss, reference, soft_cross_entropy, teacher_entropy
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.multi_tensor import capture, needs_cuda, numpy_warns

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
HALF = [torch.float16, torch.bfloat16]
FLOATS = [*HALF, torch.float32]
# Relative spacing of the dtype in which a gradient is stored.
EPS = {dtype: torch.finfo(dtype).eps for dtype in (*HALF, torch.float32, torch.float64)}


def draw(S=4, T=2, B=3, K=7, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = spread * normal(S, B, K), spread * normal(T, B, K)
    return student.to(dtype), teacher.to(dtype), 0.1 * normal(K).float()


def truth(student, teacher, center, scale=1.0, dtype=torch.float64, **temps):
    """Return the reference's loss, gradient of scale*loss, and teacher sum in `dtype`."""
    student = student.detach().to(dtype).requires_grad_()
    loss, total = reference.dino_loss(
        student, teacher.to(dtype), center.to(dtype), **(temps or TEMPS)
    )
    (scale * loss).backward()
    return loss.detach(), student.grad, total


def ours(student, teacher, center, scale=1.0, impl="torch", device="cpu", **options):
    """Return the same of dino_loss, computed on `device`, on the CPU."""
    student = student.detach().to(device, copy=True).requires_grad_()
    options = {name: on(device, value) for name, value in (TEMPS | options).items()}
    loss, total = dino_loss(student, teacher.to(device), center.to(device), impl=impl, **options)
    (scale * loss).backward()
    return loss.detach().cpu(), student.grad.cpu(), total.cpu()


def on(device, value):
    return value.to(device) if isinstance(value, Tensor) else value


def interpreted(target):
    return target == {"impl": "triton", "device": "cpu"}


def wide_blocks(monkeypatch, prototypes):
    """Use fewer, wider blocks: a program of the interpreter costs the same for any width."""
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    width = max(pairwise_triton.FORWARD_BLOCK, triton.next_power_of_2(prototypes // 4))
    monkeypatch.setattr(pairwise_triton, "FORWARD_BLOCK", width)
    monkeypatch.setattr(pairwise_triton, "BACKWARD_BYTES", 4 * width)


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    difference = (got.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-30)).item()


def assert_accurate(inputs, *, loss=math.inf, grad=math.inf, total=math.inf, **options):
    """Compare with the reference in float64, with limits of the relative errors."""
    results = zip(ours(*inputs, **options), truth(*inputs), (loss, grad, total), strict=True)
    for got, expected, limit in results:
        assert error(got, expected) < limit


@pytest.mark.parametrize(("S", "T"), [(2, 1), (2, 2), (10, 2), (5, 3), (3, 3)])
@pytest.mark.parametrize(("B", "K"), [(1, 1), (3, 7), (2, 1000), (3, 4096)])
def test_matches_the_reference_in_float64(S, T, B, K):
    inputs = draw(S, T, B, K, torch.float64)
    torch.testing.assert_close(ours(*inputs), truth(*inputs), rtol=1e-12, atol=1e-14)


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("S", [2, 4, 10, 12])
@pytest.mark.parametrize("K", [1, 7, 1000, 4096, 65536, 65537])
def test_is_at_least_as_accurate_as_plain_pytorch(dtype, S, T, K, target, monkeypatch):
    if interpreted(target):
        if K >= 4096 and dtype != FLOATS[(S // 2 + T + K) % 3]:
            pytest.skip("the interpreter is slow: one dtype per size")
        wide_blocks(monkeypatch, K)
    inputs = draw(S, T, 2, K, dtype)
    expected = truth(*inputs)
    plain = truth(*inputs, dtype=dtype)
    loss, grad, total = ours(*inputs, **target)
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float32, dtype, torch.float32)
    assert error(loss, expected[0]) <= error(plain[0], expected[0]) + 5e-7
    assert error(grad, expected[1]) <= error(plain[1], expected[1]) + 1e-6
    assert error(total, expected[2]) <= error(plain[2], expected[2]) + 5e-7


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("S", "T", "B", "K"), [(3, 3, 2, 700), (4, 2, 5, 600)])
def test_groups_of_images_with_default_blocks(S, T, B, K, target, monkeypatch):
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    monkeypatch.setattr(pairwise_triton, "MAX_GROUPS", 2)  # five images: three and two
    monkeypatch.setattr(pairwise_triton, "SUM_GROUPS", 1)  # added one after the other
    assert_accurate(draw(S, T, B, K), loss=5e-7, grad=2e-6, total=5e-7, **target)


def test_last_program_sums_rows_in_several_rounds(target, monkeypatch):
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    monkeypatch.setattr(pairwise_triton, "FINISH_BLOCK", 8)
    assert_accurate(draw(3, 2, 7, 20), loss=5e-7, total=5e-7, **target)


def test_dino_size_with_default_configuration(target):
    inputs = draw(2, 2, 1, 65536, torch.bfloat16)
    assert_accurate(inputs, loss=5e-7, grad=EPS[torch.bfloat16], total=5e-7, **target)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [16, 513, 1000, 1004, 4104])
def test_rows_that_chunks_do_not_divide(dtype, K, target):
    inputs = draw(5, 3, 3, K, dtype)
    assert_accurate(inputs, loss=5e-7, grad=max(EPS[dtype], 2e-6), total=5e-7, **target)


VIEWS = {
    "offset": lambda x: at_offset(x, 1),
    "long rows": lambda x: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]],
    "not the first column": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
    "aligned view": lambda x: torch.nn.functional.pad(x, (8, 8))[..., 8:-8],
}


def at_offset(x: Tensor, offset: int) -> Tensor:
    """Copy to an address that is `offset` elements beyond an aligned one."""
    return x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["student", "teacher", "center"])
def test_rows_at_any_address(dtype, view, which, target):
    inputs = dict(zip(("student", "teacher", "center"), draw(3, 2, 2, 520, dtype), strict=True))
    expected = ours(*inputs.values(), **target)
    on_device = {name: tensor.to(target["device"]) for name, tensor in inputs.items()}
    on_device[which] = VIEWS[view](on_device[which])
    student = on_device["student"].requires_grad_()
    loss, total = dino_loss(
        student, on_device["teacher"], on_device["center"], impl=target["impl"], **TEMPS
    )
    (grad,) = torch.autograd.grad(loss, student)
    for got, want in zip((loss.detach(), grad, total), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=EPS[dtype] * 1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_only_rows_at_multiples_of_16_bytes_are_read_as_vectors(dtype):
    are_aligned = importlib.import_module("fastdino_kernels.pairwise_triton")._are_aligned
    crops = draw(3, 2, 2, 520, dtype)[0]
    views = {name: are_aligned(view(crops)) for name, view in VIEWS.items()}
    assert views == {name: name == "aligned view" for name in VIEWS}
    assert are_aligned(crops, None)
    assert not are_aligned(crops, at_offset(crops, 1))


@numpy_warns  # of elements beyond the last prototype
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("K", [7, 520, 1001])
def test_ragged_rows_of_extreme_or_equal_logits(K, target):
    student, teacher, center = draw(4, 2, 4, K)
    student[:, 0], teacher[:, 0] = 0, 0
    student[:, 1, -1], teacher[:, 1, -1] = 1e4, 1e4
    student[:, 2] -= 1e4
    teacher[:, 2] -= 1e4
    teacher[0, 3, : K - 1] = -1e4
    # A center would be subtracted from 1e4, and rounded.
    assert_accurate((student, teacher, 0 * center), loss=2e-6, grad=2e-5, total=2e-6, **target)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_loss_is_computed_in_fp32(dtype, target):
    assert_accurate(draw(6, 2, 4, 1000, dtype), loss=1e-6, total=1e-6, **target)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_gradient_is_rounded_once_after_scaling(dtype, target, monkeypatch):
    if interpreted(target):
        wide_blocks(monkeypatch, 4 * 4096)
    # Unscaled, a good part of these gradients would be zero in fp16.
    inputs = draw(4, 2, 16, 4096, dtype, spread=0.02)
    scale = 2.0**14
    expected = truth(*inputs, scale=scale)[1]
    grad = ours(*inputs, scale=scale, **target)[1].double()
    slack = expected.abs() * EPS[dtype] * 0.51 + expected.abs().max() * 4e-7
    if dtype == torch.float16:
        slack += 2.0**-25  # half a subnormal step
        rounded_early = ((expected / scale).to(dtype) * scale).double()
        assert ((rounded_early - expected).abs() > slack).double().mean() > 0.1
    assert ((grad - expected).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_a_constant_to_a_row_changes_nothing(dtype, target):
    student, teacher, center = draw(4, 2, 3, 64, torch.float32)
    # Multiples of 1/8 shift exactly, so the logits really are equal up to the constant.
    student, teacher = (student * 8).round() / 8, (teacher * 8).round() / 8
    loss, grad, _ = ours(student.to(dtype), teacher.to(dtype), center, **target)
    shifted = ours((student + 8).to(dtype), (teacher - 8).to(dtype), center, **target)
    torch.testing.assert_close(shifted[0], loss, rtol=1e-4, atol=0)
    assert error(shifted[1], grad) < 1e-4 + EPS[dtype]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e4), (torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e30)],
)
def test_extreme_logits_stay_finite_and_accurate(dtype, size, target):
    student, teacher, center = draw(4, 2, 3, 64, dtype)
    student[:, :, 5], student[:, :, 6] = size, -size
    teacher[:, :, 5], teacher[:, :, 7] = size, -size
    expected = truth(student, teacher, center)
    loss, grad, total = ours(student, teacher, center, **target)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert total.isfinite().all()
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-3, atol=1e-7)


def test_large_logits_far_from_zero_lose_no_digits(target):
    # All near 1e4: scaled by 1/0.1 before the maximum is subtracted, they would keep two decimals.
    student, teacher, center = draw(4, 2, 3, 600)
    assert_accurate((student + 1e4, teacher + 1e4, 0 * center), loss=1e-6, grad=1e-5, **target)


@numpy_warns
def test_infinite_logits_match_pytorch(target):
    student, teacher, center = draw(2, 2, 6, 600)
    student[1, 0] = -math.inf  # no distribution: NaN
    student[1, 1, 3] = -math.inf  # an infinite loss, as the teacher gives it some probability
    student[1, 2, :512] = -math.inf  # likewise, all of a chunk
    teacher[0, 2] *= 0.01
    student[1, 3, 5], teacher[0, 3, 5] = -math.inf, -math.inf  # 0 * inf: NaN
    teacher[0, 4, :520] = -math.inf  # well defined
    teacher[0, 5] = -math.inf  # no distribution: NaN
    for b in range(6):
        image = student[:, b : b + 1], teacher[:, b : b + 1], center
        expected, got = truth(*image), ours(*image, **target)
        torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(
            got[1].double(), expected[1], rtol=1e-4, atol=1e-6, equal_nan=True
        )
    kinds = [truth(student[:, b : b + 1], teacher[:, b : b + 1], center)[0] for b in range(6)]
    assert [k.isnan().item() for k in kinds] == [True, False, False, True, False, True]
    assert [k.isinf().item() for k in kinds] == [False, True, True, False, False, False]


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_offsets_beyond_32_bits(inplace_backward, target):
    # The last image is at an offset of 2^31 elements, in reserved memory that is not touched.
    S, T, B, K, stride = 2, 2, 3, 24, 1 << 30
    dense = draw(S, T, B, K, torch.float16)
    shapes = (((S, B, K), (K, stride, 1)), ((T, B, K), (K, stride, 1)))
    storage = torch.empty((2 << 30) + 2 * S * K, dtype=torch.float16, device=target["device"])
    far = [
        storage.as_strided(shape, strides, offset)
        for (shape, strides), offset in zip(shapes, (0, S * K), strict=True)
    ]
    for view, values in zip(far, dense, strict=False):
        view.copy_(values)
    expected = ours(*dense, **target)
    student = far[0].requires_grad_()
    center = dense[2].to(target["device"])
    options = TEMPS | {"impl": target["impl"], "inplace_backward": inplace_backward}
    if inplace_backward:  # the teacher needs its own memory
        far[1] = far[1].clone()
    loss, total = dino_loss(student, far[1], center, **options)
    (grad,) = torch.autograd.grad(loss, student)
    for got, want in zip((loss.detach(), grad, total), expected, strict=True):
        assert torch.equal(got.cpu(), want)


def test_blocks_cover_a_batch_they_do_not_divide():
    B = 2 * torch.get_num_threads() + 1
    assert_accurate(draw(3, 2, B, 40_000), loss=1e-6, grad=1e-5, total=1e-6)


def test_empty_batch_has_loss_zero(target):
    inputs = draw(4, 2, 0, 7)
    for loss, grad, total in (ours(*inputs, **target), truth(*inputs)):
        assert loss == 0
        assert grad.shape == (4, 0, 7)
        assert torch.equal(total, torch.zeros_like(total))


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_non_contiguous_inputs(inplace_backward, target):
    student, teacher, center = draw(4, 2, 3, 70)
    expected = ours(student, teacher, center, **target)
    strided = (
        (student.permute(2, 0, 1), (1, 2, 0)),  # K is not contiguous: copied
        (student.permute(1, 0, 2), (1, 0, 2)),  # image after image: not copied
    )
    teacher = teacher.repeat_interleave(2, dim=-1).to(target["device"])[..., ::2]
    center = center.repeat_interleave(3).to(target["device"])[::3][None]
    for values, order in strided:
        leaf = values.contiguous().to(target["device"]).requires_grad_()
        logits = (1 * leaf).permute(order)
        assert not logits.is_contiguous()
        loss, total = dino_loss(
            logits, teacher, center, inplace_backward=inplace_backward, impl=target["impl"], **TEMPS
        )
        (grad,) = torch.autograd.grad(loss, logits)
        for got, want in zip((loss.detach(), grad, total), expected, strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-8)


def test_gradient_may_be_written_over_the_logits(target):
    student, teacher, center = draw(4, 2, 3, 70)
    expected = ours(student, teacher, center, **target)
    leaf, teacher, center = (x.to(target["device"]) for x in (student, teacher, center))
    logits = 1 * leaf.requires_grad_()
    options = TEMPS | {"impl": target["impl"], "inplace_backward": True}
    loss, _ = dino_loss(logits, teacher, center, **options)
    other, _ = dino_loss(logits, teacher, center, **options)
    loss.backward()
    assert torch.equal(leaf.grad.cpu(), expected[1])
    assert torch.equal(logits.detach().cpu(), expected[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_gradient_is_not_written_over_logits_of_a_kept_graph(target):
    student, teacher, center = draw(4, 2, 3, 70)
    expected = ours(student, teacher, center, **target)[1]
    leaf, teacher, center = (x.to(target["device"]) for x in (student, teacher, center))
    logits = 1 * leaf.requires_grad_()
    options = TEMPS | {"impl": target["impl"], "inplace_backward": True}
    loss, _ = dino_loss(logits, teacher, center, **options)
    loss.backward(retain_graph=True)
    assert torch.equal(logits.detach().cpu(), student)
    loss.backward()
    assert torch.equal(leaf.grad.cpu(), 2 * expected)
    assert torch.equal(logits.detach().cpu(), expected)


def test_inplace_backward_rejects_shared_memory():
    student, teacher, center = draw(4, 2, 3, 8)
    options = TEMPS | {"inplace_backward": True}
    with pytest.raises(ValueError, match=r"share no memory, got strides \(0, 8, 1\)"):
        dino_loss(student[:1].expand(4, 3, 8), teacher, center, **options)
    with pytest.raises(ValueError, match="got student and teacher in the same storage"):
        dino_loss(student, student[:2], center, **options)


def test_teacher_and_center_are_constants():
    student, teacher, center = draw()
    teacher.requires_grad_()
    center.requires_grad_()
    before = center.detach().clone()
    loss, total = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    assert loss.requires_grad
    assert not total.requires_grad
    loss.backward()
    assert teacher.grad is None
    assert center.grad is None
    assert torch.equal(center, before)


def test_center_may_change_before_the_backward_pass(target):
    inputs = draw()
    expected = ours(*inputs, **target)[1]
    student, teacher, center = (x.to(target["device"], copy=True) for x in inputs)
    loss, _ = dino_loss(student.requires_grad_(), teacher, center, impl=target["impl"], **TEMPS)
    center.add_(100)
    loss.backward()
    assert torch.equal(student.grad.cpu(), expected)


def test_temperatures_may_be_tensors(target):
    inputs = draw()
    expected = ours(*inputs, **target)
    for names in (["student_temp"], ["teacher_temp"], list(TEMPS)):
        temps = {name: torch.tensor(TEMPS[name]) for name in names}
        got = ours(*inputs, **temps, **target)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_mixed_dtypes_compute_in_the_wider_dtype():
    student, teacher, center = draw(dtype=torch.bfloat16)
    loss, grad, total = ours(student, teacher.double(), center.bfloat16().double())
    assert (loss.dtype, grad.dtype, total.dtype) == (torch.float64, student.dtype, torch.float64)


def test_student_and_teacher_may_differ_in_dtype(target):
    student, teacher, center = draw(K=600, dtype=torch.bfloat16)
    expected = truth(student, teacher, center)
    loss, grad, _ = ours(student, teacher.float(), center, **target)
    assert (loss.dtype, grad.dtype) == (torch.float32, student.dtype)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    assert error(grad, expected[1]) < EPS[torch.bfloat16]


def test_same_input_gives_same_bits(target):
    inputs = draw(4, 2, 3, 1200)
    assert all(map(torch.equal, ours(*inputs, **target), ours(*inputs, **target)))


@pytest.mark.gpu
@needs_cuda
def test_last_program_sees_every_row():
    student, teacher, center = (x.cuda() for x in draw(10, 2, 600, 32))
    probs = torch.softmax((teacher - center) / 0.04, dim=-1)
    rows = soft_cross_entropy(student, probs, student_temp=0.1, ignore_diagonal=True)
    first, _ = dino_loss(student, teacher, center, impl="triton", **TEMPS)
    torch.testing.assert_close(first, rows.double().sum().float() / (18 * 600), rtol=1e-5, atol=0)
    busy, work = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(busy):
            work @ work
        assert torch.equal(dino_loss(student, teacher, center, impl="triton", **TEMPS)[0], first)


def test_new_temperature_does_not_recompile(target):
    student, teacher, center = (x.to(target["device"]) for x in draw())
    counter = CompileCounterWithBackend("aot_eager")

    def step(student, teacher_temp):
        options = {"student_temp": 0.1, "teacher_temp": teacher_temp, "impl": target["impl"]}
        return dino_loss(student, teacher, center, **options)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for epoch in range(12):
        temp = 0.04 + 0.001 * epoch
        torch.testing.assert_close(compiled(student, temp), step(student, temp))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(dtype, target):
    if dtype == torch.float64:
        target = target | {"impl": "torch"}
    inputs = draw(dtype=dtype)
    expected = ours(*inputs, **target)
    with torch.autocast(target["device"], dtype=torch.bfloat16):
        got = ours(*inputs, **target)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_gradcheck():
    student, teacher, center = draw(3, 2, 2, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: dino_loss(s, teacher, center, impl="torch", **TEMPS)[0], student.requires_grad_()
    )


def test_second_derivative_is_an_error():
    student, teacher, center = draw()
    loss, _ = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_as_one_graph(inplace_backward, target):
    inputs = draw(dtype=torch.bfloat16)

    def step(student, teacher, center):
        options = TEMPS | {"impl": target["impl"], "inplace_backward": inplace_backward}
        loss, total = dino_loss(2 * student, teacher, center, **options)
        return loss * 2, total

    student, teacher, center = (x.to(target["device"]) for x in inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaf = student.clone().requires_grad_()
        loss, total = run(leaf, teacher, center)
        loss.backward()
        results.append((loss.detach(), leaf.grad, total))
    assert all(map(torch.equal, *results))


def test_fake_tensors_pass_through(target):
    with FakeTensorMode():
        student = torch.randn(4, 3, 7, device=target["device"], requires_grad=True)
        teacher, center = (torch.randn(s, device=target["device"]) for s in ((2, 3, 7), (7,)))
        loss, total = dino_loss(student, teacher, center, impl=target["impl"], **TEMPS)
        loss.backward()
    assert (loss.shape, total.shape, student.grad.shape) == ((), (7,), (4, 3, 7))


@pytest.mark.gpu
@needs_cuda
def test_captured_graph_reads_inputs_and_temperatures_anew():
    student, teacher, center = (x.cuda() for x in draw(4, 2, 3, 4096, torch.bfloat16))
    student.requires_grad_()
    temps = {name: torch.tensor(value, device="cuda") for name, value in TEMPS.items()}

    def step():
        student.grad = None
        loss, total = dino_loss(student, teacher, center, impl="triton", **temps)
        loss.backward()
        return loss.detach(), student.grad, total

    graph, captured = capture(step)
    others = draw(4, 2, 3, 4096, torch.bfloat16, seed=1)
    with torch.no_grad():
        for mine, other in zip((student, teacher, center), others, strict=True):
            mine.copy_(other)
        temps["teacher_temp"].fill_(0.07)
    graph.replay()
    expected = ours(*others, impl="triton", device="cuda", student_temp=0.1, teacher_temp=0.07)
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("each_crop", [False, True])
@pytest.mark.parametrize(
    ("S", "T", "ignore_diagonal"),
    [(1, 1, False), (1, 3, False), (2, 2, False), (2, 2, True), (5, 2, True)],
)
def test_rows_and_weights_match_the_reference(S, T, ignore_diagonal, each_crop, reduction, target):
    tensors = [x.double() for x in draw(S, T, 4, 600)]
    options = {"ignore_diagonal": ignore_diagonal, "reduction": reduction}
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand((S, 4) if each_crop else (4,), generator=generator)
    expected = weighted_truth(*tensors, weights, **options)
    got = weighted_ours(*tensors, weights, **options, **target)
    limits = (5e-7, 2e-6) if target["impl"] == "triton" else (1e-14, 1e-14)
    for g, e, limit in zip(got, expected, limits, strict=True):
        assert g.shape == e.shape
        assert error(g, e) < limit


def weighted_truth(student, teacher, center, weights, ignore_diagonal, reduction):
    """Return the rows or their mean over pairs and images, and the gradient of 2 * its sum."""
    S, B, T = len(student), student.shape[1], len(teacher)
    leaf = student.clone().requires_grad_()
    probs = torch.softmax((teacher - center) / 0.04, dim=-1)
    rows = reference.soft_cross_entropy(leaf, probs, 0.1, ignore_diagonal) * weights
    pairs = S * T - (min(S, T) if ignore_diagonal else 0)
    result = rows if reduction == "none" else rows.sum() / (pairs * B)
    (result * 2).sum().backward()
    return result.detach(), leaf.grad


def weighted_ours(student, teacher, center, weights, impl, device, **options):
    """Return the same of dino_loss, on the CPU."""
    dtype = torch.float32 if impl == "triton" else student.dtype
    leaf = student.to(device, dtype, copy=True).requires_grad_()
    tensors = (teacher.to(device, dtype), center.to(device, dtype))
    options |= {"weights": weights.to(device), "impl": impl}
    result, _ = dino_loss(leaf, *tensors, **TEMPS, **options)
    (result * 2).sum().backward()
    return result.detach().cpu(), leaf.grad.cpu()


def test_rows_have_their_own_gradients(target):
    student, teacher, center = draw(3, 2, 4, 70)
    incoming = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    probs = torch.softmax((teacher - center) / 0.04, dim=-1)
    grads = []
    for loss_fn in (
        lambda s: dino_loss(
            s, teacher.to(s.device), center.to(s.device),
            reduction="none", impl=target["impl"], **TEMPS,
        )[0],
        lambda s: soft_cross_entropy(
            s, probs.to(s.device), student_temp=0.1, ignore_diagonal=True, impl=target["impl"]
        ),
    ):  # fmt: skip
        leaf = student.to(target["device"], copy=True).requires_grad_()
        rows = loss_fn(leaf)
        rows.backward(incoming.to(target["device"]))
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_an_empty_batch(reduction, target):
    inputs = (*draw(3, 2, 0, 7), torch.ones(3, 0))
    result, grad = weighted_ours(*inputs, reduction=reduction, **target)
    assert result.shape == ((3, 0) if reduction == "none" else ())
    assert result.sum() == 0
    assert grad.shape == (3, 0, 7)


def call(student=(4, 3, 7), teacher=(2, 3, 7), center=(7,), **changes):
    tensors = [
        shape if not isinstance(shape, tuple) else torch.zeros(shape)
        for shape in (student, teacher, center)
    ]
    return dino_loss(*tensors, **{**TEMPS, **changes})


@pytest.mark.parametrize(
    ("changes", "raises", "match"),
    [
        ({"student": (12, 7)}, ValueError, r"student must be \[S, B, K\], got shape \(12, 7\)"),
        ({"teacher": (6, 7)}, ValueError, r"teacher must be .* got shape \(6, 7\)"),
        ({"teacher": (2, 3, 8), "center": (8,)}, ValueError, r"\(4, 3, 7\) and \(2, 3, 8\)"),
        ({"teacher": (2, 4, 7)}, ValueError, r"\(4, 3, 7\) and \(2, 4, 7\)"),
        ({"center": (8,)}, ValueError, r"center must be .* K = 7, got shape \(8,\)"),
        ({"center": (7, 1)}, ValueError, r"center must be .* got shape \(7, 1\)"),
        ({"student": (1, 3, 7)}, ValueError, "S = 1 and T = 2"),
        ({"student": (1, 3, 7), "teacher": (1, 3, 7)}, ValueError, "leaves no pairs"),
        ({"teacher": (0, 3, 7)}, ValueError, "T, K >= 1"),
        ({"student": (4, 3, 0), "teacher": (2, 3, 0), "center": (0,)}, ValueError, "K >= 1"),
        ({"student": [1.0]}, TypeError, "student must be a torch.Tensor, got list"),
        ({"student": torch.zeros(4, 3, 7).long()}, TypeError, "student.*torch.int64"),
        ({"teacher": torch.zeros(2, 3, 7, device="meta")}, ValueError, "same device.*meta"),
        ({"student": (0, 3, 7), "ignore_diagonal": False}, ValueError, "S >= 1"),
        ({"reduction": "sum"}, ValueError, 'reduction must be "mean" or "none", got \'sum\''),
        (
            {"weights": torch.ones(4)},
            ValueError,
            r"weights must be \[B\] = \[3\] or \[S, B\] = \[4, 3\], got shape \[4\]",
        ),
        ({"weights": torch.ones(3, 4)}, ValueError, r"got shape \[3, 4\]"),
        ({"weights": -torch.ones(4, 3)}, ValueError, "weights must be >= 0, got -1"),
        ({"weights": torch.ones(3).int()}, TypeError, "weights .*got torch.int32"),
        ({"weights": torch.ones(3, device="meta")}, ValueError, "weights and student .*meta"),
        ({"student_temp": 0.0}, ValueError, r"student_temp must be > 0 .*got 0\.0"),
        ({"teacher_temp": -1}, ValueError, "teacher_temp must be > 0 .*got -1"),
        ({"teacher_temp": math.nan}, ValueError, "teacher_temp must be > 0 .*got nan"),
        ({"teacher_temp": "warm"}, TypeError, "teacher_temp .*got str"),
        ({"teacher_temp": torch.ones(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'torch'.*got 'cuda'"),
    ],
)
def test_invalid_arguments(changes, raises, match):
    with pytest.raises(raises, match=match):
        call(**changes)


def test_teacher_entropy():
    _, teacher, center = draw(T=2, B=5, K=1000, dtype=torch.bfloat16)
    expected = reference.teacher_entropy(teacher.double(), center.double(), 0.04)
    got = teacher_entropy(teacher, center, 0.04)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    uniform = teacher_entropy(torch.zeros(2, 3, 50), torch.zeros(1, 50), 0.04)
    torch.testing.assert_close(uniform.item(), math.log(50), rtol=1e-6, atol=0)
    one_hot = teacher_entropy(1e6 * torch.eye(4)[None], torch.zeros(4), 0.04)
    assert one_hot == 0
    with pytest.raises(ValueError, match="B >= 1"):
        teacher_entropy(torch.zeros(2, 0, 7), torch.zeros(7), 0.04)


def test_loss_equals_entropy_if_student_equals_teacher():
    logits = draw(1, 1, 3, 20, torch.float64)[0].expand(4, 3, 20)
    center = torch.zeros(20, dtype=torch.float64)
    loss, _ = dino_loss(logits, logits[:2], center, student_temp=0.1, teacher_temp=0.1)
    torch.testing.assert_close(loss, teacher_entropy(logits[:2], center, 0.1))


def test_teacher_entropy_compiles_as_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(teacher_entropy, fullgraph=True, dynamic=True, backend=counter)
    for B in (5, 2, 9):
        _, teacher, center = draw(2, 2, B, 50)
        torch.testing.assert_close(
            compiled(teacher, center, 0.04), teacher_entropy(teacher, center, 0.04)
        )
    assert counter.frame_count == 1

"""Logits at the limits, and memory around them, for the losses on the pairwise kernels.

`target` is an implementation and a device: PyTorch, and Triton on a GPU or interpreted on a CPU.
Every result is compared by value with the reference in float64: NumPy's warnings about the
arithmetic of the interpreter are ignored, so that none of them stands in for a comparison.
Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import importlib
import math

import pytest
import torch
from fastdino_kernels import dino_loss, patch_loss, reference, soft_cross_entropy
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
BLOCK = 512  # prototypes of a program of the forward kernel
INF = math.inf


def draw(S=2, T=1, B=1, K=BLOCK + 1, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw student [S, B, K], teacher [T, B, K], and a center [K] of zeros."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, B, K, generator=generator) for n in (S, T))
    return student.to(dtype), teacher.to(dtype), torch.zeros(K)


def truth(student: Tensor, teacher: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reference's rows [S, B], the gradient of their sum, and the teacher's sum [K]."""
    leaf, teacher = student.double().requires_grad_(), teacher.double()
    probs = torch.softmax((teacher - center) / TEMPS["teacher_temp"], dim=-1)
    rows = reference.soft_cross_entropy(leaf, probs, TEMPS["student_temp"], ignore_diagonal=True)
    rows.sum().backward()
    return rows.detach(), leaf.grad, teacher.sum(dim=(0, 1))


def ours(
    student: Tensor, teacher: Tensor, center: Tensor, impl: str, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of dino_loss, on the CPU."""
    leaf = student.to(device, copy=True).requires_grad_()
    rows, total = dino_loss(
        leaf, teacher.to(device), center.to(device), reduction="none", impl=impl, **TEMPS
    )
    rows.sum().backward()
    return rows.detach().cpu(), leaf.grad.cpu(), total.cpu()


def assert_accurate(inputs: tuple[Tensor, Tensor, Tensor], target: dict[str, str]) -> None:
    """Compare rows, gradients and column sums with the reference in float64."""
    expected, got = truth(*inputs), ours(*inputs, **target)
    eps = torch.finfo(inputs[0].dtype).eps
    for g, e, limits in zip(got, expected, ((2e-6, 1e-6), (2e-5 + eps, 1e-6), (1e-6, 1e-3)),
                            strict=True):  # fmt: skip
        rtol, atol = limits
        torch.testing.assert_close(g.double(), e, rtol=rtol, atol=atol)


# Prototypes in the last block: none too few, one, an odd number in each half, all of them.
RAGGED = [(torch.float32, K) for K in (1, 513, 516, 801, 1024)]
RAGGED += [(torch.float16, K) for K in (9, 520)]


@pytest.mark.parametrize("size", [-1e4, 1e4])
@pytest.mark.parametrize(("dtype", "K"), RAGGED)
def test_all_logits_far_from_zero(dtype, K, size, target):
    """Elements beyond the last prototype, read as 0, are neither a maximum nor part of a sum."""
    student, teacher, center = draw(K=K)
    assert_accurate(((student + size).to(dtype), (teacher + size).to(dtype), center), target)


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, -1])
def test_one_prototype_has_all_the_probability(place, target):
    student, teacher, center = draw(S=3, T=2, K=2 * BLOCK + 3)
    student, teacher = student - 1e4, teacher - 1e4
    student[:2, 0, place] = 1e4  # the last crop prefers others
    teacher[:, 0, place] = 1e4
    assert_accurate((student, teacher, center), target)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_chunk_of_minus_infinity_of_the_teacher_has_no_probability(chunk, target):
    """Its maximum is that of no logit: it must not become the row's."""
    student, teacher, center = draw(K=2 * BLOCK + 3)
    teacher = teacher - 1e4
    teacher[:, :, chunk * BLOCK : (chunk + 1) * BLOCK] = -INF
    inputs = student, teacher, center
    (rows, grad, total), expected = ours(*inputs, **target), truth(*inputs)
    assert expected[0].isfinite().all()
    torch.testing.assert_close(rows.double(), expected[0], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected[1], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), expected[2], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_chunk_of_minus_infinity_of_the_student_has_a_finite_gradient(chunk, target):
    student, teacher, center = draw(K=2 * BLOCK + 3)
    student, teacher = student - 1e4, 0.01 * teacher  # probabilities above 0 everywhere
    student[:, :, chunk * BLOCK : (chunk + 1) * BLOCK] = -INF
    inputs = student, teacher, center
    (rows, grad, _), expected = ours(*inputs, **target), truth(*inputs)
    assert torch.equal(rows, torch.tensor([[0.0], [INF]]))  # the first crop has no pair
    assert expected[1].isfinite().all()
    torch.testing.assert_close(grad.double(), expected[1], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("K", [7, BLOCK, 2 * BLOCK + 3])
def test_rows_of_zeros_are_uniform(K, target):
    rows, grad, total = ours(*(0 * x for x in draw(3, 2, K=K)), **target)
    pairs = torch.tensor([[1.0], [1.0], [2.0]])
    torch.testing.assert_close(rows, pairs * math.log(K), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6 / K)
    assert total.count_nonzero() == 0


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_targets_of_zeros_have_loss_zero(size, target):
    """A teacher's row without mass, next to one with mass, counts nothing."""
    student = size * draw(B=2)[0]
    probs = torch.zeros(1, 2, BLOCK + 1)
    probs[:, 1, -1] = 0.5
    leaf = student.to(target["device"]).requires_grad_()
    rows = soft_cross_entropy(
        leaf, probs.to(target["device"]), student_temp=0.1, impl=target["impl"]
    )
    rows.sum().backward()
    assert rows[:, 0].count_nonzero() == leaf.grad[:, 0].count_nonzero() == 0
    exact = student.double()
    expected = -0.5 * torch.log_softmax(exact[:, 1] / 0.1, dim=-1)[:, -1]
    torch.testing.assert_close(rows[:, 1].cpu().double(), expected, rtol=2e-6, atol=1e-6)


def test_a_crop_is_not_compared_with_its_own_teacher_even_if_that_is_nan(target):
    student, teacher, center = draw(3, 2, 2)
    teacher[0, 0, 5] = math.nan
    inputs = student, teacher, center
    expected = truth(student, teacher.nan_to_num(), center)
    rows, grad, _ = ours(*inputs, **target)
    # The first crop is compared with the second teacher only.
    torch.testing.assert_close(rows[0].double(), expected[0][0], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad[0].double(), expected[1][0], rtol=2e-5, atol=1e-6)
    assert rows[1:, 0].isnan().all()
    assert grad[1:, 0].isnan().all()
    torch.testing.assert_close(rows[:, 1].double(), expected[0][:, 1], rtol=2e-6, atol=1e-6)


# Memory around the rows


def framed(x: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Return a copy of x as rows within a frame of NaN, and all of the frame's memory.

    before, after: elements of NaN before and after each row; before the first one are 32 more.
    """
    rows = x.shape[:-1].numel()
    width = before + x.shape[-1] + after
    memory = x.new_full((32 + rows * width + 32,), math.nan)
    inside = memory[32 : 32 + rows * width].view(*x.shape[:-1], width)
    view = inside[..., before : before + x.shape[-1]]
    return view.copy_(x), memory


def assert_frame_is_nan(memory: Tensor, view: Tensor) -> None:
    """Raise AssertionError if anything outside of the view was written."""
    count = view.numel()
    assert view.isfinite().all()
    assert memory.isnan().sum() == memory.numel() - count


FRAMES = {"aligned": (8, 8), "one element in": (1, 7), "one element behind": (8, 1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("K", [520, 521])
def test_only_the_rows_are_read_and_written(K, frame, dtype, target, monkeypatch):
    """The gradient is written over logits that are surrounded by NaN, in an odd number of rows."""
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    monkeypatch.setattr(pairwise_triton, "MAX_ROWS_OF_PROGRAMS", 2)
    student, teacher, center = (x.to(target["device"]) for x in draw(B=3, K=K, dtype=dtype))
    (student, memory), (teacher, others), (center, around) = (
        framed(x, *FRAMES[frame]) for x in (student, teacher, center)
    )
    expected = truth(student.cpu(), teacher.cpu(), center.cpu())
    logits = student.requires_grad_()
    options = TEMPS | {"reduction": "none", "inplace_backward": True, "impl": target["impl"]}
    rows, total = dino_loss(logits, teacher, center, **options)
    (grad,) = torch.autograd.grad(rows.sum(), logits)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(rows.detach().cpu().double(), expected[0], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.cpu().double(), expected[1], rtol=2e-5 + eps, atol=1e-5)
    torch.testing.assert_close(total.cpu().double(), expected[2], rtol=1e-6, atol=1e-5)
    assert grad.data_ptr() == logits.data_ptr()
    for whole, view in ((memory, logits.detach()), (others, teacher), (around, center)):
        assert_frame_is_nan(whole, view)


def launched(monkeypatch) -> list[tuple[str, bool]]:
    """Record (kernel, ALIGNED) of each launch that promises an alignment."""
    pairwise_triton = importlib.import_module("fastdino_kernels.pairwise_triton")
    launch, launches = pairwise_triton.launch, []

    def record(kernel, grid, signature, arguments, constants, **options):
        if "ALIGNED" in constants:
            launches.append((kernel.__name__, constants["ALIGNED"]))
        launch(kernel, grid, signature, arguments, constants, **options)

    monkeypatch.setattr(pairwise_triton, "launch", record)
    return launches


@pytest.mark.parametrize("which", [None, "student", "teacher", "center"])
@pytest.mark.parametrize("frame", ["one element in", "one element behind"])
def test_vectors_are_promised_only_if_every_row_of_every_tensor_starts_at_16_bytes(
    frame, which, monkeypatch
):
    launches = launched(monkeypatch)
    names = ("student", "teacher", "center")
    tensors = dict(zip(names, draw(K=24, dtype=torch.float16), strict=True))
    if which is not None:
        tensors[which], _ = framed(tensors[which], *FRAMES[frame])
    student = tensors.pop("student").requires_grad_()
    loss, _ = dino_loss(student, **tensors, inplace_backward=True, impl="triton", **TEMPS)
    loss.backward()
    # A center is copied: the backward pass reads the copy, which is aligned. Its one row is
    # aligned if it starts there.
    forward = which is None or (which == "center" and frame == "one element behind")
    backward = which in (None, "center")
    assert launches == [
        ("pairwise_forward_kernel", forward), ("pairwise_backward_kernel", backward)
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "K"), [(torch.float16, 20), (torch.float32, 21)])
def test_rows_whose_length_is_no_multiple_of_16_bytes_are_not_read_as_vectors(
    dtype, K, monkeypatch
):
    launches = launched(monkeypatch)
    student, teacher, center = draw(1, 1, 1, K, dtype)
    student.requires_grad_()
    loss, _ = patch_loss(student[0], teacher[0], center, impl="triton", **TEMPS)
    loss.backward()
    assert [aligned for _, aligned in launches] == [False, False]

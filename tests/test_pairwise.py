"""Registration of the operators of dino_loss and soft_cross_entropy.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import pytest
import torch
from fastdino_kernels import DINOLoss, dino_loss, soft_cross_entropy, teacher_entropy
from fastdino_kernels.compat import dinov2, lightly
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.logits import draw, draw_probs

BACKENDS = ("CPU", "CUDA", "HIP", "XLA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1", "Meta")
OPS = torch.ops.fastdino_kernels


def arguments(impl, centered, dtype=torch.bfloat16, S=4, T=2, B=3, K=40):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(S, B, K, generator=generator).to(dtype)
    teacher = torch.randn(T, B, K, generator=generator).to(dtype)
    center = torch.randn(K, generator=generator) if centered else None
    if not centered:
        teacher = teacher.float().softmax(-1)
    return (student, teacher, center), (0.1, 0.04, None, None, True, impl)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl, centered):
    tensors, options = arguments(impl, centered)
    torch.library.opcheck(OPS.pairwise_forward.default, (*tensors, *options))
    *_, center_used, stats = OPS.pairwise_forward(*tensors, *options)
    student, teacher, _ = tensors
    saved = (student, teacher, center_used if centered else None, stats)
    grad = torch.tensor(2.0) if centered else torch.rand(4, 3)
    torch.library.opcheck(OPS.pairwise_backward.default, (grad, *saved, *options))
    torch.library.opcheck(OPS.pairwise_backward_.default, (grad, *saved, *options))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck_with_weights_and_a_divisor(impl, rows):
    tensors, options = arguments(impl, centered=True)
    options = (*options, torch.rand(3).expand(4, 3), None, torch.tensor(5.0), rows)
    torch.library.opcheck(OPS.pairwise_forward.default, (*tensors, *options))
    *_, center_used, stats = OPS.pairwise_forward(*tensors, *options)
    saved = (*tensors[:2], center_used, stats)
    grad = torch.rand(4, 3) if rows else torch.tensor(2.0)
    torch.library.opcheck(OPS.pairwise_backward.default, (grad, *saved, *options))
    torch.library.opcheck(OPS.pairwise_backward_.default, (grad, *saved, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["pairwise_forward", "pairwise_backward", "pairwise_backward_"])
def test_operators_run_on_every_backend(name, backend):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(
        f"fastdino_kernels::{name}", backend
    )


def module_loss(student, teacher, center, impl):
    del impl  # the environment variable
    loss_fn = DINOLoss(center.numel(), len(student), 0.04, 0.04, 0, 1)
    loss_fn.center.copy_(center)
    return loss_fn(student.flatten(0, 1), teacher.flatten(0, 1), 0)


def plain_loss(student, teacher, center, impl):
    return dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04, impl=impl)[0]


def loss_of_probs(student, teacher, center, impl):
    probs = torch.softmax(teacher - center, -1)
    return soft_cross_entropy(student, probs, student_temp=0.1, impl=impl).sum()


LOSSES = {"dino_loss": plain_loss, "DINOLoss": module_loss, "soft_cross_entropy": loss_of_probs}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss_fn", ["dino_loss", "DINOLoss", "soft_cross_entropy", "dinov2"])
def test_one_compiled_graph_serves_all_batch_sizes(loss_fn, impl, monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", impl)
    modules = [DINOLoss(8, 4, 0.04, 0.04, 0, 1) for _ in range(2)]

    def step(student, teacher, module):
        if loss_fn == "DINOLoss":
            return module(student.flatten(0, 1), teacher.flatten(0, 1), 0)
        if loss_fn == "dinov2":
            probs = teacher.softmax(-1)
            mean = dinov2.dino_cross_entropy(student, probs, ignore_diagonal=True)
            return dinov2.dino_clstoken_loss(student, probs, 0.1) + mean
        return LOSSES[loss_fn](student, teacher, module.center, impl)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend=counter)
    # The first size differs from S, T and K: torch.compile assumes that equal sizes remain equal.
    for B in [5, *range(2, 14)] if impl == "torch" else (5, 2, 11):  # the interpreter is slow
        student, teacher = draw(4, 2, B, 8, torch.float32, seed=B)
        results = []
        for run, module in zip((step, compiled), modules, strict=True):
            leaf = student.clone().requires_grad_()
            loss = run(leaf, teacher, module)
            loss.backward()
            results.append((loss.detach(), leaf.grad, module.center.clone()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["student", "teacher", "student_temp", "teacher_temp"])
def test_change_before_the_backward_pass_is_refused(name, impl):
    student, teacher = draw(3, 2, dtype=torch.float32)
    tensors = {
        "student": student.requires_grad_(),
        "teacher": teacher,
        "student_temp": torch.tensor(0.1),
        "teacher_temp": torch.tensor(0.04),
    }
    loss, _ = dino_loss(**tensors, center=torch.zeros(7), impl=impl)
    with torch.no_grad():
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["student", "probs", "student_temp"])
def test_change_before_the_backward_pass_of_rows_is_refused(name, impl):
    student, probs = draw_probs(3, 2, dtype=torch.float32)
    tensors = {
        "student": student.requires_grad_(), "probs": probs, "student_temp": torch.tensor(0.1),
    }  # fmt: skip
    rows = soft_cross_entropy(**tensors, impl=impl)
    with torch.no_grad():
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


def test_temperature_of_another_dtype_is_copied():
    student, teacher = draw(3, 2, dtype=torch.float32)
    grads = []
    for change in (1, 7):
        temp, leaf = torch.tensor(0.1, dtype=torch.float64), student.clone().requires_grad_()
        loss, _ = dino_loss(leaf, teacher, torch.zeros(7), student_temp=temp, teacher_temp=0.04)
        temp.mul_(change)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


class Operations(TorchDispatchMode):
    """Record the name and the shape of the result of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.results.append((func.__name__, result.shape))
        return result


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss_fn", LOSSES)
def test_backward_makes_no_zeros_for_results_without_gradient(loss_fn, impl, monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", impl)
    student, teacher = draw(4, 2, 3, 8, torch.float32)
    loss = LOSSES[loss_fn](student.requires_grad_(), teacher, torch.zeros(8), impl)
    with Operations() as operations:
        loss.backward()
    assert ("pairwise_backward.default", student.shape) in operations.results
    assert not [name for name, _ in operations.results if "zero" in name or "full" in name]


def negative_view(x: torch.Tensor) -> torch.Tensor:
    """Return x as a view of memory that holds -x."""
    view = torch._neg_view(-x)  # as the imaginary part of a conjugate, but contiguous
    assert view.is_neg()
    return view


def other_forms(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return x in other memory layouts."""
    padded = torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
    flipped = x.flip(0).contiguous().flip(0)
    strided = x[..., None].expand(*x.shape, 2).contiguous()[..., 0]
    return {"negative": negative_view(x), "padded": padded, "flip": flipped, "strided": strided}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("form", ["negative", "padded", "flip", "strided"])
@pytest.mark.parametrize("loss_fn", LOSSES)
def test_memory_layout_changes_nothing(loss_fn, form, impl, monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", impl)
    student, teacher = draw(4, 2, 3, 8, torch.float32)
    center = torch.linspace(-1, 1, 8)
    results = []
    for change in (torch.clone, lambda x: other_forms(x)[form]):
        leaf = student.clone().requires_grad_()
        LOSSES[loss_fn](change(leaf), change(teacher), change(center), impl).backward()
        results.append(leaf.grad)
    assert results[0].abs().sum() > 0
    if (form, impl) == ("padded", "triton"):  # narrower loads give each thread other elements
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(*results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_negative_temperature_views_are_read_as_they_are(impl):
    student, teacher = draw(4, 2, 3, 8, torch.float32)
    temps = torch.tensor(0.1), torch.tensor(0.04)
    results = []
    for student_temp, teacher_temp in (temps, map(negative_view, temps)):
        options = {"student_temp": student_temp, "teacher_temp": teacher_temp, "impl": impl}
        leaf = student.clone().requires_grad_()
        loss, _ = dino_loss(leaf, teacher, torch.zeros(8), **options)
        loss.backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradient_is_not_written_over_a_negative_view(impl):
    student, teacher = draw(4, 2, 3, 8, torch.float32)
    options = {"student_temp": 0.1, "teacher_temp": 0.04, "impl": impl}
    leaf = student.clone().requires_grad_()
    with pytest.raises(ValueError, match="negative view.*resolve_neg"):
        dino_loss(negative_view(leaf), teacher, torch.zeros(8), inplace_backward=True, **options)


def test_entropy_and_center_of_negative_views():
    teacher = draw(4, 2, 3, 8, torch.float32)[1]
    center, negative = torch.linspace(-1, 1, 8), negative_view(teacher)
    entropy = teacher_entropy(negative, negative_view(center), 0.1)
    assert torch.equal(entropy, teacher_entropy(teacher, center, 0.1))
    modules = [lightly.DINOLoss(8) for _ in range(2)]
    for module, crops in zip(modules, (teacher, negative), strict=True):
        module.update_center(crops)
    assert torch.equal(modules[0].center, modules[1].center)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss_fn", LOSSES)
def test_center_may_require_a_gradient_and_differ_in_dtype(loss_fn, impl, monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", impl)
    student, teacher = draw(4, 2, 3, 8, torch.float32)
    center = torch.linspace(-1, 1, 8).bfloat16()
    expected = LOSSES[loss_fn](student, teacher, center.float(), impl)
    for other in (center, center.double().requires_grad_()):
        if impl == "triton" and other.dtype == torch.float64 and loss_fn == "soft_cross_entropy":
            continue  # the probabilities are fp64
        leaf = student.clone().requires_grad_()
        loss = LOSSES[loss_fn](
            leaf, teacher, other.detach() if loss_fn == "DINOLoss" else other, impl
        )
        loss.backward()
        torch.testing.assert_close(loss.detach().float(), expected, rtol=1e-5, atol=1e-6)
        assert other.grad is None

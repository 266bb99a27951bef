"""compat.soft_targets against the equations of DINOv2's, DINOv3's and iBOT's losses.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fastdino_kernels.compat.soft_targets import (
    cross_entropy,
    dino_clstoken_loss,
    dino_cross_entropy,
)
from torch import Tensor

from tests.logits import assert_same, draw_probs, run
from tests.originals import load


def plain_cross_entropy(s: Tensor, t: Tensor, temp: float) -> Tensor:
    return -(t * torch.log_softmax(s / temp, dim=-1)).sum(dim=-1)


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 5, 1000), (4, 7), (2, 3, 2, 7), (1, 0, 7)])
@pytest.mark.parametrize("temp", [0.1, torch.tensor(0.25)])
def test_cross_entropy_matches_the_equation(shape, temp):
    s, t = (x.reshape(shape) for x in draw_probs(1, 1, B=s_rows(shape), K=shape[-1]))
    got = run(lambda s: cross_entropy(s, t, temp), s)
    assert got[0].shape == shape[:-1]
    assert_same(got, run(lambda s: plain_cross_entropy(s, t, float(temp)), s))


CAPI_STUDENT = (
    "loss = -torch.sum(target.float() * F.log_softmax(pred.float() / temp, dim=-1), dim=-1)",
    "from fastdino_kernels.compat.dinov2 import cross_entropy; "
    "loss = cross_entropy(pred, target, temp)",
)
CAPI_CLUSTERING = (
    "loss = -torch.sum(tgt * F.log_softmax(pred / self.pred_temp, dim=-1), dim=-1).mean()",
    "from fastdino_kernels.compat.dinov2 import cross_entropy; "
    "loss = cross_entropy(pred, tgt, self.pred_temp).mean()",
)
NAMES = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}


class CapiModel:
    """A model whose student predicts the given logits."""

    def __init__(self, logits):
        backbone = SimpleNamespace(forward_pretrain=lambda *_, **__: (None, logits))
        self.student = SimpleNamespace(backbone=backbone, head=lambda x: x)


@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_replaces_the_line_of_capis_student(compiled):
    pred, target = (x[0] for x in draw_probs(1, 1, 6, dtype=torch.bfloat16))
    results = []
    for replace in (("", ""), CAPI_STUDENT):
        loss_fn = load("CAPI", "train_capi.py", "do_student", replace=replace, **NAMES).do_student
        if compiled:
            loss_fn = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
        arguments = (None, None, None, target, 0.12)
        results.append(run(lambda s, f=loss_fn: f(CapiModel(s), *arguments), pred))  # noqa: B023
    assert_same(*results, rtol=1e-5)


@pytest.mark.parametrize("positionwise", [False, True])
def test_cross_entropy_replaces_the_line_of_capis_clustering(positionwise):
    functions = ("stable_exp", "reduced_sum", "sinkhorn_knopp", "exp_max_values")
    results = []
    for replace in (("", ""), CAPI_CLUSTERING):
        names = ("OnlineClustering", *functions)
        head = load("CAPI", "model.py", *names, replace=replace, **NAMES).OnlineClustering
        settings = {"target_temp": 0.06, "pred_temp": 0.12, "positionwise_sk": positionwise}
        torch.manual_seed(0)
        head = head(5, 7, bias=True, n_sk_iter=3, **settings)
        assignments, loss = head(torch.randn(4, 6, 5))
        loss.backward()
        results.append((assignments, loss, *[p.grad for p in head.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("more", "less"), [((1, 3, 7), (3, 7)), ((1, 1, 2, 3, 7), (2, 3, 7))])
def test_leading_dimensions_of_size_one_are_optional(more, less):
    s, t = (x.reshape(less) for x in draw_probs(1, 1, B=s_rows(less)))
    expected = run(lambda s: plain_cross_entropy(s, t, 0.1), s)
    for student, probs in ((s.view(more), t), (s, t.view(more))):
        got = run(lambda s, p=probs: cross_entropy(s, p, 0.1), student)
        assert got[0].shape == more[:-1]
        assert_same((got[0].view(less[:-1]), got[1].view(less)), expected)


def s_rows(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[:-1]).numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cross_entropy_of_half_precision_is_computed_in_float32(dtype):
    s, t = (x.view(2, 6, 50) for x in draw_probs(1, 1, 12, 50, dtype))
    loss, grad = run(lambda s: cross_entropy(s, t, 0.1), s)
    expected = run(lambda s: plain_cross_entropy(s, t.double(), 0.1), s.double())
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-6)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected[1], rtol=step, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)])
def test_cross_entropy_as_dinov2_calls_it(shape):
    # As in its patch loss: fp32 copies of a slice, negated.
    def lossfunc(t, s, temp):
        s, t = s.float(), t.float()
        if s.ndim == 2:
            return -cross_entropy(s.unsqueeze(0), t.unsqueeze(0), temp, bw_inplace=True).squeeze(0)
        return -cross_entropy(s, t, temp, bw_inplace=True)

    for dtype in (torch.float16, torch.float32):
        logits, t = (x.view(12, 7) for x in draw_probs(1, 1, 12, 7, dtype))
        t = t[:6].view(shape)
        logits, expected_logits = (logits.clone().requires_grad_() for _ in range(2))
        loss = lossfunc(t, (logits * 1)[:6].view(shape), 0.1)
        assert loss.shape == shape[:-1]
        loss.sum().backward()
        expected = -plain_cross_entropy(expected_logits.float()[:6].view(shape), t.float(), 0.1)
        expected.sum().backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda s, t, inplace: cross_entropy(s, t, 0.1, bw_inplace=inplace).sum(),
        lambda s, t, inplace: dino_cross_entropy(s, t, inplace_backward=inplace),
    ],
)
def test_gradient_is_written_over_the_logits_only_on_request(loss_fn):
    s, t = draw_probs(2, 2)
    expected = run(lambda s: loss_fn(s, t, False), s)[1]
    for inplace in (False, True):
        leaf = s.clone().requires_grad_()
        logits = leaf * 1
        loss_fn(logits, t, inplace).backward()
        torch.testing.assert_close(leaf.grad, expected)
        assert torch.equal(logits.detach(), leaf.grad if inplace else s)


def test_cross_entropy_gives_the_teacher_no_gradient():
    s, t = (x.view(2, 3, 7).requires_grad_() for x in draw_probs(1, 1, 6))
    cross_entropy(s, t, 0.1).sum().backward()
    assert t.grad is None


def test_cross_entropy_compiles():
    s, t = (x.view(2, 3, 7) for x in draw_probs(1, 1, 6))
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    assert_same(run(lambda s: compiled(s, t, 0.1), s), run(lambda s: cross_entropy(s, t, 0.1), s))


@pytest.mark.parametrize(
    ("s", "t", "match"),
    [
        ((2, 3, 7), (2, 2, 7), r"both be \[B, N, K\] with K >= 1, got \(2, 3, 7\) and \(2, 2, 7\)"),
        ((2, 3, 7), (1, 3, 7), "got"),
        ((2, 3, 7), (3, 7), "got"),
        ((1, 7), (7,), "got"),
        ((7,), (7,), r"got \(7,\)"),
        ((2, 3, 0), (2, 3, 0), "K >= 1"),
    ],
)
def test_invalid_shapes_of_cross_entropy(s, t, match):
    with pytest.raises(ValueError, match=match):
        cross_entropy(torch.ones(s), torch.ones(t), 0.1)


def test_invalid_arguments_of_cross_entropy():
    s = torch.ones(2, 3, 7)
    with pytest.raises(ValueError, match="temp must be > 0 and finite, got 0.0"):
        cross_entropy(s, s, 0.0)
    with pytest.raises(TypeError, match="s must be a torch.Tensor, got list"):
        cross_entropy([s], s, 0.1)
    with pytest.raises(TypeError, match="t must have one of the dtypes"):
        cross_entropy(s, s.long(), 0.1)
    with pytest.raises(ValueError, match="same storage"):
        cross_entropy(s, s, 0.1, bw_inplace=True)


def plain_clstoken_loss(student: Tensor, probs: Tensor, temp: float) -> Tensor:
    """Sum the batch means of all pairs, without dividing by their number."""
    return sum(plain_cross_entropy(s, p, temp).mean() for s in student for p in probs)


@pytest.mark.parametrize(("S", "T"), [(8, 2), (1, 1), (2, 3)])
def test_clstoken_loss_sums_over_pairs_and_averages_over_images(S, T):
    student, probs = draw_probs(S, T)
    got = run(lambda s: dino_clstoken_loss(list(s), list(probs), 0.2), student)
    assert_same(got, run(lambda s: plain_clstoken_loss(s, probs, 0.2), student))
    assert_same(
        run(lambda s: dino_clstoken_loss(s, probs), student),
        run(lambda s: plain_clstoken_loss(s, probs, 0.1), student),
    )


def plain_einsum(student: Tensor, probs: Tensor, temp: float, ignore_diagonal: bool) -> Tensor:
    pairs = -torch.einsum("sbk,tbk->st", torch.log_softmax(student / temp, dim=-1), probs)
    S, T, B = len(student), len(probs), student.shape[1]
    if not ignore_diagonal:
        return pairs.sum() / (B * S * T)
    own = torch.arange(min(S, T))
    return (pairs.sum() - pairs[own, own].sum()) / (B * S * T - B * min(S, T))


@pytest.mark.parametrize(("S", "T"), [(10, 2), (2, 2), (2, 1), (1, 3), (8, 2)])
@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dino_cross_entropy_matches_the_einsum(S, T, ignore_diagonal):
    student, probs = draw_probs(S, T)
    options = {"student_temp": 0.2, "ignore_diagonal": ignore_diagonal}
    expected = run(lambda s: plain_einsum(s, probs, 0.2, ignore_diagonal), student)
    for inplace in (False, True):
        got = run(
            lambda s, i=inplace: dino_cross_entropy(s * 1, probs, **options, inplace_backward=i),
            student,
        )
        assert_same(got, expected)


def test_defaults_of_dino_cross_entropy():
    student, probs = draw_probs(3, 2)
    expected = plain_einsum(student, probs, 0.1, ignore_diagonal=False)
    torch.testing.assert_close(dino_cross_entropy(student, probs), expected)


@pytest.mark.parametrize("loss_fn", [dino_cross_entropy, dino_clstoken_loss])
def test_empty_batch_has_loss_zero(loss_fn):
    assert loss_fn(*draw_probs(3, 2, B=0)) == 0


def test_invalid_arguments_of_dino_cross_entropy():
    student, probs = draw_probs(1, 1)
    with pytest.raises(ValueError, match="S = T = 1 with ignore_diagonal leaves no pairs"):
        dino_cross_entropy(student, probs, ignore_diagonal=True)
    with pytest.raises(ValueError, match=r"student_logits must be 3-D.*got shape \(3, 7\)"):
        dino_cross_entropy(student[0], probs)
    with pytest.raises(ValueError, match=r"teacher_probs must be 3-D.*got shape \(0, 3, 7\)"):
        dino_cross_entropy(student, probs[:0])
    with pytest.raises(ValueError, match=r"same B and K.*\(1, 3, 7\) and \(1, 2, 7\)"):
        dino_cross_entropy(student, probs[:, :2])
    with pytest.raises(TypeError, match="teacher_probs must be a torch.Tensor, got list"):
        dino_cross_entropy(student, list(probs))
    with pytest.raises(ValueError, match=r"teacher_out_softmaxed_centered_list must hold at least"):
        dino_clstoken_loss([student[0]], [])

"""compat.lightly_train: the calls of lightly-train, whose teacher has one dimension more.

Legend: N masked tokens, K prototypes.
"""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels.compat import dinov2, lightly_train

from tests.logits import assert_same, draw, run

MASK = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])


def test_names_are_those_of_lightly_train():
    assert lightly_train.DINOLoss is dinov2.DINOLoss
    assert lightly_train.IBOTPatchLoss is dinov2.iBOTPatchLoss


@pytest.mark.parametrize("tokens", [3, None])
def test_teacher_with_a_leading_dimension_is_that_without(tokens):
    student, teacher = (x[0] for x in draw(1, 1, dtype=torch.float32))
    results = []
    for form in (teacher, teacher[None]):
        loss = lightly_train.IBOTPatchLoss(patch_out_dim=7)
        for _ in range(2):
            probs = loss.softmax_center_teacher(form, teacher_temp=0.1)
            loss.update_center(form)
        got = run(loss.forward_masked, student, probs, MASK, n_masked_patches=tokens)
        loss.apply_center_update()
        results.append((*got, loss.center))
    assert all(map(torch.equal, *results))
    expected = 0.1 * teacher.mean(dim=0) * (0.9 + 1)
    torch.testing.assert_close(results[0][2][0, 0], expected)


def test_padding_after_a_leading_dimension_is_left_out():
    student, teacher = (x[0] for x in draw(1, 1, B=5))
    loss = lightly_train.IBOTPatchLoss(patch_out_dim=7).double()
    probs = loss.softmax_center_teacher(teacher[None], teacher_temp=0.1)
    got = run(loss.forward_masked, student, probs, MASK, n_masked_patches=3)
    expected = run(loss.forward_masked, student[:3], probs[0, :3], MASK)
    assert got[1][3:].abs().sum() == 0
    assert_same((got[0], got[1][:3]), expected)

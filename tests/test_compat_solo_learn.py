"""compat.solo_learn against DINOLoss.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import DINOLoss
from fastdino_kernels.compat import solo_learn

from tests.logits import assert_same, draw, run


def test_solo_learn_constructor_and_epoch():
    ours = solo_learn.DINOLoss(
        num_prototypes=7,
        student_temp=0.2,
        warmup_teacher_temp=0.02,
        teacher_temp=0.06,
        warmup_teacher_temp_epochs=3,
        num_epochs=5,
        num_large_crops=4,
        center_momentum=0.7,
    ).double()
    same = DINOLoss(7, 4, 0.02, 0.06, 3, 5, 0.2, 0.7).double()
    assert ours.epoch == 0
    assert (ours.num_large_crops, ours.state_dict().keys()) == (4, {"center"})
    losses = []
    for epoch in range(5):
        student, teacher = (x.reshape(-1, 7) for x in draw(4, 2, seed=epoch % 2))
        ours.epoch = epoch
        got = run(ours, student, teacher)
        assert_same(got, run(same, student, teacher, epoch))
        losses.append(got[0].item())
    assert torch.equal(ours.center, same.center)
    assert len(set(losses)) == 5
    with pytest.raises(ValueError, match=r"epoch must be in 0\.\.4"):
        ours(student, teacher, epoch=5)


def test_solo_learn_has_two_crops_by_default():
    loss_fn = solo_learn.DINOLoss(7, 0.04, 0.04, 0, 1)
    student, teacher = (x.reshape(-1, 7) for x in draw(2, 2, dtype=torch.float32))
    assert loss_fn(student, teacher) == DINOLoss(7, 2, 0.04, 0.04, 0, 1)(student, teacher, 0)

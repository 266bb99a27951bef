"""Updates: schedules, clip, frozen last layer and EMA, in both implementations."""

from __future__ import annotations

import math

import pytest
import torch

from fastdino import Trainer
from tests.test_schedules import paper_schedule

pytestmark = pytest.mark.usefixtures("small_networks")
UPDATES = [
    {"mode": "parity"},
    {"mode": "parity", "optimizer": "sgd"},
    {"mode": "parity", "optimizer": "lars"},
    {"mode": "fast", "compile": "off"},
]
STEPS = 2  # per epoch


def copies(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


@pytest.fixture(params=UPDATES, ids=lambda settings: "-".join(settings.values()))
def make(request, float64, tiny):
    """A function that makes a Trainer with each implementation of the update."""
    return lambda **settings: Trainer(tiny(**request.param, **settings), STEPS)


def test_last_layer_and_its_moments_start_after_the_freeze(make, crops_of):
    """Weight decay would move it also without a gradient."""
    trainer = make(freeze_last_layer=2, warmup_epochs=0, weight_decay=0.4, norm_last_layer=False)
    last_layer = dict(trainer.student.head.last_layer.named_parameters())
    other = trainer.student.head.mlp[0].weight
    for i in range(3 * STEPS):
        before, moved = copies(trainer.student.head.last_layer), other.detach().clone()
        teacher = copies(trainer.teacher.head.last_layer)
        trainer.train_step(crops_of(trainer.config, i))
        assert not torch.equal(other, moved)
        for name, parameter in last_layer.items():
            changed = not torch.equal(parameter, before[name])
            assert changed == (i >= 2 * STEPS), (name, i)
            assert (parameter in trainer.optimizer.state) == changed
            if not changed:  # and so the average of equal weights
                now = trainer.teacher.head.last_layer.get_parameter(name)
                torch.testing.assert_close(now, teacher[name], rtol=1e-12, atol=0)


def test_every_step_has_the_papers_schedules(make, crops_of):
    settings = {"lr": 0.02, "min_lr": 1e-3, "weight_decay": 0.04, "weight_decay_end": 0.4}
    trainer = make(**settings, momentum_teacher=0.75, epochs=4, warmup_epochs=1)
    config, length = trainer.config, (4, STEPS)
    lr = paper_schedule(0.02 * 4 / 256, 1e-3, *length, 1)
    decay = paper_schedule(0.04, 0.4, *length)
    momentum = paper_schedule(0.75, 1.0, *length)
    for i in range(4 * STEPS):
        before = copies(trainer.teacher)
        trainer.train_step(crops_of(config, i))
        groups = trainer.optimizer.param_groups
        assert [group["lr"] for group in groups] == pytest.approx([lr[i]] * 2, rel=1e-12)
        assert [g["weight_decay"] for g in groups] == pytest.approx([decay[i], 0.0], rel=1e-12)
        # The EMA follows the optimizer: it averages the student after this step.
        for name, student in trainer.student.named_parameters():
            expected = momentum[i] * before[name] + (1 - momentum[i]) * student.detach()
            teacher = trainer.teacher.get_parameter(name)
            torch.testing.assert_close(teacher, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("clip", [0.0, 50.0])
def test_each_gradient_is_clipped_by_its_own_norm(float64, tiny, crops_of, clip):
    config = tiny(optimizer="sgd", clip_grad=clip, warmup_epochs=0, freeze_last_layer=0,
                  weight_decay=0.0, weight_decay_end=0.0)  # fmt: skip
    trainer = Trainer(config, STEPS)
    gradients = {}
    for name, p in trainer.student.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.update({name: p.grad.clone()})
            )
    before = copies(trainer.student)
    trainer.train_step(crops_of(config, 0))
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert min(norms.values()) < 50.0 < max(norms.values())
    for name, gradient in gradients.items():
        scale = min(1.0, clip / (norms[name] + 1e-6)) if clip else 1.0
        expected = before[name] - trainer.lr_schedule(0) * scale * gradient
        actual = trainer.student.get_parameter(name)
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(make, crops_of, parts):
    """Also the loss, the center and, with SGD, the size of the step."""
    whole = make(batch_size_per_gpu=4, clip_grad=0.0)
    split = make(batch_size_per_gpu=4 // parts, grad_accum=parts, clip_grad=0.0)
    for i in range(3):
        crops = crops_of(whole.config, i)
        expected, loss = whole.train_step(crops).item(), split.train_step(crops).item()
        assert loss == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(split.loss.center, whole.loss.center, rtol=1e-10, atol=1e-14)
        assert split.entropy is None or math.isclose(split.entropy, whole.entropy, rel_tol=1e-10)
    for name, parameter in whole.student.named_parameters():
        actual = split.student.get_parameter(name)
        torch.testing.assert_close(actual, parameter, rtol=1e-6, atol=1e-9, msg=name)


def test_the_teacher_has_no_gradients_and_no_stochastic_depth(make, crops_of):
    trainer = make(drop_path_rate=0.9, use_bn_in_head=True, momentum_teacher=1.0)
    crops = crops_of(trainer.config, 0)
    assert trainer.teacher.training, "as in the paper's code: batch norm uses the batch"
    first, second = (trainer.teacher(crops[:2]).detach() for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(trainer.student(crops[:2]), trainer.student(crops[:2]))
    before = copies(trainer.teacher)
    for i in range(2):
        trainer.train_step(crops_of(trainer.config, i))
    for name, parameter in trainer.teacher.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]), "the momentum is 1"

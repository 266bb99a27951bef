"""Steps with a non-finite loss or gradient: what stays as it was, and what is reported."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch

from fastdino import Trainer
from fastdino.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("small_networks")
UPDATES = [
    {"mode": "parity"},
    {"mode": "parity", "optimizer": "sgd"},
    {"mode": "parity", "optimizer": "lars"},
    {"mode": "fast", "compile": "off"},
]


def snapshot(trainer):
    """Return a copy of the weights, the center and the moments."""
    state = trainer.state_dict()
    tensors = {key: state[key] for key in ("student", "teacher", "dino_loss")}
    return copy.deepcopy(tensors | {"moments": state["optimizer"]["state"]})


@contextlib.contextmanager
def scaled_gradient(trainer, scale):
    """Multiply one value of one gradient; the loss is not affected."""

    def change(gradient):
        gradient = gradient.clone()
        gradient[0, 0] *= scale
        return gradient

    hook = trainer.student.head.mlp[0].weight.register_hook(change)
    try:
        yield
    finally:
        hook.remove()


def train_and_verify(trainer, crops):
    trainer.train_step(crops)
    trainer.verify()


@pytest.mark.parametrize("failure", ["loss", "gradient inf", "gradient nan"])
@pytest.mark.parametrize("settings", UPDATES, ids=lambda s: "-".join(s.values()))
def test_nonfinite_step_leaves_the_state_unchanged(tiny, crops_of, settings, failure):
    config = tiny(**settings, grad_accum=2, clip_grad=0.0, freeze_last_layer=0)
    trainer = Trainer(config, steps_per_epoch=3)
    for i in (0, 1):  # the first learning rate is 0
        trainer.train_step(crops_of(config, i))
    before, completed = snapshot(trainer), []
    assert before["dino_loss"]["center"].any()

    def train():
        crops = crops_of(config, 2)
        if failure == "loss":
            crops[0][0, 0, 0, 0] = math.nan  # of a global crop, so that the center's sum is NaN
        with scaled_gradient(trainer, 1.0 if failure == "loss" else float(failure.split()[1])):
            trainer.train_step(crops)
        for i in (3, 4):
            trainer.train_step(crops_of(config, i))
        completed.append(trainer.iteration)
        trainer.verify()

    problem = "the loss is nan" if failure == "loss" else "a gradient is not finite"
    with pytest.raises(NonFiniteError, match=rf"{problem} at iteration 2 \(epoch 1\)") as error:
        train()
    # --mode fast does not wait for the device.
    assert completed == ([5] if settings["mode"] == "fast" else [])
    assert error.value.iteration == trainer.iteration == 2
    torch.testing.assert_close(snapshot(trainer), before, rtol=0, atol=0)
    assert math.isfinite(trainer.train_step(crops_of(config, 2)).item())
    trainer.verify()
    assert trainer.iteration == 3
    after = snapshot(trainer)
    for part in ("student", "teacher", "dino_loss"):
        assert not all(torch.equal(after[part][name], before[part][name]) for name in before[part])


@pytest.mark.parametrize("settings", UPDATES[:1] + UPDATES[3:], ids=lambda s: s["mode"])
def test_overflow_with_loss_scaling_skips_the_update_and_halves_the_scale(tiny, crops_of, settings):
    """As in the paper's code, center and teacher follow such a step, and it is no failure."""
    config = tiny(**settings, amp_dtype="fp16", freeze_last_layer=0, warmup_epochs=0)
    trainer = Trainer(config, steps_per_epoch=5)
    trainer.scaler = trainer._update._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer.train_step(crops_of(config, 0))
    before = snapshot(trainer)
    with scaled_gradient(trainer, math.inf):
        loss = trainer.train_step(crops_of(config, 1))
    trainer.verify()
    assert math.isfinite(loss.item())
    after = snapshot(trainer)
    torch.testing.assert_close(
        (after["student"], after["moments"]), (before["student"], before["moments"]), rtol=0, atol=0
    )
    assert not torch.equal(after["dino_loss"]["center"], before["dino_loss"]["center"])
    momentum = trainer.momentum_schedule(1)
    for name, old in before["teacher"].items():
        new = momentum * old + (1 - momentum) * before["student"][f"module.{name}"]
        torch.testing.assert_close(after["teacher"][name], new, rtol=1e-5, atol=1e-7)
    assert (trainer.iteration, trainer.scaler.get_scale()) == (2, 32.0)
    trainer.train_step(crops_of(config, 2))
    trainer.verify()
    weight = "module.head.mlp.0.weight"
    assert not torch.equal(trainer.state_dict()["student"][weight], after["student"][weight])
    assert trainer.scaler.get_scale() == 32.0


@pytest.mark.parametrize("settings", UPDATES[:1] + UPDATES[3:], ids=lambda s: s["mode"])
def test_nonfinite_loss_with_loss_scaling_is_a_failure(tiny, crops_of, settings):
    config = tiny(**settings, amp_dtype="fp16", warmup_epochs=0)
    trainer = Trainer(config, steps_per_epoch=5)
    trainer.train_step(crops_of(config, 0))
    before = snapshot(trainer)
    crops = crops_of(config, 1)
    crops[1][0, 0, 0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="the loss is nan at iteration 1"):
        train_and_verify(trainer, crops)
    torch.testing.assert_close(snapshot(trainer), before, rtol=0, atol=0)


@pytest.mark.parametrize("settings", UPDATES[:1] + UPDATES[3:], ids=lambda s: s["mode"])
def test_skipped_step_advances_the_schedules_and_nothing_else(tiny, crops_of, settings):
    config = tiny(**settings, momentum_teacher=0.5)
    trainer = Trainer(config, steps_per_epoch=2)
    trainer.train_step(crops_of(config, 0))
    before = snapshot(trainer)
    trainer.skip_step()
    assert (trainer.iteration, trainer.epoch) == (1 + 1, 1)
    trainer.verify()
    state = trainer.state_dict()
    assert (trainer.iteration, state["iteration"], state["epoch"]) == (2, 2, 1)
    torch.testing.assert_close(snapshot(trainer), before, rtol=0, atol=0)
    trainer.train_step(crops_of(config, 2))
    group = trainer.optimizer.param_groups[0]
    assert group["lr"] == trainer.lr_schedule(2)
    assert group["weight_decay"] == trainer.weight_decay_schedule(2)
    trainer.verify()
    trainer.skip_step()
    crops = crops_of(config, 4)
    crops[0][0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"at iteration 4 \(epoch 3\)"):
        train_and_verify(trainer, crops)
    assert trainer.iteration == 4


def test_a_failure_before_a_skipped_step_is_raised_by_it(tiny, crops_of):
    config = tiny(mode="fast", compile="off")
    trainer = Trainer(config, steps_per_epoch=4)
    crops = crops_of(config, 0)
    crops[0][0, 0, 0, 0] = math.nan
    trainer.train_step(crops)
    with pytest.raises(NonFiniteError, match="at iteration 0"):
        trainer.skip_step()
    assert trainer.iteration == 0

"""The loss scale of fp16 has no effect on the clip and the moments."""

from __future__ import annotations

import pytest
import torch

from fastdino import Trainer

pytestmark = pytest.mark.usefixtures("small_networks")
SETTINGS = [
    {"mode": "parity"},
    {"mode": "parity", "optimizer": "sgd"},
    {"mode": "fast", "compile": "off"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_gradients_are_clipped_without_the_loss_scale(tiny, crops_of, settings):
    """Powers of two that neither overflow nor lose bits: the moments agree within rounding."""
    config = tiny(**settings, amp_dtype="fp16", clip_grad=20.0, warmup_epochs=0)
    moments = []
    for scale in (2.0, 16.0):
        torch.manual_seed(0)
        trainer = Trainer(config, steps_per_epoch=5)
        trainer.scaler = trainer._update._scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train_step(crops_of(config, 0))
        assert trainer.scaler.get_scale() == scale, "no overflow"
        name = "momentum_buffer" if "optimizer" in settings else "exp_avg"
        moments.append(
            {
                parameter: trainer.optimizer.state[p][name]
                for parameter, p in trainer.student.named_parameters()
                if p in trainer.optimizer.state
            }
        )
    norms = [moment.norm().item() / (1.0 if "optimizer" in settings else 0.1)
             for moment in moments[0].values()]  # fmt: skip
    assert max(norms) == pytest.approx(20.0, rel=0.01)
    assert min(norms) < 19.0
    for parameter, expected in moments[0].items():
        torch.testing.assert_close(
            moments[1][parameter], expected, rtol=0.05, atol=0.02 * expected.abs().max().item(),
            msg=parameter,
        )  # fmt: skip

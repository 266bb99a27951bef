"""The gate of the benchmark: one non-finite value anywhere in a step's results is not timed."""

from __future__ import annotations

import math

import pytest
import torch

from fastdino.bench.baselines.paper_step import PaperStep
from fastdino.bench.correctness import CorrectnessCheck, Verdict

pytestmark = pytest.mark.usefixtures("small_networks")
QUANTITIES = ("loss", "gradient", "student", "center", "teacher")


@pytest.fixture
def checker(tiny) -> CorrectnessCheck:
    return CorrectnessCheck(
        tiny(freeze_last_layer=0, warmup_epochs=0, batch_size_per_gpu=2), torch.device("cpu")
    )


def poison_one(tensor, value):
    tensor.detach().view(-1)[-1] = value


def poisoned(where, value, part=""):
    """Return PaperStep with one value of one tensor replaced; `part` is in the tensor's name."""

    def tensor_of(network):
        return next(p for n, p in network.named_parameters() if part in n and p.requires_grad)

    class Poisoned(PaperStep):
        def step(self, crops):
            loss = super().step(crops)
            if where == "loss":
                loss = loss * 0 + value
            elif where == "center":
                poison_one(self.center, value)
            elif where == "student":
                poison_one(tensor_of(self.student), value)
            elif where == "teacher":
                named = dict(self.teacher.named_parameters())
                poison_one(next(p for n, p in named.items() if part in n), value)
            return loss

        def forward(self, crops):
            if where == "gradient":

                def change(gradient):
                    gradient = gradient.clone()
                    gradient.view(-1)[-1] = value
                    return gradient

                tensor_of(self.student).register_hook(change)
            return super().forward(crops)

    return Poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", QUANTITIES)
def test_a_non_finite_value_in_any_result_fails_the_check(checker, where, value):
    verdict = checker.check(poisoned(where, value, part="mlp.fc1.weight"))
    assert not verdict.passed
    error, name = verdict.worst[where]
    assert not math.isfinite(error)
    assert "mlp.fc1.weight" in name or where in ("loss", "center")
    assert str(verdict).startswith("failed, ")
    if where != "gradient":  # which the update spreads to the weights
        others = [error for other, (error, _) in verdict.worst.items() if other != where]
        assert max(others) <= 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_also_the_bias_of_the_keys_must_be_finite(checker, value):
    """Its gradient is rounding noise, so that finite values are not compared."""

    class Poisoned(PaperStep):
        def step(self, crops):
            loss = super().step(crops)
            bias = dict(self.student.named_parameters())["backbone.blocks.1.attn.qkv.bias"]
            bias.detach()[len(bias) // 2] = value
            return loss

    verdict = checker.check(Poisoned)
    assert not verdict.passed
    assert verdict.worst["student"][1] == "backbone.blocks.1.attn.qkv.bias"
    assert not checker.check(poisoned("student", 1.0, part="qkv.bias")).passed  # of the values


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    ("error", "passed"), [(1e-5, True), (1.01e-5, False), (math.nan, False), (math.inf, False)]
)
def test_each_quantity_has_to_be_within_the_tolerance(quantity, error, passed):
    worst = dict.fromkeys(QUANTITIES, (0.0, "")) | {quantity: (error, "w")}
    assert Verdict(worst).passed == passed
    assert str(Verdict(worst)) == (
        f"{'passed' if passed else 'failed'}, {error:.1e} at most ({quantity} w)"
    )
    wide = Verdict(worst, loss_tolerance=1e-3)  # of a loss in half precision
    assert wide.passed == (passed or (quantity == "loss" and error < 1e-3))


def test_a_step_without_a_gradient_or_an_update_fails(checker):
    class Frozen(PaperStep):
        def __init__(self, setup):
            super().__init__(setup)
            self.student.head.last_layer.weight_v.requires_grad_(False)

    verdict = checker.check(Frozen)
    assert verdict.worst["gradient"] == (math.inf, "head.last_layer.weight_v")
    assert not verdict.passed


def test_the_check_has_no_randomness(checker):
    again = type("Again", (PaperStep,), {})
    verdict = checker.check(again)
    assert verdict.passed
    assert set(verdict.worst) == set(QUANTITIES)
    assert max(error for error, _ in verdict.worst.values()) == 0.0

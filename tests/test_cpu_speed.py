"""Measurements at start: what they run. How fast it is depends on the machine."""

from __future__ import annotations

import pytest
import torch

from fastdino import Trainer, cpu_speed
from fastdino.models import attention
from fastdino.models.attention import AttentionInputs

BF16_SPEEDUP, MATMUL_SPEEDUP = cpu_speed.bf16_speedup, cpu_speed.matmul_speedup
ONEDNN_SPEEDUP = cpu_speed.onednn_speedup
CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> dict[str, float]:
    """A clock that calls advance: {"now": seconds}."""
    time = {"now": 0.0}
    monkeypatch.setattr(cpu_speed.time, "perf_counter", lambda: time["now"])
    monkeypatch.setattr(cpu_speed, "_SECONDS", 1000.0)
    BF16_SPEEDUP.cache_clear()
    MATMUL_SPEEDUP.cache_clear()
    yield time
    BF16_SPEEDUP.cache_clear()
    MATMUL_SPEEDUP.cache_clear()


def test_bf16_speedup_is_the_ratio_of_the_shortest_products(monkeypatch, clock):
    noise = iter([-2.0, -0.5, 3, 1, 0, 0, 0, 7, 1, 1, 1, 1])  # the first round does not count

    def multiply(x, y):
        assert x.shape == (768, 768)
        clock["now"] += (3.0 if x.dtype == torch.float32 else 1.0) + next(noise)

    monkeypatch.setattr(torch, "mm", multiply)
    assert BF16_SPEEDUP() == 3.0


@pytest.mark.parametrize(
    ("limit", "rounds", "speedup"), [(0.5, 1, 0.04), (0.6, 2, 0.02), (1.1, 3, 0.02)]
)
def test_a_processor_without_bf16_does_not_delay_the_start(
    monkeypatch, clock, limit, rounds, speedup
):
    """No round begins after the limit; the warmup counts if no other round began."""
    calls = []

    def multiply(x, y):
        calls.append(x.dtype)
        warmup = len(calls) < 3
        clock["now"] += (0.02 if warmup else 0.01) if x.dtype == torch.float32 else 0.5

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(cpu_speed, "_SECONDS", limit)
    assert BF16_SPEEDUP() == pytest.approx(speedup)
    assert calls == [torch.float32, torch.bfloat16] * rounds


@pytest.mark.parametrize(("images", "measured"), [(1, 1), (3, 3), (1000, 8)])
def test_matmul_speedup_is_measured_on_the_sequences_of_the_run(
    monkeypatch, clock, images, measured
):
    monkeypatch.setattr(cpu_speed, "MEASURED_WEIGHTS", 8 * 3 * (2 * 25 + 4 * 4))
    calls, state = [], torch.get_rng_state()

    def attend(query, key, value, layout):
        calls.append((layout.backend, layout.groups, tuple(query.shape), query.dtype))
        clock["now"] += {"sdpa": 5.0, "matmul": 2.0}[layout.backend]
        return attention.attend(query, key, value, layout)

    monkeypatch.setattr(cpu_speed, "attend", attend)
    inputs = AttentionInputs(
        CPU, torch.bfloat16, head_dim=8, sequences=((2, 5), (4, 2)), heads=3, images=images
    )
    assert MATMUL_SPEEDUP(inputs) == 2.5
    groups = ((2 * measured, 5), (4 * measured, 2))
    tokens = 18 * measured
    assert (
        calls
        == [(backend, groups, (tokens, 3, 8), torch.bfloat16) for backend in ("sdpa", "matmul")] * 6
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "measure",
    [
        lambda: BF16_SPEEDUP(),
        lambda: MATMUL_SPEEDUP(AttentionInputs(CPU, sequences=((2, 5),), heads=3, images=2)),
        lambda: ONEDNN_SPEEDUP(64, 16),
    ],
    ids=["bf16", "matmul", "onednn"],
)
def test_the_caller_may_be_without_gradients(monkeypatch, mode, measure):
    monkeypatch.setattr(cpu_speed, "_ROUNDS", 1)
    for function in (BF16_SPEEDUP, MATMUL_SPEEDUP, ONEDNN_SPEEDUP, cpu_speed._noise):
        function.cache_clear()
    with mode():
        assert measure() > 0
        assert not torch.is_grad_enabled()
    for function in (BF16_SPEEDUP, MATMUL_SPEEDUP, ONEDNN_SPEEDUP):
        function.cache_clear()


def test_a_trainer_may_be_made_without_gradients(tiny, small_networks, crops_of, monkeypatch):
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_PRODUCT", 0)
    measured = {"matmul_speedup": MATMUL_SPEEDUP, "onednn_speedup": ONEDNN_SPEEDUP}
    for name, function in measured.items():
        function.cache_clear()
        monkeypatch.setattr(cpu_speed, name, function)
    config = tiny(mode="fast")
    with torch.no_grad():
        trainer = Trainer(config, 3)
    assert trainer.train_step(crops_of(config, 0)).isfinite()
    for function in measured.values():
        function.cache_clear()


@pytest.mark.parametrize(
    ("sequences", "images", "heads", "part"),
    [
        (((2, 197), (8, 37)), 64, 6, (3, 6, (2, 8))),  # ViT-S/16, 224 px
        (((2, 785), (8, 145)), 64, 6, (1, 1, (2, 8))),  # ViT-S/8
        (((2, 785), (8, 145)), 1, 1, (1, 1, (2, 8))),
        (((2, 901), (8, 37)), 2, 3, (1, 1, (2, 8))),  # ViT-Ti/16, 480 px
        (((2, 3601), (8, 145)), 64, 6, (1, 1, (1, 1))),  # ViT-S/8, 480 px
        (((2, 1200), (40, 145)), 1, 12, (1, 1, (1, 22))),
        (((2, 30_000),), 4, 16, (1, 1, (1,))),
    ],
)
def test_long_sequences_are_measured_in_few_heads_and_crops(sequences, images, heads, part):
    inputs = AttentionInputs(CPU, sequences=sequences, heads=heads, images=images)
    measured = cpu_speed.measured_part(inputs)
    assert (measured.images, measured.heads) == part[:2]
    assert measured.sequences == tuple(zip(part[2], (n for _, n in sequences), strict=True))
    least = sum(n * n for _, n in sequences)
    assert measured.weights <= max(cpu_speed.MEASURED_WEIGHTS, least)


def test_a_step_that_is_small_is_measured_as_a_whole():
    inputs = AttentionInputs(CPU, sequences=((2, 197), (8, 37)), heads=6, images=2)
    assert cpu_speed.measured_part(inputs) == inputs

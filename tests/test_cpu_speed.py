"""Measurements at start: what they run. How fast it is depends on the machine."""

from __future__ import annotations

import pytest
import torch

from fastdino import cpu_speed
from fastdino.models import attention
from fastdino.models.attention import AttentionInputs

BF16_SPEEDUP, MATMUL_SPEEDUP = cpu_speed.bf16_speedup, cpu_speed.matmul_speedup
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
    noise = iter([9.0, 9, 3, 1, 0, 0, 0, 7, 1, 1, 1, 1])  # the first round does not count

    def multiply(x, y):
        assert x.shape == (768, 768)
        clock["now"] += (3.0 if x.dtype == torch.float32 else 1.0) + next(noise)

    monkeypatch.setattr(torch, "mm", multiply)
    assert BF16_SPEEDUP() == 3.0


def test_a_processor_without_bf16_does_not_delay_the_start(monkeypatch, clock):
    """After a slow round, one round is measured and no other begins."""
    calls = []

    def multiply(x, y):
        calls.append(x.dtype)
        clock["now"] += 0.01 if x.dtype == torch.float32 else 0.5

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(cpu_speed, "_SECONDS", 0.5)
    assert BF16_SPEEDUP() == pytest.approx(0.02)
    assert calls == [torch.float32, torch.bfloat16] * 2


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

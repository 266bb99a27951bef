"""fastdino.bench.scaling: the model of the step on many GPUs."""

from __future__ import annotations

import pytest

from fastdino import cli
from fastdino.bench import scaling
from fastdino.bench.scaling import StepTime
from fastdino.bench.step_messages import Message, gradient_buckets, step_messages
from fastdino.config import TrainConfig


def test_efficiency_falls_with_the_number_of_gpus():
    messages = [Message(262_144), Message(60_000_000, 0.0), Message(20_000_000, 1.0)]
    scaled = scaling.scale(StepTime(0.02, 0.01), messages)
    assert (scaled[0].gpus, scaled[0].efficiency) == (1, 1.0)
    efficiencies = [one.efficiency for one in scaled]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert len(set(efficiencies)) == len(efficiencies)


def test_communication_during_the_backward_pass_is_hidden():
    early, late = Message(50_000_000, 0.0), Message(20_000_000, 1.0)
    time = StepTime(0.02, 0.01)
    tail = scaling.sum_seconds(late.size, 8)
    assert scaling.exposed_seconds(time, [early], 8) == 0
    assert scaling.exposed_seconds(time, [early, late], 8) == pytest.approx(tail)
    slow = Message(5_000_000_000, 0.0)
    wanted = scaling.sum_seconds(slow.size, 8) - time.backward
    assert scaling.exposed_seconds(time, [slow], 8) == pytest.approx(wanted)


def test_a_sum_that_the_gpu_waits_for_is_not_hidden():
    time, loss = StepTime(0.02, 0.01), Message(4, blocks=True)
    wait = scaling.sum_seconds(4, 64)
    assert scaling.exposed_seconds(time, [loss, Message(1000)], 64) == pytest.approx(wait)
    assert scaling.exposed_seconds(time, [loss], 1) == 0


def test_a_large_sum_takes_twice_its_bytes_over_the_bandwidth():
    assert scaling.sum_seconds(4 * 10**12, 8) == pytest.approx(17.5, rel=1e-4)  # 2 * 7/8 * 10
    assert scaling.sum_seconds(3 * 10**12, 1024) == pytest.approx(20 * 1023 / 1024, rel=1e-4)


def test_buckets_and_efficiency_of_vit_small():
    messages = gradient_buckets(TrainConfig(arch="vit_small"))
    assert messages[0] == Message(4 * 65536 * 256, 0.0)  # the last layer, 38 % of all
    assert sum(message.size for message in messages) == 4 * (21_665_664 + 22_352_128 - 65_536)
    assert messages[-1].ready == 1.0
    assert all(message.size >= 25 << 20 for message in messages[1:-1])
    messages = step_messages(TrainConfig(arch="vit_small"), 8)
    scaled = scaling.scale(StepTime(64 / 3600, 0.01), messages, (8, 1024))
    assert [one.efficiency for one in scaled] == pytest.approx([0.987, 0.963], abs=0.003)


def test_a_given_step_needs_no_measurement(capsys):
    words = ["--arch", "vit_small", "--scaling", "--step_ms", "20", "--backward_ms", "11"]
    assert cli.main(["bench", "--device", "cpu", *words]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "a step of 20 ms with a backward pass of 11 ms (given), 5 buckets of 175.8 MB" in text
    assert "measured on a CPU" not in text


def test_bytes_of_sharded_networks_grow_with_the_padding_of_their_rows():
    config = TrainConfig(arch="vit_tiny", out_dim=1000, fsdp=True)
    by_ranks = {ranks: step_messages(config, ranks) for ranks in (1, 7)}
    weights = {n: sum(m.size for m in ms if m.kind == "all-gather") for n, ms in by_ranks.items()}
    assert weights[1] == 3 * 4 * (5_524_416 + 192 * 2048 + 2048 * 2305 + 256 + 1000 * 257 + 2048)
    assert weights[7] > weights[1]
    assert Message(700, kind="all-gather").sent(7) == Message(350).sent(7) == 600

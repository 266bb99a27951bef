"""Steps on two ranks: messages, learning rate and means."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastdino import TrainConfig, Trainer, cpu_speed, distributed
from fastdino.runtime import MEASURED, resolve_runtime
from tests.processes import run_two
from tests.small_networks import shrink_networks

ACCUMULATED = (1, 2)


def messages_of(trainer, crops):
    """Return the number of collectives of a step, by their names in the backend."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.train_step(crops)
    names = (event.name for event in profiled.events())
    return Counter(name.partition(":")[2] for name in names if name.startswith("gloo:"))


def choices_of(settings, speedup):
    """Return the measured choices of a rank on whose processor a measurement gives `speedup`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_speed, "bf16_speedup", lambda: speedup)
        patch.setattr(cpu_speed, "matmul_speedup", lambda inputs: speedup)
        patch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
        config = TrainConfig.from_dict(settings | {"mode": "fast"})
        resolved = resolve_runtime(config, make_crops=False).to_dict()
    return {name: resolved[name] for name in MEASURED}


def measure_steps(settings, crops, folder):
    shrink_networks(pytest.MonkeyPatch())
    results = {}
    with distributed.process_group(torch.device("cpu"), "env://"):
        rank = distributed.rank()
        results["choices"] = choices_of(settings, 0.25 if rank else 4.0)
        own = [crop[4 * rank :][:4] for crop in crops]
        for fsdp in (False, True):
            for parts in ACCUMULATED:
                batch = {"batch_size_per_gpu": 4 // parts, "grad_accum": parts, "fsdp": fsdp}
                trainer = Trainer(TrainConfig.from_dict(settings | batch), 2)
                for _ in range(3):  # the first steps of DDP also send the order of the gradients
                    trainer.train_step(own)
                results[f"{fsdp} {parts}"] = dict(messages_of(trainer, own))
                results["lr"] = trainer.lr_schedule(2)
        value = torch.tensor([1.0 + rank, float("nan") if rank else 1.0])
        before = value.clone()
        results["mean"] = [str(x) for x in distributed.mean(value).tolist()]
        assert torch.equal(value[:1], before[:1])
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Results of steps on two ranks."""
    settings = TrainConfig(
        arch="vit_nano", patch_size=8, out_dim=64, global_crops_size=32, local_crops_size=16,
        local_crops_number=2, epochs=3, warmup_epochs=0, lr=0.5, device="cpu",
    ).to_dict()  # fmt: skip
    sizes = (32, 32, 16, 16)
    crops = [torch.randn(8, 3, size, size) for size in sizes]
    folder = tmp_path_factory.mktemp("ranks")
    run_two(measure_steps, settings, crops, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("fsdp", [False, True])
def test_accumulation_sends_gradients_once_per_step(steps, fsdp):
    """Only the last part of a batch reduces them; FSDP gathers weights for each part."""
    for results in steps:
        whole, split = (Counter(results[f"{fsdp} {parts}"]) for parts in ACCUMULATED)
        assert sum(whole.values()) >= 3  # gradients, center and loss
        for name in [name for name in whole if fsdp and "gather" in name]:
            assert split.pop(name) >= whole.pop(name) > 0
        assert split == whole


def test_learning_rate_grows_with_the_global_batch(steps):
    assert [results["lr"] for results in steps] == pytest.approx([0.5 * 8 / 256 * 0.75] * 2, 1e-2)


def test_means_are_of_all_ranks(steps):
    assert [results["mean"] for results in steps] == [["1.5", "nan"]] * 2


def test_rank_0_of_different_processors_decides(steps):
    """Ranks in different precisions would train on gradients of different networks."""
    for results in steps:
        assert {name: choice["value"] for name, choice in results["choices"].items()} == {
            "precision": "bf16",
            "attention": "matmul",
            "onednn": "off",  # not measured in bf16
        }
        measured = [results["choices"][name] for name in ("precision", "attention")]
        assert all("4x" in choice["reason"] for choice in measured)


def accumulate(settings, crops, folder) -> None:
    """Take two steps of two parts on one of two ranks; save the weights."""
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), "env://"):
        trainer, rank = Trainer(TrainConfig.from_dict(settings), 2), distributed.rank()
        for _ in range(2):
            trainer.train_step([crop[rank::2] for crop in crops])
        torch.save(trainer.student.state_dict(), folder / f"{rank}.pt")


def test_other_networks_than_vits_accumulate_gradients_too(tmp_path):
    """Their gradients have PyTorch's own buckets, which are not static under accumulation."""
    settings = TrainConfig(
        arch="resnet18", out_dim=64, global_crops_size=32, local_crops_number=0, lr=0.5,
        batch_size_per_gpu=2, grad_accum=2, epochs=2, warmup_epochs=0, device="cpu",
    ).to_dict()  # fmt: skip
    run_two(accumulate, settings, [torch.randn(8, 3, 32, 32) for _ in range(2)], tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name

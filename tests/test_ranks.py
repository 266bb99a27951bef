"""Two ranks: messages per step, learning rate, and their random streams across a resume."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastdino import TrainConfig, Trainer, checkpoint, distributed
from fastdino.training.loop import train
from tests.processes import run_two
from tests.small_networks import shrink_networks
from tests.test_exact_resume import differences

ACCUMULATED = (1, 2)


def messages_of(trainer, crops):
    """Return the number of collectives of a step, by their names in the backend."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.train_step(crops)
    names = (event.name for event in profiled.events())
    return Counter(name.partition(":")[2] for name in names if name.startswith("gloo:"))


def measure_steps(settings, crops, folder):
    shrink_networks(pytest.MonkeyPatch())
    results = {}
    with distributed.process_group(torch.device("cpu"), "env://"):
        rank = distributed.rank()
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


def train_in_two(settings):
    shrink_networks(pytest.MonkeyPatch())
    rank = int(os.environ["RANK"])
    whole = TrainConfig.from_dict(settings | {"output_dir": settings["output_dir"] + "/whole"})
    assert train(whole) == "finished"
    folder = settings["output_dir"]
    if rank == 0:
        os.mkdir(f"{folder}/resumed")
        shutil.copy(f"{folder}/whole/checkpoint0000.pth", f"{folder}/resumed/checkpoint.pth")
    # The other rank opens it after the ranks have met in the run's process group.
    resumed = TrainConfig.from_dict(settings | {"output_dir": folder + "/resumed"})
    torch.manual_seed(99)
    assert train(resumed) == "finished"


def test_ranks_have_random_streams_of_their_own_across_a_resume(tiny, pictures, tmp_path):
    """Stochastic depth draws from them."""
    config = tiny(
        data_path=str(pictures), output_dir=str(tmp_path), drop_path_rate=0.5, epochs=2, seed=3,
        batch_size_per_gpu=2, saveckp_freq=1, freeze_last_layer=0,
    )  # fmt: skip
    run_two(train_in_two, config.to_dict())
    first = checkpoint.load(tmp_path / "whole/checkpoint0000.pth")["generators"]
    whole, resumed = (checkpoint.load(tmp_path / name / "checkpoint.pth")
                      for name in ("whole", "resumed"))  # fmt: skip
    states = [state["cpu"] for state in (*first, *whole["generators"])]
    for i, state in enumerate(states):
        assert not any(torch.equal(state, other) for other in states[:i])
    log = (tmp_path / "whole/log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [0, 1], "written by one rank"
    for state in (whole, resumed):
        del state["args"]["output_dir"]
    assert differences(resumed, whole) == []

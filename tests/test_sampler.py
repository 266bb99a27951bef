"""fastdino.data.sampler: the order of samples and their division into steps and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from fastdino.data.sampler import EpochPlan, epoch_order, steps_per_epoch
from fastdino.errors import DataError


@pytest.mark.parametrize(("n", "world"), [(10, 1), (10, 4), (3, 8), (64, 2), (1001, 3), (5, 16)])
def test_order_matches_distributed_sampler(n, world):
    for epoch in (0, 7):
        for rank in range(world):
            theirs = DistributedSampler(range(n), world, rank, shuffle=True, seed=3)
            theirs.set_epoch(epoch)
            ours = epoch_order(n, seed=3, epoch=epoch, rank=rank, world_size=world)
            assert ours.dtype == np.int64
            assert ours.tolist() == list(theirs)


def test_ranks_cover_every_sample_once():
    parts = [epoch_order(24, seed=0, epoch=1, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))


def test_order_does_not_advance_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epoch_order(10, seed=0, epoch=0, rank=0, world_size=1)
    assert torch.equal(before, torch.get_rng_state())


def test_incomplete_batches_are_dropped():
    assert steps_per_epoch(100, 32, 1) == 3
    assert steps_per_epoch(100, 25, 4) == 1
    assert steps_per_epoch(101, 13, 4) == 2


def test_fewer_images_than_a_batch_is_an_error():
    with pytest.raises(DataError, match=r"20 images .* 64.*--batch_size_per_gpu.* 20"):
        steps_per_epoch(20, 64, 1)
    with pytest.raises(DataError, match=r"100 images give 25 .*each of 4 ranks.* 64"):
        steps_per_epoch(100, 64, 4)


def test_plan_started_later_has_the_same_batches():
    plan = EpochPlan(n=23, batch=4, seed=0, rank=0, world_size=2)
    assert plan.steps == 3
    assert plan.batches(5, 1) == plan.batches(5, 0)[1:]
    assert plan.batches(5, 3) == []
    assert plan.batches(5, 0) != plan.batches(6, 0)
    with pytest.raises(ValueError, match="start_step must be from 0 to 3, got 4"):
        plan.batches(5, 4)


LAST = ("paper", "drop", "pad")


def steps_of(n, batch, world, last_batch, start=0):
    """Return [steps][G]: the samples of all ranks in each step from `start` on, in order."""
    plans = [EpochPlan(n, batch, 7, rank, world, last_batch) for rank in range(world)]
    ranks = [np.reshape(plan.batches(2, start), (-1, batch)) for plan in plans]
    return np.stack(ranks, axis=-1).reshape(-1, batch * world).tolist()


@pytest.mark.parametrize("last_batch", LAST)
@pytest.mark.parametrize("n", [24, 29, 35, 96, 101])
def test_resume_with_another_world_size_sees_exactly_the_remaining_samples(n, last_batch):
    epochs = {world: steps_of(n, 12 // world, world, last_batch) for world in (1, 2, 3, 4, 6, 12)}
    for world, whole in epochs.items():
        for other, theirs in epochs.items():
            steps = min(len(whole), len(theirs))
            assert len(whole) == len(theirs) or last_batch == "paper", (world, other)
            for start in range(steps + 1):
                remaining = steps_of(n, 12 // other, other, last_batch, start)
                assert whole[:start] + remaining[: steps - start] == whole[:steps]


@pytest.mark.parametrize("n", [23, 24, 25, 35, 36, 47])
def test_paper_epoch_of_any_world_size_equals_drop_or_pad(n):
    # A run can therefore resume with any other world size.
    for world in (1, 2, 3, 4, 6, 12):
        paper = steps_of(n, 12 // world, world, "paper")
        others = [steps_of(n, 12, 1, last_batch) for last_batch in ("drop", "pad")]
        assert paper in others


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("n", [24, 29, 31])
def test_drop_repeats_no_sample_and_pad_omits_none(n, world):
    dropped = np.concatenate(steps_of(n, 8 // world, world, "drop"))
    assert len(dropped) == len(set(dropped.tolist())) == n // 8 * 8
    padded = np.concatenate(steps_of(n, 8 // world, world, "pad")).tolist()
    assert set(padded) == set(range(n))
    assert sorted(padded[:n]) == list(range(n)), "repeated samples come last"
    assert padded[n:] == padded[: len(padded) - n]


def test_pad_fills_a_batch_that_drop_refuses():
    assert steps_per_epoch(20, 64, 2, "pad") == 1
    with pytest.raises(DataError, match="20 images give 10 .*--last_batch pad"):
        steps_per_epoch(20, 64, 2, "drop")
    (batch,) = EpochPlan(3, 8, 0, 0, 1, "pad").batches(0, 0)
    assert batch == (batch[:3] * 3)[:8]

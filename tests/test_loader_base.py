"""fastdino.data.loader_base: what a loader takes from its config, rank and dataset."""

from __future__ import annotations

import numpy as np
import pytest

from fastdino.data.loader_base import CropLoader
from fastdino.data.sampler import EpochPlan
from tests.loaders import make_config


class Indices(CropLoader):
    """A loader whose batches are the indices of their samples."""

    def _batches(self, epoch, batches):
        yield from ((epoch, batch) for batch in batches)

    def _shut_down(self):
        pass


def batches_of(dataset, rank=0, world_size=1, epoch=0, start=0, **changes):
    loader = Indices(make_config(**changes), dataset, rank=rank, world_size=world_size)
    batches = list(loader.epoch(epoch, start))
    assert len(batches) == loader.steps_per_epoch - start
    assert all(of == epoch for of, _ in batches)
    return [batch for _, batch in batches]


@pytest.mark.parametrize(
    ("changes", "rank", "world", "plan"),
    [
        ({}, 0, 1, (4, 0, 0, 1)),
        ({"seed": 3}, 0, 1, (4, 3, 0, 1)),
        ({}, 1, 2, (4, 0, 1, 2)),
        ({"batch_size_per_gpu": 2, "grad_accum": 3}, 0, 2, (6, 0, 0, 2)),
        ({"last_batch": "pad"}, 0, 1, (4, 0, 0, 1, "pad")),
        ({"last_batch": "pad", "batch_size_per_gpu": 5}, 2, 3, (5, 0, 2, 3, "pad")),
        ({"last_batch": "drop", "batch_size_per_gpu": 3}, 0, 4, (3, 0, 0, 4, "drop")),
        ({"batch_size_per_gpu": 2, "global_batch_size": 12}, 1, 2, (6, 0, 1, 2)),
        ({"last_batch": "pad", "global_batch_size": 8}, 1, 4, (2, 0, 1, 4, "pad")),
    ],
)
def test_batches_are_those_of_the_settings(photos, changes, rank, world, plan):
    for epoch, start in ((0, 0), (1, 0), (5, 1)):
        expected = EpochPlan(18, *plan).batches(epoch, start)
        assert batches_of(photos, rank, world, epoch, start, **changes) == expected


def test_every_setting_changes_the_batches(photos):
    """The seed, the epoch, the rank, the world size, the batch and the treatment of the last."""
    made = [
        batches_of(photos), batches_of(photos, seed=7), batches_of(photos, epoch=1),
        batches_of(photos, 0, 2), batches_of(photos, 1, 2), batches_of(photos, grad_accum=2),
        batches_of(photos, batch_size_per_gpu=3), batches_of(photos, last_batch="pad"),
    ]  # fmt: skip
    assert all(one not in made[:i] for i, one in enumerate(made))


def test_ranks_see_different_samples_of_one_order(photos):
    """Dealt one by one, so that the global batch does not depend on the world size."""
    whole = batches_of(photos, batch_size_per_gpu=6, epoch=2)
    for world in (2, 3, 6):
        ranks = [
            batches_of(photos, rank, world, epoch=2, batch_size_per_gpu=6 // world)
            for rank in range(world)
        ]
        dealt = [[index for of_step in zip(*steps, strict=True) for index in of_step]
                 for steps in zip(*ranks, strict=True)]  # fmt: skip
        assert dealt == whole


def test_a_global_batch_has_the_same_steps_on_any_number_of_ranks(photos):
    """Also where the paper's loader repeats images for some numbers of ranks only."""
    epochs, fewer = [], photos.subset(np.arange(17))
    for world in (1, 2, 3, 6):
        ranks = [
            batches_of(fewer, rank, world, global_batch_size=6, batch_size_per_gpu=4)
            for rank in range(world)
        ]
        epochs.append([[index for of_step in zip(*steps, strict=True) for index in of_step]
                       for steps in zip(*ranks, strict=True)])  # fmt: skip
    assert len(epochs[0]) == 2
    assert all(epoch == epochs[0] for epoch in epochs)

"""Random numbers of the crops of a run: no two of its crops share them, on whatever rank."""

from __future__ import annotations

import numpy as np
import pytest

from fastdino.augmentation.params import draw_crops
from fastdino.data.sampler import EpochPlan
from tests.loaders import make_config

N = 48


def factors_of(epoch, rank, world, seed=0):
    """Return the four color factors of each crop that a rank makes in an epoch, by sample."""
    plan = EpochPlan(N, 4, seed, rank, world)
    ids = np.concatenate(plan.batches(epoch, 0))
    drawn = draw_crops(
        make_config(seed=seed, local_crops_number=8), epoch, ids, np.tile([60, 80], (len(ids), 1))
    )
    rows = np.concatenate([params.jitter_factor.numpy() for params in drawn], axis=1)
    return dict(
        zip(ids.tolist(), [list(map(tuple, crops.tolist())) for crops in rows], strict=True)
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_two_crops_share_random_numbers(world):
    seen = [
        factors
        for epoch in range(3)
        for rank in range(world)
        for crops in factors_of(epoch, rank, world).values()
        for factors in crops
    ]
    assert len(seen) == 3 * N * 10
    assert len(set(seen)) == len(seen)
    other = [x for crops in factors_of(0, 0, world, seed=1).values() for x in crops]
    assert not set(other) & set(seen)


def test_a_sample_has_the_same_crops_on_any_rank():
    whole = factors_of(1, 0, 1)
    for world in (2, 3, 4):
        ranks = [factors_of(1, rank, world) for rank in range(world)]
        assert sum(map(len, ranks)) == N
        assert {index: crops for made in ranks for index, crops in made.items()} == whole

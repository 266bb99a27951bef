"""fastdino.batch_split: the images of a step among processes and forward passes."""

from __future__ import annotations

import pytest

from fastdino import TrainConfig
from fastdino.batch_split import split_global_batch
from fastdino.config import LARGEST_SIZE
from fastdino.errors import ConfigError


@pytest.mark.parametrize("batch", [1, 2, 12, 30, 64, 97, 1024])
@pytest.mark.parametrize("largest", [1, 4, 7, 64])
def test_a_split_has_the_batch_and_the_fewest_passes_that_fit(batch, largest):
    for world in (k for k in range(1, batch + 1) if batch % k == 0):
        images, passes = split = split_global_batch(batch, largest, world)
        assert split.images_per_step * world == images * passes * world == batch
        assert images <= largest
        fewer = [k for k in range(1, passes) if batch // world % k == 0]
        assert all(batch // world // k > largest for k in fewer)


def test_the_largest_prime_batch_is_split_at_once():
    assert split_global_batch(LARGEST_SIZE, 64, 1) == (1, LARGEST_SIZE)


@pytest.mark.parametrize(
    ("batch", "world", "allowed"),
    [
        (10, 4, "use 8 or 12, or a number of processes that divides it, such as 1, 2, 5"),
        (3, 8, "use 8, or a number of processes that divides it, such as 1, 3"),
        (
            1024,
            96,
            "use 960 or 1056, or a number of processes that divides it, such as 32, 64, 128",
        ),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error_with_the_values_that_do(batch, world, allowed):
    with pytest.raises(ConfigError) as error:
        split_global_batch(batch, 64, world)
    assert str(error.value) == (
        f"--global_batch_size {batch} cannot be divided equally among {world} processes: {allowed}"
    )


def test_a_config_splits_its_global_batch_or_repeats_its_own_batch():
    assert TrainConfig(batch_size_per_gpu=8, grad_accum=3).split_batch(5) == (8, 3)
    config = TrainConfig(batch_size_per_gpu=8, global_batch_size=48)
    assert [config.split_batch(world) for world in (1, 2, 3, 6)] == [
        (8, 6), (8, 3), (8, 2), (8, 1)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="48 cannot be divided .* 5 processes"):
        config.split_batch(5)


def test_koleo_needs_two_images_in_the_passes_that_follow():
    config = TrainConfig(batch_size_per_gpu=4, global_batch_size=14, koleo_weight=0.1)
    with pytest.raises(ConfigError, match=r"--koleo_weight .* passes of one image with 2 process"):
        config.split_batch(2)
    assert config.split_batch(7) == (2, 1)

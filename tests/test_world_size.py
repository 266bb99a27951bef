"""fastdino.training.world_size: checkpoints of another number of processes."""

from __future__ import annotations

import pytest

from fastdino.errors import CheckpointError
from fastdino.training.world_size import explain_world_size

SAME = "images, their order and crops, and all schedules are the same; sums are rounded differently"


def explain(config, saved, ranks, world_size, *, batch_norm=False):
    state = {"args": saved.to_dict(), "generators": [{}] * ranks}
    return explain_world_size(state, config, world_size, batch_norm=batch_norm)


@pytest.mark.parametrize(
    ("settings", "before", "now", "expected"),
    [
        ({}, 2, 2, ""),
        ({}, 2, 1, f"resuming on 1 process(es) a run of 2: {SAME}"),
        ({"drop_path_rate": 0.1}, 1, 4, f"resuming on 4 process(es) a run of 1: {SAME}"),
        (
            {"koleo_weight": 0.1, "drop_path_rate": 0.1, "arch": "resnet18"},
            2,
            1,
            f"resuming on 1 process(es) a run of 2: {SAME}, KoLeo compares the images of other "
            "groups, stochastic depth draws other numbers",
        ),
        # A pass of all ranks has 4 images on 1 rank, 8 on 2 or 4.
        ({"centering": "sinkhorn"}, 2, 4, f"resuming on 4 process(es) a run of 2: {SAME}"),
        (
            {"centering": "sinkhorn"},
            1,
            4,
            f"resuming on 4 process(es) a run of 1: {SAME}, Sinkhorn-Knopp is over 8 images "
            "(was 4)",
        ),
    ],
)
def test_a_changed_number_of_processes_is_explained(tiny, settings, before, now, expected):
    config = tiny(batch_size_per_gpu=4, global_batch_size=8, **settings)
    assert explain(config, config, before, now) == expected


def test_batch_norm_over_other_batches_is_mentioned(tiny):
    config = tiny(batch_size_per_gpu=4, global_batch_size=8)
    text = explain(config, config, 2, 1, batch_norm=True)
    assert text.endswith(", batch norm is over 4 images (was 8)")


def test_another_global_batch_is_an_error_that_names_the_flag(tiny):
    saved, again = tiny(batch_size_per_gpu=4, grad_accum=2), tiny(batch_size_per_gpu=4)
    with pytest.raises(CheckpointError) as error:
        explain(again, saved, 3, 1)
    assert str(error.value) == (
        "the checkpoint's run had a global batch of 24 images on 3 process(es), this one has 4 on "
        "1: use --global_batch_size 24, which keeps it with any number of processes, without "
        "--grad_accum"
    )
    assert explain(tiny(batch_size_per_gpu=4, global_batch_size=24), saved, 3, 1)
    assert explain(again, saved, 1, 1) == "", "the settings changed, which is a warning"


@pytest.mark.parametrize(("before", "now"), [(3, 2), (2, 3), (1, 2)])
def test_a_slightly_larger_or_smaller_global_batch_is_an_error(tiny, before, now):
    config = tiny(batch_size_per_gpu=4)
    with pytest.raises(CheckpointError, match=f"batch of {4 * before} images on {before} process"):
        explain(config, config, before, now)


def test_checkpoints_of_the_papers_code_are_not_compared(tiny):
    assert explain_world_size({"args": tiny().to_dict()}, tiny(), 2, batch_norm=False) == ""
    state = {"generators": [{}], "args": object()}
    assert explain_world_size(state, tiny(), 2, batch_norm=False) == ""

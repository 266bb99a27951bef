"""Collectives of the losses on three and four ranks, and the centers that depend on them.

Legend: K prototypes.
"""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels import DINOLoss, reference
from fastdino_kernels.collectives import (
    all_reduce_max_,
    all_reduce_sum_,
    check_equal_on_ranks,
    world_size,
)
from fastdino_kernels.compat.rank_mean import move_center_, start_rank_mean
from fastdino_kernels.compat.teacher_center import TeacherCenter

from tests.processes import run_ranks

K = 5


def numbers(rank: int, rows: int = 1) -> torch.Tensor:
    """Draw the float64 numbers [rows, K] of a rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, K, generator=generator, dtype=torch.float64)


def on_ranks() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # All but the first rank, and the first rank alone.
    groups = [torch.distributed.new_group(list(range(1, world))), torch.distributed.new_group([0])]
    check_reductions(rank, list(range(world)), None)
    if rank > 0:
        check_reductions(rank, list(range(1, world)), groups[0])
    else:
        check_reductions(rank, [0], groups[1])
        with pytest.raises(ValueError, match="group must contain this rank"):
            world_size(groups[0])
    check_sizes(rank, world)
    check_centers(rank, world)
    check_center_of_the_module(rank, world)
    torch.distributed.destroy_process_group()


def check_reductions(rank: int, members: list[int], group) -> None:
    """Reduce the members' numbers; each rank has the largest of one prototype."""
    assert world_size(group) == len(members)
    every = torch.cat([numbers(member) for member in members])
    largest, total = numbers(rank)[0], numbers(rank)[0]
    all_reduce_max_(largest, group)
    all_reduce_sum_(total, group)
    assert torch.equal(largest, every.amax(dim=0))
    torch.testing.assert_close(total, every.sum(dim=0), rtol=1e-14, atol=1e-14)


def check_sizes(rank: int, world: int) -> None:
    """Raise on every rank if the size of any single rank is larger or smaller."""
    like = torch.zeros(1)
    check_equal_on_ranks("[A, B]", (3, 4), like, None)
    for odd in range(world):
        for change in (-1, 1):
            sizes = (3, 4 + change * (rank == odd))
            limits = sorted((4, 4 + change))
            expected = (
                rf"\[A, B\] must be the same on all ranks, got \[3, {sizes[1]}\] on this one, "
                rf"and values from \[3, {limits[0]}\] to \[3, {limits[1]}\]"
            )
            with pytest.raises(ValueError, match=expected):
                check_equal_on_ranks("[A, B]", sizes, like, None)


def check_centers(rank: int, world: int) -> None:
    """Average the means of the ranks, whose numbers of rows differ; the second rank has none."""
    batches = [numbers(r, 0 if r == 1 else r + 2) for r in range(world)]
    expected = torch.stack([batch.mean(0) for batch in batches if len(batch)]).mean(0)
    total = batches[rank].sum(dim=0)
    before = total.clone()
    mean, ranks = start_rank_mean(total, len(batches[rank])).wait()
    assert ranks == world - 1
    assert torch.equal(total, before)
    torch.testing.assert_close(mean, expected, rtol=1e-14, atol=1e-14)
    center = torch.ones(1, K, dtype=torch.float64)
    move_center_(center, mean, ranks, 0.75)
    torch.testing.assert_close(center[0], 0.75 + 0.25 * expected, rtol=1e-14, atol=1e-14)
    delayed = TeacherCenter((1, K), 0.1, 0.75).double()
    for _ in range(2):
        delayed.start_update(batches[rank])
        delayed.apply_center_update()
    moved = 0.25 * (0.75 + 1) * expected
    torch.testing.assert_close(delayed.center[0], moved, rtol=1e-14, atol=1e-14)
    delayed.start_update(batches[rank][:0])  # no rank has rows
    delayed.apply_center_update()
    torch.testing.assert_close(delayed.center[0], moved, rtol=1e-14, atol=1e-14)


def check_center_of_the_module(rank: int, world: int) -> None:
    """Average the rows of all ranks, which all have the same number of them."""
    loss_fn = DINOLoss(K, 2, 0.04, 0.04, 0, 1, center_momentum=0.75).double()
    loss_fn.center.fill_(1)
    own = numbers(rank, 6).sum(dim=0)
    loss_fn.update_center(own, 6)
    every = sum(numbers(r, 6).sum(dim=0) for r in range(world))
    expected = reference.update_center(torch.ones(1, K).double(), every, 6 * world, 0.75)
    torch.testing.assert_close(loss_fn.center, expected, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="rows must be >= 1, got 0"):
        loss_fn.update_center(own, 0)


@pytest.mark.parametrize("ranks", [3, 4])
def test_reductions_and_centers(ranks):
    run_ranks(ranks, on_ranks)


def test_without_a_process_group_nothing_is_reduced():
    x = numbers(0)[0]
    all_reduce_max_(x, None)
    all_reduce_sum_(x, None)
    assert torch.equal(x, numbers(0)[0])
    assert world_size(None) == 1
    check_equal_on_ranks("[K]", (K,), x, None)


class Reduction:
    """An all-reduce of two equal ranks whose result exists only after wait()."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.result, self.tensor = 2 * tensor, tensor
        tensor.fill_(torch.nan)

    def wait(self) -> None:
        self.tensor.copy_(self.result)


@pytest.fixture
def two_slow_ranks(monkeypatch) -> None:
    """Pretend that there are two ranks with the same numbers, and that an all-reduce is slow."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, async_op=False: Reduction(tensor)
    )


@pytest.mark.usefixtures("two_slow_ranks")
def test_centers_wait_for_the_all_reduce():
    rows = numbers(0, 4)
    loss_fn = DINOLoss(K, 2, 0.04, 0.04, 0, 1, center_momentum=0.75).double()
    finish = loss_fn.start_center_update(rows.sum(dim=0), 4)
    assert loss_fn.center.count_nonzero() == 0
    finish()
    torch.testing.assert_close(loss_fn.center[0], 0.25 * rows.mean(dim=0))
    delayed = TeacherCenter((1, K), 0.1, 0.75).double()
    delayed.start_update(rows)
    assert not delayed.updated
    state = delayed.__getstate__()  # finishes the all-reduce, whose handle cannot be copied
    assert state["reduce_handle"] is None
    assert state["async_batch_center"].isfinite().all()
    delayed.start_update(rows)
    delayed.apply_center_update()
    torch.testing.assert_close(delayed.center[0], 0.25 * rows.mean(dim=0))

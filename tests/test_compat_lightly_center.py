"""compat.lightly.Center and compat.rank_mean against the equation and the installed lightly.

Legend: K prototypes.
"""

from __future__ import annotations

import pytest
import torch
from fastdino_kernels.compat.lightly import Center
from fastdino_kernels.compat.rank_mean import move_center_, start_rank_mean

from tests.processes import run_ranks


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def original():
    """The class Center of the installed lightly."""
    return pytest.importorskip("lightly.models.modules.center").Center


@pytest.mark.parametrize(
    ("size", "shape"), [((1, 7), (5, 7)), ((1, 1, 7), (2, 3, 7)), ((1, 3, 7), (4, 3, 7))]
)
def test_center_moves_as_lightly_for_several_steps(original, size, shape):
    ours, theirs = Center(size, momentum=0.7).double(), original(size, momentum=0.7).double()
    for step in range(4):
        x = draw(*shape, seed=step)
        ours.update(x)
        theirs.update(x)
        assert ours.value.shape == size
        torch.testing.assert_close(ours.value, theirs.value, rtol=1e-12, atol=1e-14)


def test_center_has_the_same_attributes_and_state(original):
    ours, theirs = Center((1, 1, 7), "mean", 0.8), original((1, 1, 7), "mean", 0.8)
    for name in ("size", "dim", "momentum"):
        assert getattr(ours, name) == getattr(theirs, name)
    theirs.update(draw(2, 3, 7, dtype=torch.float32))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.value, theirs.value)
    theirs.load_state_dict(ours.state_dict())
    assert "momentum=0.8" in repr(ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_fp32_for_half_precision(dtype):
    center = Center((1, 7), momentum=0.5)
    x = draw(3000, 7, dtype=dtype) + 1
    center.update(x)
    torch.testing.assert_close(center.value[0], 0.5 * x.float().mean(dim=0))
    assert center.value.dtype == torch.float32


def test_empty_batch_changes_nothing():
    center = Center((1, 7))
    center.update(draw(4, 7))
    before = center.value.clone()
    center.update(draw(0, 7))
    assert torch.equal(center.value, before)
    assert before.abs().sum() > 0


@pytest.mark.parametrize(
    ("error", "x", "match"),
    [
        (ValueError, torch.ones(4, 6), r"shape \(1, 7\).*got \(4, 6\)"),
        (ValueError, torch.ones(7), r"got \(7,\)"),
        (TypeError, torch.ones(4, 7, dtype=torch.int64), "int64"),
        (TypeError, [1.0], "got list"),
    ],
)
def test_invalid_batches(error, x, match):
    with pytest.raises(error, match=match):
        Center((1, 7)).update(x)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (((1, 7), "median"), r"Unknown mode 'median'. Valid modes are \['mean'\]"),
        (((2, 7),), r"1 in some dimension, got \(2, 7\)"),
        (((1, 0),), r"got \(1, 0\)"),
        (((),), r"got \(\)"),
        (((1, 7), "mean", 1.1), r"momentum must be in \[0, 1\], got 1.1"),
    ],
)
def test_invalid_constructor_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        Center(*arguments)


def unequal_ranks() -> None:
    """The mean is that of the ranks with rows: the third has none, and at last nobody has."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    batches = [draw(2, 7, seed=1), draw(5, 7, seed=2), draw(0, 7)]
    center = Center((1, 7), momentum=0.5).double()
    expected = torch.zeros(7, dtype=torch.float64)
    for _ in range(2):
        center.update(batches[rank])
        expected = 0.5 * expected + 0.25 * (batches[0].mean(dim=0) + batches[1].mean(dim=0))
    center.update(draw(0, 7))
    torch.testing.assert_close(center.value[0], expected)
    total = draw(7, seed=rank)
    before = total.clone()
    start_rank_mean(total, 3).wait()
    assert torch.equal(total, before)
    torch.distributed.destroy_process_group()


def test_center_on_ranks_with_different_numbers_of_rows():
    run_ranks(3, unequal_ranks)


def test_center_moves_in_its_own_dtype():
    center = torch.zeros(1, 7, dtype=torch.float32)
    mean, ranks = start_rank_mean(draw(7), 2).wait()
    move_center_(center, mean, ranks, 0.0)
    torch.testing.assert_close(center[0], (draw(7) / 2).float())

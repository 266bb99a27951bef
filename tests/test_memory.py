"""fastdino_kernels.memory against brute force over the elements' addresses."""

import itertools

import pytest
import torch
from fastdino_kernels import dino_loss
from fastdino_kernels.memory import Ranges, are_flat, find_overlap, is_dense, overlaps_itself

from tests.properties import given, st

SHAPES = st.lists(st.integers(0, 3), max_size=4)


@given(SHAPES, st.lists(st.integers(0, 12), min_size=4, max_size=4))
def test_is_dense_matches_brute_force(shape, strides):
    tensor = torch.empty(200).as_strided(shape, strides[: len(shape)])
    indices = itertools.product(*map(range, shape))
    offsets = sorted(sum(i * s for i, s in zip(index, strides, strict=False)) for index in indices)
    if tensor.numel() > 0:
        assert is_dense(tensor) == (offsets == list(range(tensor.numel())))


@given(SHAPES, st.lists(st.integers(0, 12), min_size=4, max_size=4))
def test_overlaps_itself_finds_every_overlap(shape, strides):
    tensor = torch.empty(200).as_strided(shape, strides[: len(shape)])
    indices = itertools.product(*map(range, shape))
    offsets = [sum(i * s for i, s in zip(index, strides, strict=False)) for index in indices]
    if len(set(offsets)) < len(offsets):
        assert overlaps_itself(tensor)


SLICES = st.builds(slice, st.integers(0, 2), st.integers(1, 6), st.integers(1, 3))


@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.tuples(SLICES, SLICES, SLICES),
    st.permutations(range(3)),
)
def test_views_by_slicing_do_not_overlap_themselves(shape, slices, order):
    view = torch.zeros(shape)[slices].permute(order)
    assert not overlaps_itself(view)
    assert not overlaps_itself(view.diagonal(dim1=0, dim2=2))
    assert not overlaps_itself(view.unfold(1, min(2, view.shape[1]), 2))
    assert not overlaps_itself(view[:, None].expand(-1, 1, -1, -1))


def test_inplace_backward_rejects_overlapping_logits():
    teacher, center = torch.zeros(2, 3, 8), torch.zeros(8)
    student = torch.zeros(40).as_strided((2, 3, 8), (4, 8, 1)).requires_grad_()
    options = {"student_temp": 0.1, "teacher_temp": 0.04, "inplace_backward": True}
    with pytest.raises(ValueError, match=r"share no memory, got strides \(4, 8, 1\)"):
        dino_loss(student, teacher, center, **options)
    padded = torch.zeros(2, 3, 10).requires_grad_() * 1
    dino_loss(padded[..., :8], teacher, center, **options)


def test_are_flat_needs_dense_tensors_with_equal_strides():
    x = torch.zeros(2, 3, 4, 5)
    y = x.to(memory_format=torch.channels_last)
    assert are_flat([x])
    assert are_flat([x, x.bfloat16()])
    assert are_flat([y, y.clone(), y.half()])
    assert not are_flat([x, y])
    assert not are_flat([y, x])
    assert not are_flat([x[:, ::2]])
    assert not are_flat([x[:, :2], x[:, :2].contiguous()])
    assert not are_flat([torch.zeros(3), torch.zeros(1).expand(3)])
    assert are_flat([torch.zeros(1, 3), torch.zeros(3, 1).t()])  # a stride that leads nowhere
    assert are_flat([x[:0], y[:0]])


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=6),
    st.integers(0, 6),
)
def test_find_overlap_matches_brute_force(ranges, written):
    base = torch.zeros(40)
    tensors = [base[start : start + size] for start, size in ranges]
    cells = [set(range(start, start + size)) for start, size in ranges]
    pairs = {
        (x, y)
        for x, y in itertools.combinations(range(len(cells)), 2)
        if x < written and cells[x] & cells[y]
    }
    overlap = find_overlap(tensors, written)
    assert (overlap in pairs) if pairs else (overlap is None)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=6),
    st.tuples(st.integers(0, 60), st.integers(1, 12)),
)
def test_ranges_meet_what_shares_memory_with_them(parts, other):
    """parts: the gaps before tensors that share no memory, and their sizes."""
    base, tensors, cells, end = torch.zeros(80), [], set(), 2
    for gap, size in parts:
        start, end = end + gap, end + gap + size
        tensors.append(base[start:end])
        cells |= set(range(start, end))
    start, size = other
    shares = bool(cells & set(range(start, start + size)))
    assert Ranges(tensors[::-1]).meet(base[start : start + size]) == shares


def test_long_range_does_not_hide_an_overlap():
    base = torch.zeros(10)
    assert find_overlap([base[5:6], base, base[1:2]], written=1) == (0, 1)


def test_interleaved_views_do_not_overlap():
    base = torch.zeros(4, 6)
    assert find_overlap([base[:, ::2], base[:, 1::2]], written=2) is None
    assert find_overlap([base[:, ::2], base[:, ::3]], written=1) == (0, 1)
    assert find_overlap([base, base[:, 1::2]], written=1) == (0, 1)

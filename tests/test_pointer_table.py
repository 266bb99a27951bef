"""fastdino_kernels.pointer_table: contents, cache keys and lifetime of tables."""

import itertools
import weakref

import pytest
import torch
from fastdino_kernels import dino_loss, pointer_table
from fastdino_kernels.pointer_table import (
    ABSENT,
    BF16,
    FP16,
    FP32,
    MIXED,
    Plan,
    PointerTable,
    are_flat,
    are_plain,
    build_table,
    find_overlap,
    is_dense,
    overlaps_itself,
    overlaps_ranges,
    plan_for,
    ranges_of,
)

from tests.properties import given, st


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch):
    monkeypatch.setattr(pointer_table, "_plans", pointer_table._Cache())
    monkeypatch.setattr(pointer_table, "_owners", pointer_table._Cache())


@pytest.fixture
def capturing(monkeypatch):
    """A switch that simulates CUDA-graph capture while it is [True]."""
    switch = [False]
    monkeypatch.setattr(pointer_table, "_is_capturing", lambda device: switch[0])
    return switch


class Stream:
    """Fake CUDA stream; an event is (stream, index)."""

    def __init__(self):
        self.recorded, self.waited = [], []

    def record_event(self):
        self.recorded.append((self, len(self.recorded)))
        return self.recorded[-1]

    def wait_event(self, event):
        self.waited.append(event)


class OnDevice:
    """Fake tensor of a table."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


@pytest.fixture
def streams(monkeypatch):
    """Two fake streams; the first is current until `streams.reverse()`."""
    streams = [Stream(), Stream()]
    monkeypatch.setattr(pointer_table, "_current_stream", lambda device: streams[0])
    return streams


@pytest.fixture
def arena(monkeypatch):
    """A new arena with memory that is not pinned."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: empty(*a, **k))
    monkeypatch.setattr(pointer_table, "_arena", pointer_table._Arena())
    return pointer_table._arena


def counted():
    """Return a function that makes plans and the list of its calls."""
    calls = []

    def make():
        calls.append(None)
        return Plan("torch")

    return make, calls


def test_rows_hold_addresses_dtypes_and_sizes():
    x = [torch.zeros(5), torch.zeros(0, 3), torch.zeros(3, 3, dtype=torch.float16)]
    y = [torch.zeros(5).bfloat16(), torch.zeros(0, 3).bfloat16(), torch.zeros(3, 3).bfloat16()]
    table = build_table([x, y], [7, 8, 9], chunk=4)
    assert table.rows.tolist() == [
        [0, 5, FP32 + (BF16 << 8), 7, x[0].data_ptr(), y[0].data_ptr(), 0, 0, 0, 0],
        [2, 0, FP32 + (BF16 << 8), 8, x[1].data_ptr(), y[1].data_ptr(), 0, 0, 0, 0],
        [2, 9, FP16 + (BF16 << 8), 9, x[2].data_ptr(), y[2].data_ptr(), 0, 0, 0, 0],
    ]
    assert table.owners.tolist() == [0, 0, 2, 2, 2]
    assert table.codes == (MIXED, BF16)


def test_rows_mark_missing_tensors():
    x, y = [torch.zeros(5), None, torch.zeros(0)], [None, None, torch.zeros(0).half()]
    table = build_table([x, y, [None] * 3], range(3), chunk=4)
    assert table.rows.tolist() == [
        [0, 5, FP32 + (ABSENT << 8) + (ABSENT << 16), 0, x[0].data_ptr(), *[0] * 5],
        [2, 0, ABSENT + (ABSENT << 8) + (ABSENT << 16), 1, *[0] * 6],
        [2, 0, FP32 + (FP16 << 8) + (ABSENT << 16), 2, *[0] * 6],
    ]
    assert table.owners.tolist() == [0, 0]
    assert table.codes == (FP32, FP16, None)
    nothing = build_table([[None, None]], range(2), chunk=4, device=torch.device("cpu"))
    assert nothing.codes == (None,)
    assert len(nothing.owners) == 0


def test_plan_is_reused_for_new_objects_with_the_same_memory():
    make, calls = counted()
    tensors = [torch.zeros(2, 3), torch.zeros(4)]
    plan = plan_for("head", tensors, make)
    assert plan_for("head", [t.detach() for t in tensors], make) is plan
    assert plan_for("head", [torch.nn.Parameter(t) for t in tensors], make) is plan
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone(),
        lambda t: t.view(torch.int32),
        lambda t: t.view(2, 8),
        lambda t: t.t(),
        lambda t: t[:1],
        lambda t: t.as_strided((4, 4), (5, 1)),
        lambda t: t.as_strided((16, 1), (4, 1)),  # the same strides and number of elements
    ],
)
def test_other_memory_or_layout_makes_a_new_plan(change):
    make, calls = counted()
    tensor = torch.zeros(64)[:16].view(4, 4)
    for some in (tensor, change(tensor), tensor):
        plan_for("head", [some], make)
    assert len(calls) == 2


def test_moved_storage_makes_a_new_plan():
    make, calls = counted()
    tensor = torch.zeros(4, 4)
    plan_for("head", [tensor], make)
    before = tensor.data  # so that its address is not reused
    tensor.data = tensor.data.clone()
    plan_for("head", [tensor], make)
    tensor.set_(before)
    plan_for("head", [tensor], make)
    assert len(calls) == 2


def test_head_and_number_of_tensors_are_part_of_the_key():
    make, calls = counted()
    tensors = [torch.zeros(2), torch.zeros(2)]
    for head, some in (("a", tensors), ("b", tensors), ("a", tensors[:1]), ("a", tensors[::-1])):
        plan_for(head, some, make)
    assert len(calls) == 4


def test_failed_check_is_not_cached():
    tensor = torch.zeros(2)

    def refuse():
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            plan_for("head", [tensor], refuse)


def test_cache_is_bounded_and_keeps_recent_plans():
    make, calls = counted()
    kept = [torch.zeros(3)]
    others = [[torch.zeros(4)] for _ in range(3 * pointer_table._CACHED)]
    plan = plan_for("head", kept, make)
    for other in others:
        plan_for("head", other, make)
        assert plan_for("head", kept, make) is plan
    assert len(pointer_table._plans) == pointer_table._CACHED
    plan_for("head", others[0], make)
    assert len(calls) == 1 + len(others) + 1


def test_cache_keeps_no_tensor_alive():
    tensors = [torch.zeros(3), torch.zeros(4)]
    plan = Plan("triton", build_table([tensors], range(2), 4))
    plan_for("head", tensors, lambda: plan)
    dead = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    assert [ref() for ref in dead] == [None, None]


def test_plan_made_during_capture_is_not_cached(capturing):
    make, calls = counted()
    tensors = [torch.zeros(3)]
    capturing[0] = True
    plan_for("head", tensors, make)
    capturing[0] = False
    plan_for("head", tensors, make)
    assert len(calls) == 2
    capturing[0] = True
    plan_for("head", tensors, make)
    assert len(calls) == 2


def test_plan_used_by_a_graph_outlives_the_cache(capturing):
    def make():
        return Plan("torch")

    tensors = [torch.zeros(3)]
    captured, forgotten = (weakref.ref(plan_for(head, tensors, make)) for head in "ab")
    capturing[0] = True
    assert plan_for("a", tensors, make) is captured()
    capturing[0] = False
    for other in range(pointer_table._CACHED):
        plan_for(other, tensors, make)
    assert forgotten() is None
    assert captured() is not None


def test_other_stream_waits_for_the_upload(streams, arena):
    tensors, table = [torch.zeros(3)], PointerTable(OnDevice(), OnDevice(), (FP32,))
    plan = Plan("triton", table)
    first, second = streams

    def use():
        assert plan_for("head", tensors, lambda: plan) is plan

    use()
    use()
    assert first.waited == []
    streams.reverse()
    use()
    use()
    assert second.waited == first.recorded  # once is enough
    assert len(first.recorded) == 1
    assert table.rows.streams == table.owners.streams == [first, first, second, second]


def test_other_stream_waits_for_shared_owners(streams):
    first, second = streams
    tables = [build_table([[torch.zeros(9)]], [0], chunk=4)]
    streams.reverse()
    tables += [build_table([[torch.ones(9)]], [0], chunk=4)]
    assert tables[0].owners is tables[1].owners
    assert second.waited == first.recorded != []


def test_capture_does_not_wait_for_events(streams, arena, capturing):
    make, _ = counted()
    tensors = [torch.zeros(3)]
    plan_for("head", tensors, make)
    recorded = len(streams[0].recorded)
    streams.reverse()
    capturing[0] = True
    plan_for("head", tensors, make)
    plan_for("other", tensors, make)
    assert streams[0].waited == streams[0].recorded == []
    assert len(streams[1].recorded) == recorded


def test_cached_call_reserves_memory_for_capture(streams, arena, capturing):
    plan = Plan("triton", PointerTable(OnDevice(), OnDevice(), (FP32,)))
    tensors = [torch.zeros(3)]

    def use():
        plan_for("head", tensors, lambda: plan)

    use()
    assert not arena.is_low()
    arena.take(pointer_table._ARENA_WORDS)
    capturing[0] = True
    use()
    assert arena.is_low()  # none can be had now
    capturing[0] = False
    use()
    use()
    assert not arena.is_low()
    assert len(arena._blocks) == 2


def test_tensors_without_memory_are_not_cached():
    make, calls = counted()
    for _ in range(2):
        plan_for("head", [torch.zeros(2), torch.zeros(2).to_sparse()], make)
    assert len(calls) == 2
    assert len(pointer_table._plans) == 0


def test_arena_never_reuses_memory_and_raises_when_full(arena):
    with pytest.raises(RuntimeError, match="for 8 words .*before capturing"):
        arena.take(8)
    arena.reserve()
    assert not arena.is_low()
    half = pointer_table._ARENA_WORDS // 2
    slices = [arena.take(half - 1), arena.take(1), arena.take(2)]
    assert arena.is_low()
    arena.reserve()
    slices.append(arena.take(2 * half))
    with pytest.raises(RuntimeError, match="for 1 words"):
        arena.take(1)
    assert [len(piece) for piece in slices] == [half - 1, 1, 2, 2 * half]
    assert find_overlap(slices, written=len(slices)) is None


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


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(0, 60), st.integers(0, 9))
def test_overlaps_ranges_matches_brute_force(sizes, start, size):
    base = torch.zeros(120)
    written, taken, at = [], set(), 0
    for index, length in enumerate(sizes):
        at += index % 3  # gaps, and none
        written.append(base[at : at + length])
        taken |= set(range(at, at + length))
        at += length
    tensor = base[start : start + size]
    expected = bool(taken & set(range(start, start + size)))
    assert overlaps_ranges(tensor, ranges_of(written[::-1])) == expected


def test_long_range_does_not_hide_an_overlap():
    base = torch.zeros(10)
    assert find_overlap([base[5:6], base, base[1:2]], written=1) == (0, 1)


def test_interleaved_views_do_not_overlap():
    base = torch.zeros(4, 6)
    assert find_overlap([base[:, ::2], base[:, 1::2]], written=2) is None
    assert find_overlap([base[:, ::2], base[:, ::3]], written=1) == (0, 1)
    assert find_overlap([base, base[:, 1::2]], written=1) == (0, 1)


def test_only_tensors_and_parameters_are_plain():
    class Own(torch.Tensor):
        pass

    assert are_plain([torch.zeros(1), torch.nn.Parameter(torch.zeros(1)), torch.nn.Buffer()])
    assert not are_plain([torch.zeros(1), torch.zeros(1).as_subclass(Own)])
    assert not are_plain([1.0])

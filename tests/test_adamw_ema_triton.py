"""Layouts, addresses and sizes of the tensors of adamw_ema_update_."""

import math
import threading

import pytest
import torch
from fastdino_kernels import adamw_ema, adamw_ema_torch, adamw_ema_update_, pointer_table
from fastdino_kernels.adamw_ema_arguments import Call, Group
from fastdino_kernels.pointer_table import FP32, Pointers
from fastdino_kernels.tensor_lists import Tables

from tests import adamw_steps
from tests.adamw_steps import (
    SHAPES,
    assert_copies,
    assert_norms,
    assert_right,
    make,
    step_by_step,
    triton_only,
)
from tests.multi_tensor import HALVES, assert_frame, far_tables, frames_around, strided

target = adamw_steps.target


@triton_only
def test_tensors_with_equal_strides_use_the_kernel(target, monkeypatch):
    monkeypatch.delattr(adamw_ema_torch, "torch_adamw_ema_")
    samples = strided(target["device"])
    lists = make(target["device"], [x.shape for x in samples])
    for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "teachers"):
        values = getattr(lists, name)
        laid_out = [torch.empty_like(x).copy_(v) for x, v in zip(samples, values, strict=True)]
        assert not any(x.is_contiguous() for x in laid_out)
        setattr(lists, name, laid_out)
    lists.shadows = lists.teacher_shadows = None
    expected = step_by_step(lists)
    lists.step(target)
    assert_right(lists, expected)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("odd", ["parameters", "gradients", "exp_avg_sqs", "teachers", "shadows"])
def test_any_layout_gives_the_same_result(odd, gaps, target):
    lists = make(target["device"], [(8, 6), (5,), (2100,)])
    values = getattr(lists, odd)[0]
    room = torch.full((8, 12), 7.0, device=target["device"]).to(values.dtype)
    view = room[:, ::2] if gaps else room.view(-1)[:48].view(6, 8).t()
    getattr(lists, odd)[0] = view.copy_(values)
    expected = step_by_step(lists)
    norms = lists.step(target)
    assert_right(lists, expected)
    assert_copies(lists)
    assert lists.steps.tolist() == [1.0, 2.0, 3.0]
    assert_norms(norms, expected)
    if gaps:
        assert bool((room[:, 1::2] == 7).all())


@triton_only
@pytest.mark.parametrize("dtype", HALVES[:2])
def test_lengths_around_a_chunk_write_nothing_outside(target, dtype):
    from fastdino_kernels.adamw_ema_triton import CHUNK

    frames = frames_around(CHUNK, [7.0] * 5, dtype, target["device"])
    roles = [
        [frame[row, inside].fill_(value) for frame, inside in frames]
        for row, value in enumerate((4.0, 1.0, 1.0, 1.0, 2.0))
    ]
    steps = torch.full((len(frames),), 200.0, device=target["device"])
    # m = v = g = 1, and all later steps are alike: p = 4 - lr * 1.
    numbers = {"lr": 2.0, "betas": (0.5, 0.5), "eps": 1e-12, "weight_decay": 0.0}
    adamw_ema_update_(*roles[:4], steps, **numbers, teachers=roles[4], momentum=0.5, impl="triton")
    for frame, inside in frames:
        assert_frame(frame, inside, [7.0] * 5, [2.0, 1.0, 1.0, 1.0, 2.0])


@triton_only
def test_offsets_beyond_31_bits(target):
    from fastdino_kernels import clip_triton
    from fastdino_kernels.adamw_ema_triton import CHUNK, launch_adamw_ema

    lists = make(target["device"], [(100,)], copies=False)
    expected = step_by_step(lists, max_norm=math.inf)
    state = [*lists.parameters, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.teachers]
    tables = far_tables(CHUNK, state, 0, 0, lists.steps.data_ptr() << 2 | FP32, 0)
    codes = (*tables.pointers.codes, None, None, FP32)
    tables = Tables(tables.chunks, Pointers(tables.pointers.words, codes))
    groups = [Group(1, 0.01, 0.8, 0.99, 1e-6, 0.1)]
    call = Call({}, lists.steps.unbind(), groups, None, True, 0.9)
    gradients = far_tables(clip_triton.CHUNK, lists.gradients)
    launch_adamw_ema(tables, gradients, call, None)
    assert_right(lists, expected)


@pytest.mark.parametrize("change", [lambda t: t.clone(), lambda t: t.bfloat16()])
def test_storage_and_gradients_may_move_between_calls(change, target):
    lists = make(target["device"])
    kept = []
    for _ in range(3):
        expected = step_by_step(lists)
        lists.step(target)
        assert_right(lists, expected)
        kept += [*lists.gradients, *lists.teachers]  # so that addresses are not reused
        lists.gradients = [change(g) for g in lists.gradients]
        if len(kept) > 2 * len(SHAPES):
            lists.teachers = [change(t) for t in lists.teachers]


def test_gradients_of_another_order_are_checked_again(target):
    """The same tensors in other roles: each combination is checked, whatever was seen before."""
    lists = make(target["device"], [(4,), (40,)], copies=False)
    names = ("parameters", "exp_avgs", "exp_avg_sqs", "teachers")
    gradients = lists.gradients
    lists.step(target)
    for name in names:
        setattr(lists, name, getattr(lists, name)[::-1])
    lists.gradients = gradients[::-1]
    lists.step(target)
    lists.gradients = gradients
    with pytest.raises(ValueError, match=r"gradients\[0\] must have the same shape"):
        lists.step(target)


@triton_only
def test_schedules_do_not_displace_the_tables_of_the_tensors(target, monkeypatch):
    """Gradients return to a few addresses; the rate is new in each step."""
    lists = make(target["device"], [(4,), (40,)], copies=False)
    addresses = [[g.clone() for g in lists.gradients] for _ in range(5)]
    tables, make_pointers = [], adamw_ema.make_pointers

    def counted(*arguments):
        tables.append(arguments)
        return make_pointers(*arguments)

    monkeypatch.setattr(adamw_ema, "make_pointers", counted)
    for step in range(20):
        lists.gradients = addresses[step % 5]
        lists.step(target, lr=0.1 / (step + 1))
    assert len(tables) == 1 + 5


def test_calls_with_their_own_learning_rates_share_no_table():
    """A captured graph writes its learning rates into the table, at any time."""
    from fastdino_kernels.adamw_ema_triton import LR, _hyperparameters

    rates = [torch.tensor(0.1), torch.tensor(0.2)]
    calls = [
        Call({}, [], [Group(1, rate, 0.9, 0.99, 1e-6, 0.1)], None, True, 0.9) for rate in rates
    ]
    tables = [_hyperparameters(call, torch.device("cpu")) for call in calls]
    assert [table[LR.value].item() for table in tables] == pytest.approx([0.1, 0.2])
    assert _hyperparameters(calls[0], torch.device("cpu")) is tables[0]


@triton_only
def test_tables_are_built_once(target, monkeypatch):
    made = []
    build = adamw_ema.make_pointers
    monkeypatch.setattr(
        adamw_ema, "make_pointers", lambda roles, *a: made.append(len(roles)) or build(roles, *a)
    )
    monkeypatch.setattr(pointer_table, "_local", threading.local())
    lists, kept = make(target["device"], [(3,), (4,)]), []
    for _ in range(3):
        lists.step(target)
        lists.step(target)
        kept.append(lists.gradients)
        lists.gradients = [g.clone() for g in lists.gradients]
    assert sorted(made) == [1, 1, 1, 7]


def test_autograd_versions_are_incremented(target):
    lists = make(target["device"])
    lists.parameters = [torch.nn.Parameter(p) for p in lists.parameters]
    seen = [*lists.parameters, *lists.teachers, *lists.shadows, *lists.teacher_shadows]
    versions = [x._version for x in seen]
    lists.step(target)
    assert all(x._version > v for x, v in zip(seen, versions, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in lists.parameters)

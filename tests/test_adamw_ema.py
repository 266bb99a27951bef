"""adamw_ema_update_ against the equations in float64."""

import copy
import math

import pytest
import torch
from fastdino_kernels import adamw_ema_update_, reference

from tests import adamw_steps
from tests.adamw_steps import (
    OPTIONS,
    SHAPES,
    Lists,
    assert_close,
    assert_copies,
    assert_norms,
    assert_right,
    assert_unchanged,
    make,
    step_by_step,
)
from tests.multi_tensor import EPS, HALVES, draw, long_normal
from tests.properties import given, settings, st

target = adamw_steps.target


@pytest.mark.accuracy
@pytest.mark.parametrize("gradient", [torch.float64, *HALVES])
def test_one_step_matches_the_equations(gradient, target):
    if target["impl"] == "triton" and gradient == torch.float64:
        pytest.skip("Triton computes in fp32")
    lists = make(target["device"], gradient=gradient)
    expected = step_by_step(lists)
    gradients = [g.clone() for g in lists.gradients]
    steps = lists.steps + 1
    norms = lists.step(target)
    assert_right(lists, expected)
    assert_copies(lists)
    assert torch.equal(lists.steps, steps)
    assert norms.dtype == (torch.float64 if gradient == torch.float64 else torch.float32)
    assert_norms(norms, expected)
    assert all(map(torch.equal, lists.gradients, gradients))
    clipped = norms > 1
    assert clipped.any()
    assert not clipped.all()


@pytest.mark.parametrize("clip", ["each", "all"])
def test_gradients_of_millions_of_elements_are_clipped_accurately(clip):
    gradients = [long_normal(), torch.ones(3)]
    zeros = [[torch.zeros_like(g) for g in gradients] for _ in range(3)]
    lists = Lists(zeros[0], gradients, zeros[1], zeros[2], torch.zeros(2))
    norms = lists.step({"impl": "auto"}, clip=clip, momentum=None)
    clip_ = {"each": reference.clip_grad_norms, "all": reference.clip_grad_norm}[clip]
    clipped, right = clip_([g.double() for g in gradients], OPTIONS["max_norm"])
    right = torch.stack(right) if clip == "each" else right
    torch.testing.assert_close(norms.double(), right, rtol=1e-6, atol=0)
    for m, g in zip(lists.exp_avgs, clipped, strict=True):
        torch.testing.assert_close(m.double(), (1 - OPTIONS["betas"][0]) * g, rtol=1e-6, atol=0)


def errors(actual, expected):
    return [(x.double() - e).abs().max().item() for x, e in zip(actual, expected, strict=True)]


def test_eight_steps_are_as_accurate_as_plain_pytorch(target):
    """Start from zero moments, with gradients of varying sizes."""
    shapes = [(900,)]

    def start(dtype):
        zeros = [[torch.zeros(s, dtype=dtype, device=target["device"]) for s in shapes]
                 for _ in range(2)]  # fmt: skip
        values = draw(torch.float32, 0, target["device"], shapes)
        p, t = ([value.to(dtype, copy=True) for value in values] for _ in range(2))
        return Lists(p, [], *zeros, torch.zeros(1, device=target["device"]), t)

    ours, plain, truth = start(torch.float32), start(torch.float32), start(torch.float64)
    for count in range(8):
        gradients = [g * 10.0 ** (count % 4 - 2) for g in draw(seed=count + 1, shapes=shapes)]
        for lists in (ours, plain, truth):
            lists.gradients = [g.to(target["device"]) for g in gradients]
        ours.step(target)
        for lists, wide in ((plain, torch.float32), (truth, torch.float64)):
            after = step_by_step(lists, wide)
            lists.parameters, lists.exp_avgs = after.parameters, after.exp_avgs
            lists.exp_avg_sqs = after.exp_avg_sqs
            lists.teachers = after.teachers_of(after.parameters)
            lists.steps += 1
    for name in ("parameters", "exp_avgs", "exp_avg_sqs", "teachers"):
        right = getattr(truth, name)
        largest = max(e.abs().max().item() for e in right)
        for o, p in zip(errors(getattr(ours, name), right), errors(getattr(plain, name), right),
                        strict=True):  # fmt: skip
            assert o <= p + EPS * largest, name


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", HALVES[1:])
def test_half_precision_is_computed_in_fp32_and_rounded_once(dtype, target):
    lists = make(target["device"], dtype=dtype, gradient=torch.float32)
    expected = step_by_step(lists)
    lists.step(target)
    assert_right(lists, expected, roundings=0.51)
    assert_copies(lists)


def test_dtypes_may_differ_within_one_call(target):
    shapes = [(n,) for n in (5, 9, 2049, 33, 70, 8, 2, 1, 6)]
    device = target["device"]
    lists = make(device, shapes, dtype=HALVES, gradient=[HALVES[i // 3] for i in range(9)])
    lists.exp_avgs = [m * 0.1 for m in draw(HALVES[1:], 2, device, shapes)]
    lists.teachers = draw(HALVES[::-1], 4, device, shapes)
    lists.shadows[3] = lists.teacher_shadows[4] = lists.shadows[5] = None
    expected = step_by_step(lists)
    lists.step(target)
    assert_right(lists, expected, roundings=1.01)
    assert_copies(lists)


def test_parameter_without_gradient_is_kept_and_its_teacher_updated(target):
    lists = make(target["device"])
    lists.gradients[0] = lists.gradients[3] = None
    lists.exp_avgs[0] = lists.exp_avg_sqs[0] = None  # it never had a gradient
    expected, before, steps = step_by_step(lists), lists.copies(), lists.steps.clone()
    norms = lists.step(target)
    assert_right(lists, expected)
    assert_copies(lists)
    for i in (0, 3):
        assert_unchanged(lists, before, f"parameters[{i}]")
        assert_unchanged(lists, before, f"exp_avgs[{i}]")
        assert norms[i] == 0
        assert not torch.equal(lists.teachers[i], before[f"teachers[{i}]"])
    counted = [g is not None for g in lists.gradients]
    assert (lists.steps - steps).tolist() == [float(c) for c in counted]


def test_no_gradients(target):
    lists = make(target["device"])
    lists.gradients = [None] * len(SHAPES)
    lists.exp_avgs = lists.exp_avg_sqs = [None] * len(SHAPES)
    expected, steps = step_by_step(lists), lists.steps.clone()
    norms = lists.step(target)
    assert_close(lists.teachers, expected.teachers_of(lists.parameters))
    assert torch.equal(norms, torch.zeros_like(norms))
    assert torch.equal(lists.steps, steps)


def test_without_teachers_and_copies_equals_adamw(target):
    lists = make(target["device"], copies=False)
    expected = step_by_step(lists)
    lists.teachers = None
    lists.step(target, momentum=None)
    assert_close(lists.parameters, expected.parameters)
    lists.teachers = [None] * len(SHAPES)
    lists.step(target, momentum=None)


def test_some_teachers_missing(target):
    lists = make(target["device"])
    expected = step_by_step(lists)
    lists.teachers[0] = lists.teacher_shadows[0] = lists.teachers[3] = None
    lists.teacher_shadows[3] = None
    lists.step(target)
    assert_right(lists, expected)


@pytest.mark.parametrize(
    ("max_norm", "betas"),
    [(None, (0.8, 0.99)), (math.inf, (0.8, 0.99)), (1e-3, (0.8, 0.99)), (1.0, (0.0, 0.99))],
)
def test_max_norm_none_and_inf_do_not_clip_and_beta_may_be_zero(max_norm, betas, target):
    lists = make(target["device"])
    expected = step_by_step(lists, max_norm=max_norm or math.inf, betas=betas)
    norms = lists.step(target, max_norm=max_norm, betas=betas)
    assert_right(lists, expected)
    if max_norm is None:
        assert norms is None
    else:
        assert_norms(norms, expected)


def test_given_norms_are_used(target):
    lists = make(target["device"])
    twice = [2 * g.norm() for g in lists.gradients]
    halved = copy.copy(lists)
    expected = step_by_step(halved, max_norm=0.5)  # twice the norm and 1: the same factor
    kept = [i for i, norm in enumerate(twice) if norm > 1]
    norms = lists.step(target, norms=torch.stack(twice))
    assert norms.tolist() == [norm.item() for norm in twice]
    right = [expected.parameters[i] for i in kept]
    assert_close([lists.parameters[i] for i in kept], right, roundings=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hyperparameters_may_be_tensors(dtype, target):
    ours, theirs = make(target["device"]), make(target["device"])
    numbers = {name: OPTIONS[name] for name in ("lr", "weight_decay", "momentum")}
    tensors = {
        name: torch.tensor(value, dtype=dtype, device=target["device"])
        for name, value in numbers.items()
    }
    ours.step(target, **tensors)
    theirs.step(target)
    for name, tensor in ours.written().items():
        # fp32 rounds 1 - momentum.
        torch.testing.assert_close(tensor, theirs.written()[name], rtol=1e-6, atol=3e-6)
    # Tensors are read in each call, not cached.
    expected = step_by_step(ours, lr=0.5, weight_decay=0.0, momentum=0.25)
    for name, value in (("lr", 0.5), ("weight_decay", 0.0), ("momentum", 0.25)):
        tensors[name].fill_(value)
    ours.step(target, **tensors)
    assert_right(ours, expected)


def test_small_rates_keep_precision(target):
    """1 - beta2^step of 1e-3 and lr*weight_decay of 2e-5 would lose digits next to 1 in fp32."""
    lists = make(target["device"], [(50,)])
    lists.steps.zero_()
    options = {"betas": (0.9, 0.999), "lr": 5e-4, "weight_decay": 0.04, "max_norm": None}
    before = lists.parameters[0].double()
    expected = step_by_step(lists, **(options | {"max_norm": math.inf}))
    lists.step(target, **options)
    moved, right = lists.parameters[0].double() - before, expected.parameters[0] - before
    # The parameter's rounding limits the precision of the step.
    torch.testing.assert_close(moved, right, rtol=1e-5, atol=EPS * before.abs().max().item() / 2)
    second = lists.exp_avg_sqs[0].double()
    torch.testing.assert_close(second, expected.exp_avg_sqs[0], rtol=3e-7, atol=0)


def test_momentum_of_one_and_zero(target):
    lists = make(target["device"])
    before = lists.copies()
    lists.step(target, momentum=1.0)
    assert_unchanged(lists, before, "teachers[")
    lists.step(target, momentum=0.0)
    assert all(map(torch.equal, lists.teachers, lists.parameters))


UNIT_SHAPES = [(7,), (37, 64), (9, 256), (1, 1024), (5, 1)]


@pytest.mark.accuracy
@pytest.mark.parametrize("index", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unit_rows_normalise_the_teachers_copy(index, offset, dtype, target):
    lists = make(target["device"], UNIT_SHAPES)
    shape = UNIT_SHAPES[index]
    storage = torch.full((offset + math.prod(shape),), math.nan, dtype=dtype)
    lists.teacher_shadows[index] = storage.to(target["device"])[offset:].view(shape)
    expected = step_by_step(lists)
    lists.step(target, unit_rows=index)
    assert_right(lists, expected)
    own, teacher = lists.teacher_shadows.pop(index), lists.teachers[index].double()
    rows = teacher / teacher.norm(dim=1, keepdim=True)
    assert_close([own], [rows])
    del lists.shadows[index], lists.parameters[index], lists.teachers[index]
    assert_copies(lists)


def test_same_input_gives_same_bits(target):
    runs = []
    for _ in range(2):
        lists = make(target["device"], [(5000,), (77,)])
        lists.step(target)
        lists.step(target)
        runs.append([*lists.written().values(), *lists.results])
    assert all(map(torch.equal, *runs))


@given(
    sizes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5),
    dtypes=st.tuples(*[st.lists(st.sampled_from(HALVES), min_size=1, max_size=3)] * 2),
    absent=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_random_lists_of_tensors(sizes, dtypes, absent, seed):
    lists = make("cpu", sizes, dtypes[0], dtypes[1])
    for i in absent & set(range(len(sizes))):
        lists.gradients[i] = None
    expected = step_by_step(lists)
    lists.step({"impl": "torch" if torch.cuda.is_available() else "triton"})
    # If a second moment is near 0, a step is several times as large as the parameter.
    assert_right(lists, expected, roundings=16)
    assert_copies(lists)


def test_compiled_caller_gives_the_same_result(target):
    ours, theirs = make(target["device"]), make(target["device"])

    @torch.compile(backend="eager")
    def run(scale):
        gradients = [g * scale for g in ours.gradients]
        ours.gradients = gradients
        ours.step(target)
        return [p + 1 for p in ours.parameters]

    theirs.gradients = [g * 2.0 for g in theirs.gradients]
    theirs.step(target)
    after = run(torch.tensor(2.0, device=target["device"]))
    assert all(map(torch.equal, ours.written().values(), theirs.written().values()))
    assert all(map(torch.equal, after, [p + 1 for p in theirs.parameters]))


def test_no_parameters(target):
    assert adamw_ema_update_([], [], [], [], torch.zeros(0), lr=0.1, impl=target["impl"]) is None


def test_skipped_step_keeps_unit_rows(target):
    lists = make(target["device"], UNIT_SHAPES)
    before = lists.copies()
    lists.step(target, unit_rows=2, skip=torch.ones((), device=target["device"]))
    assert_unchanged(lists, before)

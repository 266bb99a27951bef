"""adamw_ema_update_ against separate clip, AdamW and EMA in float64."""

import copy
import math
import threading
from dataclasses import dataclass, field, fields

import pytest
import torch
from fastdino_kernels import adamw_ema, adamw_ema_torch, adamw_ema_update_, pointer_table, reference
from fastdino_kernels.adamw_ema_arguments import Call, Group
from fastdino_kernels.pointer_table import FP32, Cache, Pointers
from fastdino_kernels.tensor_lists import Tables

from tests.multi_tensor import (
    EPS,
    HALVES,
    assert_frame,
    draw,
    far_tables,
    frames_around,
    numpy_warns,
    strided,
)
from tests.properties import given, settings, st

SHAPES = [(3, 5), (7,), (), (2100,), (0, 4)]
NUMBERS = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
OPTIONS = NUMBERS | {"max_norm": 1.0, "momentum": 0.9}
# "device" is the "torch" implementation for accelerators, which runs on any device.
TARGETS = [
    ("torch", "cpu"),
    ("device", "cpu"),
    ("triton", "cpu"),
    pytest.param(("torch", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
]


@pytest.fixture(params=TARGETS, ids="-".join)
def target(request, monkeypatch):
    impl, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (impl, device) == ("triton", "cpu") and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here: the interpreter is for machines without one")
    if impl == "device":
        monkeypatch.setattr(adamw_ema_torch, "reads_flags", lambda lists: False)
        impl = "torch"
    return {"impl": impl, "device": device}


triton_only = pytest.mark.parametrize("target", TARGETS[2::2], indirect=True, ids="-".join)


@dataclass
class Lists:
    """Arguments of adamw_ema_update_; None for a missing list."""

    parameters: list
    gradients: list
    exp_avgs: list
    exp_avg_sqs: list
    steps: torch.Tensor
    teachers: list | None = None
    shadows: list | None = None
    teacher_shadows: list | None = None
    results: list = field(default_factory=list)  # norms of each call

    def step(self, target, **options):
        named = {name: getattr(self, name) for name in ("teachers", "shadows", "teacher_shadows")}
        self.results.append(
            adamw_ema_update_(
                self.parameters, self.gradients, self.exp_avgs, self.exp_avg_sqs, self.steps,
                **named, **(OPTIONS | options), impl=target["impl"],
            )
        )  # fmt: skip
        return self.results[-1]

    def written(self):
        """Map the names of all tensors that a call may change to the tensors."""
        tensors = {"steps": self.steps}
        for f in fields(self):
            if f.name not in ("steps", "gradients", "results"):
                for i, tensor in enumerate(getattr(self, f.name) or ()):
                    if tensor is not None:
                        tensors[f"{f.name}[{i}]"] = tensor
        return tensors

    def copies(self):
        return {name: tensor.clone() for name, tensor in self.written().items()}


def make(device="cpu", shapes=SHAPES, dtype=torch.float32, gradient=torch.float32, copies=True):
    """Make lists as in the middle of a training, with norms below and above 1."""
    gradients = [g * 0.3**i for i, g in enumerate(draw(gradient, 1, device, shapes))]
    lists = Lists(
        draw(dtype, 0, device, shapes),
        [g.to(gradient) if isinstance(gradient, torch.dtype) else g for g in gradients],
        [m * 0.1 for m in draw(dtype, 2, device, shapes)],
        [(v * 0.1) ** 2 for v in draw(dtype, 3, device, shapes)],
        torch.arange(len(shapes), device=device).float(),
        draw(dtype, 4, device, shapes),
    )
    if copies:
        lists.shadows, lists.teacher_shadows = (
            [torch.full_like(t, math.nan, dtype=copy_dtype) for t in lists.teachers]
            for copy_dtype in (torch.bfloat16, torch.float16)
        )
    return lists


@dataclass
class Expected:
    """Expected result of a step. Teachers are computed from the stored, rounded parameters."""

    momentum: float
    parameters: list = field(default_factory=list)
    exp_avgs: list = field(default_factory=list)
    exp_avg_sqs: list = field(default_factory=list)
    norms: list = field(default_factory=list)
    old_teachers: list = field(default_factory=list)

    def teachers_of(self, parameters):
        wide = [p.to(t.dtype) for p, t in zip(parameters, self.old_teachers, strict=True)]
        return reference.ema_update(self.old_teachers, wide, self.momentum)


def step_by_step(lists, wide=torch.float64, scale=1.0, **options):
    """Compute one step in dtype `wide`."""
    o = OPTIONS | options
    expected = Expected(o["momentum"], old_teachers=[t.to(wide, copy=True) for t in lists.teachers])
    numbers = {name: o[name] for name in NUMBERS}
    for i, (p, g, m, v) in enumerate(
        zip(lists.parameters, lists.gradients, lists.exp_avgs, lists.exp_avg_sqs, strict=True)
    ):
        p = p.to(wide)
        norm = torch.zeros((), dtype=wide, device=p.device)
        if g is not None:
            (g,), (norm,) = reference.clip_grad_norms([g.to(wide) / scale], o["max_norm"])
            count = lists.steps[i].item() + 1
            p, m, v = reference.adamw(p, g, m.to(wide), v.to(wide), count, **numbers)
        expected.parameters.append(p)
        expected.exp_avgs.append(m)
        expected.exp_avg_sqs.append(v)
        expected.norms.append(norm)
    return expected


def assert_close(actual, expected, *, roundings=4.0):
    """Compare values up to some roundings to the tensors' own dtype, or four in fp32."""
    for x, e in zip(actual, expected, strict=True):
        if x is not None:
            slack = max(roundings * torch.finfo(x.dtype).eps, 4 * EPS)
            torch.testing.assert_close(x.double(), e.double(), rtol=slack, atol=slack)


def assert_right(lists, expected, **options):
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        assert_close(getattr(lists, name), getattr(expected, name), **options)
    assert_close(lists.teachers, expected.teachers_of(lists.parameters), **options)


def assert_norms(norms, expected):
    right = torch.stack(expected.norms)
    torch.testing.assert_close(norms.double(), right, rtol=4 * EPS, atol=0)


def assert_copies(lists):
    copies = [*lists.shadows, *lists.teacher_shadows]
    for c, stored in zip(copies, [*lists.parameters, *lists.teachers], strict=True):
        assert c is None or torch.equal(c, stored.to(c.dtype))


def assert_unchanged(lists, before, names=""):
    """Compare bits of the tensors whose names start with `names`."""
    for name, tensor in lists.written().items():
        if name.startswith(names):
            assert torch.equal(bits(tensor), bits(before[name])), name


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


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


def test_skipped_step_keeps_unit_rows(target):
    lists = make(target["device"], UNIT_SHAPES)
    before = lists.copies()
    lists.step(target, unit_rows=2, skip=torch.ones((), device=target["device"]))
    assert_unchanged(lists, before)


def poison(lists):
    """Put NaN and inf in gradients, and zeros of both signs in tensors that must not change."""
    lists.gradients[0][0] = math.nan
    lists.gradients[3][7] = math.inf
    for some in (lists.parameters, lists.teachers, lists.exp_avgs):
        some[3][:2] = torch.tensor([-0.0, 0.0])


@numpy_warns
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_skip_keeps_everything_bit_exact(dtype, target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    skip = torch.ones((), dtype=dtype, device=target["device"])
    lists.step(target, skip=skip)
    assert_unchanged(lists, before)
    # The flag is read in each call.
    lists = make(target["device"])
    expected = step_by_step(lists)
    lists.step(target, skip=skip.zero_())
    assert_right(lists, expected)
    assert_copies(lists)


@numpy_warns
def test_found_inf_updates_only_the_teacher(target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    teachers = reference.ema_update(
        [t.double() for t in lists.teachers], [p.double() for p in lists.parameters], 0.9
    )
    found_inf = torch.ones((), device=target["device"])
    lists.step(target, found_inf=found_inf, weight_decay=0.1 * found_inf)
    for names in ("parameters", "exp_avg", "steps"):
        assert_unchanged(lists, before, names)
    assert_close(lists.teachers, teachers)
    assert_copies(lists)
    before = lists.copies()
    lists.step(target, found_inf=found_inf, skip=found_inf)
    assert_unchanged(lists, before)


@numpy_warns
@pytest.mark.parametrize(
    ("value", "max_norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, None)]
)
def test_nonfinite_gradient_is_refused_and_counted(value, max_norm, target):
    lists = make(target["device"])
    good = lists.gradients[3].clone()
    lists.gradients[3][7] = value
    before = lists.copies()
    refused = torch.zeros((), dtype=torch.int64, device=target["device"])
    for count in (1, 2):
        norms = lists.step(target, refused_steps=refused, max_norm=max_norm)
        assert refused.item() == count
        assert_unchanged(lists, before)
        assert not math.isfinite(norms[3].item())
    lists.gradients[3] = good
    expected = step_by_step(lists, max_norm=max_norm or math.inf)
    lists.step(target, refused_steps=refused, max_norm=max_norm)
    assert refused.item() == 2
    assert_right(lists, expected)


@numpy_warns
def test_overflow_of_loss_scaling_is_not_counted(target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    refused, found_inf = torch.zeros(2, device=target["device"]).unbind()
    found_inf.fill_(1)
    lists.step(target, refused_steps=refused, found_inf=found_inf)
    assert refused.item() == 0
    assert_unchanged(lists, before, "parameters")
    assert not torch.equal(lists.teachers[1], before["teachers[1]"])


@pytest.mark.parametrize("gradient", [torch.float32, torch.float16])
def test_gradients_are_divided_by_the_loss_scale(gradient, target):
    lists = make(target["device"], gradient=gradient)
    lists.gradients = [g * 1024 for g in lists.gradients]
    expected = step_by_step(lists, scale=1024.0)
    scale = torch.tensor(1024.0, device=target["device"])
    norms = lists.step(target, grad_scale=scale)
    assert_right(lists, expected)
    assert_norms(norms, expected)
    expected = step_by_step(lists, scale=1024.0, max_norm=math.inf)
    assert lists.step(target, grad_scale=scale, max_norm=None) is None
    assert_right(lists, expected)


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
    call = Call({}, lists.steps.unbind(), [Group(1, 0.01, 0.8, 0.99, 1e-6, 0.1)], None, True, None,
                0.9, None, None, None, None)  # fmt: skip
    gradients = far_tables(clip_triton.CHUNK, lists.gradients)
    launch_adamw_ema(tables, gradients, call, None, Cache())
    assert_right(lists, expected)


@numpy_warns
@triton_only
@pytest.mark.parametrize("index", [0, 5, 9])
def test_any_nonfinite_gradient_refuses_the_step(index, target):
    lists = make(target["device"], [(3,)] * 10)
    lists.gradients[index][1] = math.nan
    before, refused = lists.copies(), torch.zeros((), device=target["device"])
    lists.step(target, refused_steps=refused)
    assert refused.item() == 1
    assert_unchanged(lists, before)


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


def test_same_input_gives_same_bits(target):
    runs = []
    for _ in range(2):
        lists = make(target["device"], [(5000,), (77,)])
        lists.step(target)
        lists.step(target)
        runs.append([*lists.written().values(), *lists.results])
    assert all(map(torch.equal, *runs))


def test_autograd_versions_are_incremented(target):
    lists = make(target["device"])
    lists.parameters = [torch.nn.Parameter(p) for p in lists.parameters]
    seen = [*lists.parameters, *lists.teachers, *lists.shadows, *lists.teacher_shadows]
    versions = [x._version for x in seen]
    lists.step(target)
    assert all(x._version > v for x, v in zip(seen, versions, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in lists.parameters)


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


A, B, C, D, E = (torch.full((2, 3), float(x)) for x in range(5))
NO_MOMENTS = {"exp_avgs": [None], "exp_avg_sqs": [None]}
NO_TEACHER = {"teachers": [None], "teacher_shadows": [E.half()]}
REPEATED = torch.zeros(1, 3).expand(2, 3)


@pytest.mark.parametrize(
    ("lists", "options", "raises", "match"),
    [
        ({"gradients": []}, {}, ValueError, "parameters and gradients .*length, got 1 and 0"),
        ({"teachers": [E, E]}, {}, ValueError, "parameters and teachers .*got 1 and 2"),
        ({"gradients": [B.t()]}, {}, ValueError, r"gradients\[0\] .*\(2, 3\) and \(3, 2\)"),
        ({"exp_avgs": [C[0]]}, {}, ValueError, r"exp_avgs\[0\] must have the same shape"),
        (
            {"teachers": [E.to("meta")]},
            {},
            ValueError,
            r"parameters\[0\] and teachers\[0\] .*device, got cpu and meta",
        ),
        (
            {"gradients": [B.to("meta")]},
            {},
            ValueError,
            r"parameters\[0\] and gradients\[0\] .*device, got cpu and meta",
        ),
        ({"parameters": [A.long()]}, {}, TypeError, r"parameters\[0\] .*torch.int64"),
        ({"parameters": [1.0]}, {}, TypeError, r"parameters\[0\] .*got float"),
        ({"gradients": [B.to_sparse()]}, {}, TypeError, r"gradients\[0\] .*dense.*sparse_coo"),
        ({"exp_avgs": [None]}, {}, ValueError, r"exp_avgs\[0\] and exp_avg_sqs\[0\].*both or none"),
        (NO_MOMENTS, {}, ValueError, r"gradients\[0\] is given: expected exp_avgs\[0\]"),
        ({"teachers": [A]}, {}, ValueError, r"parameters\[0\] and teachers\[0\] share memory"),
        ({"gradients": [A]}, {}, ValueError, r"parameters\[0\] and gradients\[0\] share memory"),
        ({"shadows": [C]}, {}, ValueError, r"exp_avgs\[0\] and shadows\[0\] share memory"),
        ({"exp_avgs": [REPEATED]}, {}, ValueError, r"exp_avgs\[0\] is writ.*strides \(0, 1\)"),
        (NO_TEACHER, {}, ValueError, r"teacher_shadows\[0\] is given: expected teachers\[0\]"),
        ({}, {"unit_rows": 1}, ValueError, "unit_rows must be the index of a parameter, got 1"),
        ({}, {"unit_rows": 0}, ValueError, r"expected parameters\[0\] .* got \(2, 3\), strides"),
        ({"steps": torch.zeros(2)}, {}, ValueError, r"steps must have shape \(1,\), got \(2,\)"),
        (
            {"steps": torch.zeros(1).double()},
            {},
            ValueError,
            r"steps\[0\] must be fp32 \[\], got torch.float64",
        ),
        (
            {"steps": torch.zeros(1).to("meta")},
            {},
            ValueError,
            r"steps\[0\] must be on the same device, got cpu and meta",
        ),
        ({}, {"lr": -0.1}, ValueError, r"lr must be >= 0, got -0\.1"),
        ({}, {"lr": math.nan}, ValueError, "lr must be >= 0, got nan"),
        ({}, {"lr": "fast"}, TypeError, "lr must be a float or a 0-d tensor, got str"),
        ({}, {"lr": torch.ones(1)}, ValueError, r"lr .*0-d tensor, got shape \(1,\)"),
        ({}, {"lr": torch.tensor(1)}, TypeError, "lr must have one of the dtypes"),
        ({}, {"lr": torch.tensor(1.0).to("meta")}, ValueError, "lr is on meta"),
        ({}, {"weight_decay": -1}, ValueError, "weight_decay must be >= 0, got -1"),
        ({}, {"eps": -1e-8}, ValueError, "eps must be >= 0"),
        ({}, {"eps": torch.tensor(1e-8)}, TypeError, "eps must be a float, got Tensor"),
        ({}, {"betas": (0.9, 1.0)}, ValueError, r"betas must be in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({}, {"betas": (0.9,)}, TypeError, "betas must be two floats"),
        ({}, {"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1\.5"),
        ({}, {"momentum": None}, ValueError, "momentum must be given"),
        ({}, {"max_norm": 0.0}, ValueError, "max_norm must be > 0, got 0"),
        ({}, {"max_norm": "3"}, TypeError, "max_norm must be a float, got str"),
        ({}, {"norms": torch.ones(2)}, ValueError, r"norms must have shape \(1,\)"),
        ({}, {"skip": True}, TypeError, "skip must be a torch.Tensor, got bool"),
        ({}, {"skip": torch.ones(1)}, ValueError, r"skip must have shape \(\), got \(1,\)"),
        (
            {},
            {"found_inf": torch.ones((), device="meta")},
            ValueError,
            "found_inf must be on the same device, got cpu and meta",
        ),
        ({}, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ({"parameters": [A.double()]}, {"impl": "triton"}, ValueError, "fp32.*float64"),
        ({"gradients": [B.double()]}, {"impl": "triton"}, ValueError, "fp32.*float64"),
    ],
)
def test_invalid_arguments_change_nothing(lists, options, raises, match):
    whole = {"parameters": [A], "gradients": [B], "exp_avgs": [C], "exp_avg_sqs": [D],
             "steps": torch.zeros(1), "teachers": [E], "momentum": 0.9, "lr": 0.1}  # fmt: skip
    if "impl" in options and torch.cuda.is_available() and options["impl"] == "triton":
        pytest.skip("Triton needs CUDA tensors here")
    with pytest.raises(raises, match=match):
        adamw_ema_update_(**(whole | lists | options))
    for value, tensor in enumerate((A, B, C, D, E)):
        assert torch.equal(tensor, torch.full((2, 3), float(value)))

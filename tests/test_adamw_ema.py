"""adamw_ema_update_ and AdamWEMA against clip, AdamW and EMA one after the other in float64."""

import copy
import io
import math
import pickle
from dataclasses import dataclass, field, fields

import pytest
import torch
from fastdino_kernels import (
    AdamWEMA,
    adamw_ema,
    adamw_ema_torch,
    adamw_ema_update_,
    clip_grad_norms_,
    ema_update_,
    pointer_table,
    reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = [(3, 5), (7,), (), (2100,), (0, 4)]
HALVES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
NUMBERS = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
OPTIONS = NUMBERS | {"max_norm": 1.0, "momentum": 0.9}
# "device" is what "torch" does where the host must not read; it runs on any device.
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
        monkeypatch.setattr(adamw_ema, "update_on_host", adamw_ema_torch.update_on_device)
        impl = "torch"
    return {"impl": impl, "device": device}


with_reference = pytest.mark.parametrize(
    "target", [*TARGETS, ("reference", "cpu")], indirect=True, ids="-".join
)
triton_only = pytest.mark.parametrize("target", TARGETS[2::2], indirect=True, ids="-".join)


@dataclass
class Lists:
    """What adamw_ema_update_ takes, and steps; None for a list that is not given."""

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
        """All that may change, by name."""
        found = {"steps": self.steps}
        for f in fields(self):
            if f.name not in ("steps", "gradients", "results"):
                for i, tensor in enumerate(getattr(self, f.name) or ()):
                    if tensor is not None:
                        found[f"{f.name}[{i}]"] = tensor
        return found

    def copies(self):
        return {name: tensor.clone() for name, tensor in self.written().items()}


def draw(dtype=torch.float32, seed=0, device="cpu", shapes=SHAPES):
    """Normal tensors; dtypes in turn where several are given."""
    dtypes = [dtype] if isinstance(dtype, torch.dtype) else dtype
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(device, dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]


def make(device="cpu", shapes=SHAPES, dtype=torch.float32, gradient=torch.float32, copies=True):
    """Lists in the midst of a training, norms on both sides of 1."""
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
        lists.shadows = [torch.full_like(p, math.nan, dtype=torch.bfloat16) for p in lists.teachers]
        lists.teacher_shadows = [torch.full_like(p, math.nan, dtype=torch.float16)
                                 for p in lists.teachers]  # fmt: skip
    return lists


@dataclass
class Expected:
    """What one step must come to, but for the teachers: they follow what is stored, rounded."""

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
    """One step in dtype `wide`."""
    o = OPTIONS | options
    found = Expected(o["momentum"], old_teachers=[t.to(wide, copy=True) for t in lists.teachers])
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
        found.parameters.append(p)
        found.exp_avgs.append(m)
        found.exp_avg_sqs.append(v)
        found.norms.append(norm)
    return found


def assert_close(actual, expected, *, roundings=2.0):
    """Of the same values, up to so many roundings to the tensors' own dtype."""
    for x, e in zip(actual, expected, strict=True):
        if x is not None:
            slack = roundings * torch.finfo(x.dtype).eps
            torch.testing.assert_close(x.double(), e.double(), rtol=slack, atol=slack)


def assert_right(lists, expected, **options):
    assert_close(lists.parameters, expected.parameters, **options)
    assert_close(lists.exp_avgs, expected.exp_avgs, **options)
    assert_close(lists.exp_avg_sqs, expected.exp_avg_sqs, **options)
    assert_close(lists.teachers, expected.teachers_of(lists.parameters), **options)


def assert_norms(norms, expected):
    right = torch.stack(expected.norms)
    torch.testing.assert_close(norms.double(), right, rtol=4 * EPS, atol=0)


def assert_copies(lists):
    for copies, wholes in (
        (lists.shadows, lists.parameters),
        (lists.teacher_shadows, lists.teachers),
    ):
        for c, whole in zip(copies, wholes, strict=True):
            assert torch.equal(c, whole.to(c.dtype))


def assert_unchanged(lists, before, names=""):
    """To the bit; of the lists whose names start so."""
    for name, tensor in lists.written().items():
        if name.startswith(names):
            assert torch.equal(bits(tensor), bits(before[name])), name


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# The operation


@with_reference
@pytest.mark.parametrize("gradient", [torch.float64, *HALVES])
def test_one_step_is_the_equations(gradient, target):
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


def test_eight_steps_are_as_near_to_the_truth_as_plain_pytorchs(target):
    """From zero moments, with gradients of ever another size."""
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


@with_reference
@pytest.mark.parametrize("dtype", HALVES[1:])
def test_half_parameters_and_moments_are_computed_in_fp32_and_rounded_once(dtype, target):
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
    for c, whole in (*zip(lists.shadows, lists.parameters, strict=True),
                     *zip(lists.teacher_shadows, lists.teachers, strict=True)):  # fmt: skip
        assert c is None or torch.equal(c, whole.to(c.dtype))


@with_reference
def test_what_has_no_gradient_stays_and_its_teacher_follows(target):
    lists = make(target["device"])
    lists.gradients[0] = lists.gradients[3] = None
    lists.exp_avgs[0] = lists.exp_avg_sqs[0] = None  # it never had one
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


@with_reference
def test_nothing_has_a_gradient(target):
    lists = make(target["device"])
    lists.gradients = [None] * len(SHAPES)
    lists.exp_avgs = lists.exp_avg_sqs = [None] * len(SHAPES)
    expected, steps = step_by_step(lists), lists.steps.clone()
    norms = lists.step(target)
    assert_close(lists.teachers, expected.teachers_of(lists.parameters))
    assert torch.equal(norms, torch.zeros_like(norms))
    assert torch.equal(lists.steps, steps)


def test_without_teachers_and_copies_it_is_adamw(target):
    lists = make(target["device"], copies=False)
    expected = step_by_step(lists)
    lists.teachers = None
    lists.step(target, momentum=None)
    assert_close(lists.parameters, expected.parameters)
    lists.teachers = [None] * len(SHAPES)
    lists.step(target, momentum=None)


def test_some_have_no_teacher(target):
    lists = make(target["device"])
    expected = step_by_step(lists)
    lists.teachers[0] = lists.teacher_shadows[0] = lists.teachers[3] = None
    lists.teacher_shadows[3] = None
    lists.step(target)
    assert_right(lists, expected)


@with_reference
@pytest.mark.parametrize("max_norm", [None, math.inf, 1e-3])
def test_clipping_may_be_left_out_or_only_measured(max_norm, target):
    lists = make(target["device"])
    expected = step_by_step(lists, max_norm=max_norm or math.inf)
    norms = lists.step(target, max_norm=max_norm)
    assert_right(lists, expected)
    if max_norm is None:
        assert norms is None
    else:
        torch.testing.assert_close(
            norms.double(), torch.stack(expected.norms), rtol=4 * EPS, atol=0
        )


def test_norms_may_be_given(target):
    lists = make(target["device"])
    twice = [2 * g.norm() for g in lists.gradients]
    halved = copy.copy(lists)
    expected = step_by_step(halved, max_norm=0.5)  # twice the norm and 1: the same factor
    kept = [i for i, norm in enumerate(twice) if norm > 1]
    norms = lists.step(target, norms=torch.stack(twice))
    assert norms.tolist() == [norm.item() for norm in twice]
    right = [expected.parameters[i] for i in kept]
    assert_close([lists.parameters[i] for i in kept], right, roundings=8)


@with_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_may_be_tensors(dtype, target):
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
    # They are read anew, not remembered.
    expected = step_by_step(ours, lr=0.5, weight_decay=0.0, momentum=0.25)
    for name, value in (("lr", 0.5), ("weight_decay", 0.0), ("momentum", 0.25)):
        tensors[name].fill_(value)
    ours.step(target, **tensors)
    assert_right(ours, expected, roundings=4)


def test_small_rates_keep_their_digits(target):
    """1 - beta2^step and lr*weight_decay of 1e-3 and 2e-5 have few digits where 1 is near."""
    lists = make(target["device"], [(50,)])
    lists.steps.zero_()
    options = {"betas": (0.9, 0.999), "lr": 5e-4, "weight_decay": 0.04, "max_norm": None}
    before = lists.parameters[0].double()
    expected = step_by_step(lists, **(options | {"max_norm": math.inf}))
    lists.step(target, **options)
    moved, right = lists.parameters[0].double() - before, expected.parameters[0] - before
    # Of a step, what is below the last digit of the parameter is lost.
    torch.testing.assert_close(moved, right, rtol=1e-5, atol=EPS * before.abs().max().item() / 2)
    torch.testing.assert_close(
        lists.exp_avg_sqs[0].double(), expected.exp_avg_sqs[0], rtol=3e-7, atol=0
    )


def test_a_beta_of_zero(target):
    lists = make(target["device"])
    expected = step_by_step(lists, betas=(0.0, 0.99))
    lists.step(target, betas=(0.0, 0.99))
    assert_right(lists, expected)


def test_momenta_of_one_and_zero(target):
    lists = make(target["device"])
    before = lists.copies()
    lists.step(target, momentum=1.0)
    assert_unchanged(lists, before, "teachers[")
    lists.step(target, momentum=0.0)
    assert all(map(torch.equal, lists.teachers, lists.parameters))


# Steps that are left out


def poison(lists):
    """NaN and inf in the gradients, zeros of both signs in what is to stay."""
    lists.gradients[0][0] = math.nan
    lists.gradients[3][7] = math.inf
    for some in (lists.parameters, lists.teachers, lists.exp_avgs):
        some[3][:2] = torch.tensor([-0.0, 0.0])


numpy_warns = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@numpy_warns
@with_reference
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_where_skip_is_not_zero_nothing_changes_to_the_bit(dtype, target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    skip = torch.ones((), dtype=dtype, device=target["device"])
    lists.step(target, skip=skip)
    assert_unchanged(lists, before)
    # A tensor whose value changes later is read later.
    lists = make(target["device"])
    expected = step_by_step(lists)
    lists.step(target, skip=skip.zero_())
    assert_right(lists, expected)
    assert_copies(lists)


@numpy_warns
@with_reference
def test_where_found_inf_is_not_zero_the_teacher_alone_follows(target):
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
@with_reference
@pytest.mark.parametrize(
    ("value", "max_norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, None)]
)
def test_a_step_with_a_gradient_that_is_not_finite_is_refused_and_counted(value, max_norm, target):
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
@with_reference
def test_an_overflow_that_loss_scaling_expects_is_not_refused(target):
    lists = make(target["device"])
    poison(lists)
    before = lists.copies()
    refused, found_inf = torch.zeros(2, device=target["device"]).unbind()
    found_inf.fill_(1)
    lists.step(target, refused_steps=refused, found_inf=found_inf)
    assert refused.item() == 0
    assert_unchanged(lists, before, "parameters")
    assert not torch.equal(lists.teachers[1], before["teachers[1]"])


@with_reference
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


# Memory


def strided(device):
    """Of each a layout without gaps, the same for all that belongs to one parameter."""
    images = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    return [images, torch.randn(5, 4, device=device).t()]


@triton_only
def test_what_is_laid_out_alike_is_left_to_the_kernel(target, monkeypatch):
    monkeypatch.delattr(adamw_ema, "update_on_device")
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


@pytest.mark.parametrize(
    ("odd", "gaps", "stopped"),
    [
        ("parameters", False, None),
        ("parameters", True, None),
        ("gradients", False, None),
        ("gradients", True, "skip"),
        ("exp_avg_sqs", False, "found_inf"),
        ("exp_avg_sqs", True, "skip"),
        ("teachers", False, "skip"),
        ("teachers", True, "found_inf"),
        ("shadows", False, None),
        ("shadows", True, "skip"),
    ],
)
def test_any_layout_is_right(odd, gaps, stopped, target):
    lists = make(target["device"], [(8, 6), (5,), (2100,)])
    lists.gradients[0] = lists.gradients[0].clone()
    values = getattr(lists, odd)[0]
    room = torch.full((8, 12), 7.0, device=target["device"]).to(values.dtype)
    view = room[:, ::2] if gaps else room.view(-1)[:48].view(6, 8).t()
    getattr(lists, odd)[0] = view.copy_(values)
    expected, before = step_by_step(lists), lists.copies()
    flag = {stopped: torch.ones((), device=target["device"])} if stopped else {}
    norms = lists.step(target, **flag)
    if stopped == "skip":
        assert_unchanged(lists, before)
    elif stopped == "found_inf":
        assert_unchanged(lists, before, "parameters")
        assert_unchanged(lists, before, "steps")
        assert_copies(lists)
    else:
        assert_right(lists, expected)
        assert_copies(lists)
        assert lists.steps.tolist() == [1.0, 2.0, 3.0]
    assert_norms(norms, expected)
    if gaps:
        assert bool((room[:, 1::2] == 7).all())


@triton_only
@pytest.mark.parametrize("dtype", HALVES[:2])
def test_every_length_around_a_chunk_is_covered_and_nothing_else(target, dtype):
    from fastdino_kernels.adamw_ema_triton import CHUNK

    lengths = [1, 15, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1025]
    device = target["device"]
    frames, roles = [], [[] for _ in range(5)]
    for index, length in enumerate(lengths * 2):
        # The second half starts one element in: such addresses are not multiples of 16.
        start = 16 + index // len(lengths)
        frame = torch.full((5, -(-length // 64) * 64 + 64), 7.0, dtype=dtype, device=device)
        frames.append((frame, start, length))
        for role, row, value in zip(roles, frame, (4.0, 1.0, 1.0, 1.0, 2.0), strict=True):
            role.append(row[start : start + length].fill_(value))
    n = len(lengths) * 2
    # m = v = g = 1, and all later steps are alike: p = 4 - lr * 1.
    numbers = {"lr": 2.0, "betas": (0.5, 0.5), "eps": 1e-12, "weight_decay": 0.0}
    adamw_ema_update_(
        *roles[:4], torch.full((n,), 200.0, device=device), **numbers, max_norm=None,
        teachers=roles[4], momentum=0.5, impl="triton",
    )  # fmt: skip
    for frame, start, length in frames:
        values = frame[:, start : start + length]
        for row, value in zip(values, (2.0, 1.0, 1.0, 1.0, 2.0), strict=True):
            assert bool((row == value).all())
        assert bool((frame[:, :start] == 7.0).all())
        assert bool((frame[:, start + length :] == 7.0).all())


@triton_only
def test_offsets_beyond_31_bits(target):
    """The last chunk of a parameter of 2**31 elements and a few, of which only that exists."""
    from fastdino_kernels.adamw_ema_call import Call, Group, Tensors
    from fastdino_kernels.adamw_ema_triton import CHUNK, launch_adamw_ema
    from fastdino_kernels.pointer_table import ROW, PointerTable

    device, before = target["device"], 2**31
    lists = make(device, [(100,)], copies=False)
    expected = step_by_step(lists, max_norm=math.inf)
    state = (*lists.parameters, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.teachers)

    def table(*tensors):
        row = [
            -(before // CHUNK),
            before + 100,
            0,
            0,
            *(t.data_ptr() - 4 * before for t in tensors),
        ]
        rows = torch.tensor([row + [0] * (ROW - len(row))], device=device)
        codes = (0,) * 4 + (None,) * 2 if len(tensors) > 1 else (0,)
        return PointerTable(rows, torch.zeros(1, dtype=torch.int64, device=device), codes)

    call = Call(
        Tensors(*[[]] * 7), [Group(0, 1, 0.01, 0.8, 0.99, 1e-6, 0.1)], lists.steps, None, None, 0.9,
        None, None, None, None,
    )  # fmt: skip
    launch_adamw_ema(table(*state), table(*lists.gradients), call)
    assert_right(lists, expected)


@triton_only
def test_more_parameters_than_one_program_prepares(target, monkeypatch):
    from fastdino_kernels import adamw_ema_triton

    monkeypatch.setattr(adamw_ema_triton, "PARAMETERS", 4)
    lists = make(target["device"], [(3,)] * 10)
    lists.gradients[6] = None
    lists.gradients[5][1] = lists.gradients[9][0] = 1e3
    expected = step_by_step(lists)
    lists.step(target)
    assert_right(lists, expected)


@numpy_warns
@triton_only
@pytest.mark.parametrize("index", [0, 5, 9])
def test_more_norms_than_are_looked_at_at_once(index, target, monkeypatch):
    from fastdino_kernels import adamw_ema_triton

    monkeypatch.setattr(adamw_ema_triton, "NORMS", 4)
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
        assert_right(lists, expected, roundings=2.5)
        kept += [*lists.gradients, *lists.teachers]  # so that addresses are not taken again
        lists.gradients = [change(g) for g in lists.gradients]
        if len(kept) > 2 * len(SHAPES):
            lists.teachers = [change(t) for t in lists.teachers]


@triton_only
def test_the_table_of_what_stays_is_made_once(target, monkeypatch):
    made = []
    build = adamw_ema.build_table
    monkeypatch.setattr(
        adamw_ema, "build_table", lambda roles, *a: made.append(len(roles)) or build(roles, *a)
    )
    monkeypatch.setattr(pointer_table, "_plans", pointer_table._Cache())
    lists, kept = make(target["device"], [(3,), (4,)]), []
    for _ in range(3):
        lists.step(target)
        lists.step(target)
        kept.append(lists.gradients)
        lists.gradients = [g.clone() for g in lists.gradients]
    assert sorted(made) == [1, 1, 1, 6]


def test_the_same_input_gives_the_same_bits(target):
    runs = []
    for _ in range(2):
        lists = make(target["device"], [(5000,), (77,)])
        lists.step(target)
        lists.step(target)
        runs.append([*lists.written().values(), *lists.results])
    assert all(map(torch.equal, *runs))


def test_autograd_notices_what_was_written(target):
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
def test_lists_of_any_kind(sizes, dtypes, absent, seed):
    lists = make("cpu", sizes, dtypes[0], dtypes[1])
    for i in absent & set(range(len(sizes))):
        lists.gradients[i] = None
    expected = step_by_step(lists)
    lists.step({"impl": "torch" if torch.cuda.is_available() else "triton"})
    assert_right(lists, expected)
    assert_copies(lists)


def test_no_parameters(target):
    assert adamw_ema_update_([], [], [], [], torch.zeros(0), lr=0.1, impl=target["impl"]) is None


def change(**changes):
    return lambda lists: vars(lists).update(changes)


A, B, C, D, E = (torch.full((2, 3), float(x)) for x in range(5))


@pytest.mark.parametrize(
    ("lists", "options", "raises", "match"),
    [
        ({"gradients": []}, {}, ValueError, "parameters and gradients .*length, got 1 and 0"),
        ({"teachers": [E, E]}, {}, ValueError, "parameters and teachers .*got 1 and 2"),
        ({"gradients": [B.t()]}, {}, ValueError, r"gradients\[0\] .*\(2, 3\) and \(3, 2\)"),
        ({"exp_avgs": [C[0]]}, {}, ValueError, r"exp_avgs\[0\] must have the same shape"),
        ({"teachers": [E.to("meta")]}, {}, ValueError, r"teachers\[0\] is on meta .*on cpu"),
        ({"gradients": [B.to("meta")]}, {}, ValueError, r"gradients\[0\] is on meta .*on cpu"),
        ({"parameters": [A.long()]}, {}, TypeError, r"parameters\[0\] .*torch.int64"),
        ({"parameters": [1.0]}, {}, TypeError, r"parameters\[0\] .*got float"),
        ({"gradients": [B.to_sparse()]}, {}, TypeError, r"gradients\[0\] .*dense.*sparse_coo"),
        ({"exp_avgs": [None]}, {}, ValueError, r"exp_avgs\[0\] and exp_avg_sqs\[0\].*both or none"),
        (
            {"exp_avgs": [None], "exp_avg_sqs": [None]},
            {},
            ValueError,
            r"gradients\[0\] is given: expected exp_avgs\[0\]",
        ),
        ({"teachers": [A]}, {}, ValueError, r"parameters\[0\] and teachers\[0\] share memory"),
        ({"gradients": [A]}, {}, ValueError, r"parameters\[0\] and gradients\[0\] share memory"),
        ({"shadows": [C]}, {}, ValueError, r"exp_avgs\[0\] and shadows\[0\] share memory"),
        (
            {"exp_avgs": [torch.zeros(1, 3).expand(2, 3)]},
            {},
            ValueError,
            r"exp_avgs\[0\] is written.*strides \(0, 1\)",
        ),
        (
            {"teachers": [None], "teacher_shadows": [E.half()]},
            {},
            ValueError,
            r"teacher_shadows\[0\] is given: expected teachers\[0\]",
        ),
        ({"steps": torch.zeros(2)}, {}, ValueError, r"steps must have shape \(1,\), got \(2,\)"),
        ({"steps": torch.zeros(1).double()}, {}, ValueError, "steps must be contiguous fp32"),
        ({"steps": torch.zeros(1).to("meta")}, {}, ValueError, "steps is on meta"),
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
        ({}, {"skip": torch.ones(1)}, ValueError, r"skip must be a 0-d tensor, got shape \(1,\)"),
        ({}, {"found_inf": torch.ones((), device="meta")}, ValueError, "found_inf is on meta"),
        ({}, {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ({"parameters": [A.double()]}, {"impl": "triton"}, ValueError, "fp32.*float64"),
        ({"gradients": [B.double()]}, {"impl": "triton"}, ValueError, "fp32.*float64"),
    ],
)
def test_callers_mistakes_change_nothing(lists, options, raises, match):
    whole = {"parameters": [A], "gradients": [B], "exp_avgs": [C], "exp_avg_sqs": [D],
             "steps": torch.zeros(1), "teachers": [E], "momentum": 0.9, "lr": 0.1}  # fmt: skip
    if "impl" in options and torch.cuda.is_available() and options["impl"] == "triton":
        pytest.skip("Triton needs CUDA tensors here")
    with pytest.raises(raises, match=match):
        adamw_ema_update_(**(whole | lists | options))
    for value, tensor in enumerate((A, B, C, D, E)):
        assert torch.equal(tensor, torch.full((2, 3), float(value)))


def test_environment_variable_names_an_implementation(monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", "abacus")
    with pytest.raises(ValueError, match=r"FASTDINO_KERNELS must be one of 'auto'.*'abacus'"):
        make().step({"impl": "auto"})


# The optimizer


def networks(device="cpu", count=2):
    """Equal networks: a linear, an activation, a linear; fp32."""
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    return [copy.deepcopy(first).to(device) for _ in range(count)]


def groups_of(network):
    """Weights decayed, biases not, each with a rate of its own."""
    weights, biases = ([p for p in network.parameters() if p.ndim == n] for n in (2, 1))
    return [
        {"params": weights, "lr": 0.02, "weight_decay": 0.3},
        {"params": biases, "lr": 0.01, "weight_decay": 0.0, "betas": (0.7, 0.9)},
    ]


def set_gradients(network, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(network.parameters()):
        gradient = torch.randn(p.shape, generator=generator) * 0.5**i
        p.grad = None if i in without else gradient.to(p.device)


def assert_networks_close(x, y, rtol=1e-5, atol=1e-6):
    for p, q in zip(x.parameters(), y.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def test_the_optimizer_is_clip_adamw_and_ema_one_after_the_other(target):
    ours, theirs, our_teacher, their_teacher = networks(target["device"], 4)
    optimizer = AdamWEMA(
        groups_of(ours), max_norm=1.0, impl=target["impl"],
        teacher=dict(zip(ours.parameters(), our_teacher.parameters(), strict=True)),
    )  # fmt: skip
    adamw = torch.optim.AdamW(groups_of(theirs))
    for step in range(4):
        frozen = (2, 3) if step < 2 else ()  # the last layer, in the first epoch
        for network in (ours, theirs):
            set_gradients(network, step, frozen)
        momentum, lr = 0.9 + step / 100, 0.01 * step
        for some in (optimizer, adamw):
            some.param_groups[0]["lr"] = lr
        optimizer.step(momentum=momentum)
        expected = clip_grad_norms_([p for g in adamw.param_groups for p in g["params"]], 1.0)
        adamw.step()
        ema_update_(their_teacher.parameters(), theirs.parameters(), momentum)
        torch.testing.assert_close(optimizer.norms, expected)
        assert_networks_close(ours, theirs)
        assert_networks_close(our_teacher, their_teacher)
    counts = [optimizer.state[p]["step"].item() for p in ours.parameters()]
    assert counts == [4, 4, 2, 2]


def test_what_is_in_no_group_is_followed_all_the_same(target):
    student, teacher = networks(target["device"])
    student[2].weight.requires_grad_(False).add_(1)
    trained = [p for p in student.parameters() if p.requires_grad]
    pairs = dict(zip(student.parameters(), teacher.parameters(), strict=True))
    shadow = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in student.parameters()}
    optimizer = AdamWEMA(
        trained, teacher=pairs, momentum=0.75, shadow=shadow, max_norm=1.0, impl=target["impl"]
    )
    set_gradients(student, 0, without=(2,))
    expected = 0.75 * teacher[2].weight + 0.25 * student[2].weight
    optimizer.step()
    torch.testing.assert_close(teacher[2].weight, expected)
    assert torch.equal(shadow[student[2].weight], student[2].weight.bfloat16())
    assert optimizer.norms.shape == optimizer.steps.shape == (3,)
    assert sorted(optimizer.state_dict()["state"]) == [0, 1, 2]


def test_teachers_may_be_a_list_with_gaps():
    student, teacher = networks()
    teachers = [*list(teacher.parameters())[:3], None]
    before = teacher[2].bias.clone()
    optimizer = AdamWEMA(student.parameters(), lr=0.1, teacher=teachers, momentum=0.0)
    set_gradients(student, 0)
    optimizer.step()
    assert torch.equal(teacher[0].weight, student[0].weight)
    assert torch.equal(teacher[2].bias, before)


THEIRS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": True, "capturable": True},
}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", THEIRS)
def test_checkpoints_move_from_and_to_pytorchs_adamw(kind, saved, target):
    if kind == "capturable" and target["device"] == "cpu":
        pytest.skip("capturable is for accelerators")
    if target == {"impl": "triton", "device": "cpu"} and (kind != "fused" or not saved):
        pytest.skip("the interpreter is slow, and one kind shows it")

    def carry(state):
        """Through a file, or by hand."""
        if not saved:
            return copy.deepcopy(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def both():
        ours, theirs = networks(target["device"])
        optimizer = AdamWEMA(groups_of(ours), impl=target["impl"])
        return ours, optimizer, theirs, torch.optim.AdamW(groups_of(theirs), **THEIRS[kind])

    ours, our_adamw, theirs, their_adamw = both()
    for step in range(3):
        for network, optimizer in ((ours, our_adamw), (theirs, their_adamw)):
            set_gradients(network, step, without=(3,) if step < 2 else ())
            optimizer.step()
    other, our_other, others, their_other = both()
    other.load_state_dict(theirs.state_dict())
    others.load_state_dict(ours.state_dict())
    our_other.load_state_dict(carry(their_adamw.state_dict()))
    their_other.load_state_dict(carry(our_adamw.state_dict()))
    everyone = [(ours, our_adamw), (theirs, their_adamw), (other, our_other), (others, their_other)]
    for step in range(3, 5):
        for network, optimizer in everyone:
            set_gradients(network, step)
            optimizer.step()
    assert our_other.state_dict()["param_groups"] == our_adamw.state_dict()["param_groups"]
    for network, optimizer in everyone[1:]:
        assert_networks_close(network, ours)
        for p, q in zip(network.parameters(), ours.parameters(), strict=True):
            state, expected = optimizer.state[p], our_adamw.state[q]
            assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
            assert state["step"].item() == expected["step"].item()
            torch.testing.assert_close(state["exp_avg"], expected["exp_avg"])
            torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"])


def test_a_state_dict_is_that_of_a_fused_adamw():
    ours, theirs = networks()
    optimizers = AdamWEMA(groups_of(ours)), torch.optim.AdamW(groups_of(theirs), fused=True)
    for network, optimizer in zip((ours, theirs), optimizers, strict=True):
        set_gradients(network, 0, without=(1,))
        optimizer.step()
    own, expected = (optimizer.state_dict() for optimizer in optimizers)
    assert own["param_groups"] == expected["param_groups"]
    assert list(own["state"]) == list(expected["state"])
    for i, state in expected["state"].items():
        for name, value in state.items():
            assert own["state"][i][name].shape == value.shape
            assert own["state"][i][name].dtype == value.dtype


def assert_counts_are_views(optimizer):
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        count = optimizer.state[p]["step"]
        assert count.shape == ()
        assert count.data_ptr() == optimizer.steps[i].data_ptr()


@pytest.mark.parametrize("load", ["a dict", "a copy", "a pickle", "by hand", "another group"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_counts_stay_views_of_one_tensor(load, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    (network,) = networks(device, 1)
    optimizer = AdamWEMA(groups_of(network), skip_nonfinite=True)
    for step in range(2):
        set_gradients(network, step)
        optimizer.step()
    assert_counts_are_views(optimizer)
    steps = optimizer.steps
    if load == "a dict":
        state = copy.deepcopy(optimizer.state_dict())
        set_gradients(network, 2)
        optimizer.step()
        optimizer.load_state_dict(state)
        assert optimizer.steps is steps
    elif load in ("a copy", "a pickle"):
        pair = (network, optimizer)
        network, optimizer = (
            copy.deepcopy(pair) if load == "a copy" else pickle.loads(pickle.dumps(pair))
        )
        assert optimizer.steps.data_ptr() != steps.data_ptr()
    elif load == "by hand":
        optimizer.state[network[0].weight]["step"] = torch.tensor(2.0)
    else:
        extra = torch.nn.Parameter(torch.zeros(3, device=device))
        optimizer.add_param_group({"params": [extra]})
        extra.grad = torch.ones_like(extra)
    set_gradients(network, 3)
    optimizer.step()
    assert_counts_are_views(optimizer)
    assert optimizer.steps.tolist() == [3.0] * 4 + [1.0] * (load == "another group")


def test_what_is_loaded_is_copied_into_what_is_there():
    """As a captured graph needs it."""
    (network,) = networks(count=1)
    lr = torch.tensor(0.1)
    optimizer = AdamWEMA(network.parameters(), lr=lr)
    set_gradients(network, 0)
    optimizer.step()
    before = {p: dict(state) for p, state in optimizer.state.items()}
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.7
    state["state"][1]["exp_avg"].fill_(5.0)
    state["state"][1]["step"].fill_(9.0)
    del state["state"][0]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.7)
    bias = network[0].bias
    assert optimizer.state[bias]["exp_avg"] is before[bias]["exp_avg"]
    assert bool((before[bias]["exp_avg"] == 5).all())
    assert before[bias]["step"].item() == 9
    set_gradients(network, 1)
    optimizer.step()
    assert optimizer.steps.tolist() == [1.0, 10.0, 2.0, 2.0]  # what was not saved starts anew


@numpy_warns
def test_a_gradient_that_is_not_finite_is_skipped_on_the_device(target):
    student, teacher = networks(target["device"])
    optimizer = AdamWEMA(
        student.parameters(), lr=0.1, max_norm=1.0, teacher=list(teacher.parameters()),
        skip_nonfinite=True, impl=target["impl"],
    )  # fmt: skip
    set_gradients(student, 0)
    optimizer.step()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict(), optimizer.state_dict()))
    student[2].weight.grad[0, 0] = math.nan
    optimizer.step()
    after = (student.state_dict(), teacher.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.refused_steps.item() == 1
    assert optimizer.norms.isnan().tolist() == [False, False, True, False]
    set_gradients(student, 1)
    optimizer.step(skip=torch.ones((), device=target["device"]))
    torch.testing.assert_close(student.state_dict(), before[0], rtol=0, atol=0)
    optimizer.step()
    assert optimizer.refused_steps.item() == 1
    assert optimizer.steps.tolist() == [2.0] * 4


@numpy_warns
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_scales_skips_and_recovers(unscaled, target):
    device = target["device"]
    if unscaled and target == {"impl": "triton", "device": "cpu"}:
        pytest.skip("the interpreter is slow, and the other form is the harder one")
    ours, theirs, our_teacher, their_teacher = networks(device, 4)
    optimizer = AdamWEMA(
        ours.parameters(), lr=0.01, max_norm=0.5, teacher=list(our_teacher.parameters()),
        momentum=0.9, impl=target["impl"],
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    scalers = [torch.amp.GradScaler(device, init_scale=256.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(device)
        for network, some, scaler in zip((ours, theirs), (optimizer, adamw), scalers, strict=True):
            some.zero_grad()
            scaler.scale(network(x).square().mean()).backward()
            if step == 2:
                network[0].weight.grad[0, 0] = math.inf
            if some is adamw or unscaled:
                scaler.unscale_(some)
            if some is adamw:
                expected = clip_grad_norms_(theirs.parameters(), 0.5)
            scaler.step(some)
            scaler.update()
        ema_update_(their_teacher.parameters(), theirs.parameters(), 0.9)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        torch.testing.assert_close(optimizer.norms, expected, equal_nan=True)
        assert_networks_close(ours, theirs)
        assert_networks_close(our_teacher, their_teacher)
    assert optimizer.steps.tolist() == [4.0] * 4
    assert not hasattr(optimizer, "found_inf")


def test_a_grad_scaler_and_no_gradient_at_all():
    student, teacher = networks()
    optimizer = AdamWEMA(student.parameters(), teacher=list(teacher.parameters()), momentum=0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    student[0].weight.data.add_(1)
    scaler.step(optimizer)
    assert torch.equal(teacher[0].weight, student[0].weight)


def test_a_closure_is_evaluated_with_gradients():
    (network,) = networks(count=1)
    optimizer = AdamWEMA(network.parameters(), lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = network(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_schedulers_drive_the_rate():
    (network,) = networks(count=1)
    optimizer = AdamWEMA(network.parameters(), lr=torch.tensor(0.5))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    set_gradients(network, 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.25)


P, Q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))


@pytest.mark.parametrize(
    ("options", "raises", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0"),
        ({"betas": (0.9, 2.0)}, ValueError, r"betas must be in \[0, 1\)"),
        ({"params": [{"params": [P]}, {"params": [Q], "lr": -1}]}, ValueError, "lr must be >= 0"),
        ({"params": [{"params": [P], "amsgrad": True}]}, ValueError, "amsgrad is not supported"),
        ({"max_norm": -1.0}, ValueError, "max_norm must be > 0"),
        ({"momentum": 2.0}, ValueError, r"momentum must be in \[0, 1\]"),
        ({"teacher": [torch.zeros(2)] * 3}, ValueError, "teacher .*expected 2, got 3"),
        ({"shadow": []}, ValueError, "shadow .*expected 2, got 0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_mistakes_of_the_constructor_are_told(options, raises, match):
    with pytest.raises(raises, match=match):
        AdamWEMA(**({"params": [P, Q]} | options))


def test_a_group_that_is_refused_is_not_added():
    optimizer = AdamWEMA([P])
    with pytest.raises(ValueError, match="weight_decay must be >= 0"):
        optimizer.add_param_group({"params": [Q], "weight_decay": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_the_state_of_another_algorithm_is_refused(name):
    ours, theirs = networks()
    adamw = torch.optim.AdamW(theirs.parameters(), **{name: True})
    optimizer = AdamWEMA(ours.parameters())
    with pytest.raises(ValueError, match=f"expected a state_dict without {name}"):
        optimizer.load_state_dict(adamw.state_dict())
    assert not optimizer.param_groups[0][name]


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gradients_in_graph", [False, True])
def test_a_captured_step_follows_the_numbers_on_the_device(gradients_in_graph):
    student, teacher = networks("cuda")
    numbers = {
        name: torch.tensor(value, dtype=torch.float64, device="cuda")
        for name, value in (("lr", 0.0), ("weight_decay", 0.0), ("momentum", 1.0))
    }
    optimizer = AdamWEMA(
        student.parameters(), lr=numbers["lr"], weight_decay=numbers["weight_decay"], max_norm=0.5,
        momentum=numbers["momentum"], teacher=list(teacher.parameters()), skip_nonfinite=True,
    )  # fmt: skip
    inputs = torch.randn(4, 5, device="cuda")

    def step():
        if gradients_in_graph:
            optimizer.zero_grad()
            student(inputs).square().mean().backward()
        optimizer.step()

    set_gradients(student, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    other, other_teacher = networks("cuda")
    adamw = torch.optim.AdamW(other.parameters())
    adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for count, (lr, decay, momentum) in enumerate([(0.1, 0.2, 0.9), (0.01, 0.0, 0.5)]):
        for name, value in (("lr", lr), ("weight_decay", decay), ("momentum", momentum)):
            numbers[name].fill_(value)
        inputs.normal_()
        if not gradients_in_graph:
            for p in student.parameters():
                p.grad.normal_()
        adamw.zero_grad()
        other(inputs).square().mean().backward()
        if not gradients_in_graph:
            for p, q in zip(other.parameters(), student.parameters(), strict=True):
                p.grad.copy_(q.grad)
        expected = clip_grad_norms_(other.parameters(), 0.5)
        adamw.param_groups[0].update(lr=lr, weight_decay=decay)
        adamw.step()
        ema_update_(other_teacher.parameters(), other.parameters(), momentum)
        graph.replay()
        torch.testing.assert_close(optimizer.norms, expected)
        assert_networks_close(student, other)
        assert_networks_close(teacher, other_teacher)
        assert optimizer.steps.tolist() == [count + 2.0] * 4
    if not gradients_in_graph:
        student[0].weight.grad[0, 0] = math.nan
        graph.replay()
        assert_networks_close(student, other)
        assert optimizer.refused_steps.item() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_without_state_is_refused():
    (network,) = networks("cuda", 1)
    optimizer = AdamWEMA(network.parameters())
    set_gradients(network, 0)
    with pytest.raises(RuntimeError, match="step once.*before capturing"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()

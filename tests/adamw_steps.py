"""Steps of adamw_ema_update_, and their results by separate clip, AdamW and EMA in float64."""

import math
from dataclasses import dataclass, field, fields

import pytest
import torch
from fastdino_kernels import adamw_ema_torch, adamw_ema_update_, reference

from tests.multi_tensor import EPS, draw

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

"""fastdino.bench.step_profile: the parts, launches and reads of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from fastdino.bench.baselines.paper_step import PaperStep
from fastdino.bench.baselines.training_step import initial_setup, synthetic_crops
from fastdino.bench.step_profile import PARTS, break_down, markable, profile_step

CPU = torch.device("cpu")


def event(name, start, end, parent=None, *, sequence=-1, self_time=0.0, kernels=()):
    made = SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_parent=parent,
        cpu_children=[],
        sequence_nr=sequence,
        self_cpu_time_total=self_time,
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
        device_type=DeviceType.CPU,
    )
    if parent is not None:
        parent.cpu_children.append(made)
    return made


def events_of_a_step():
    """Build the events of forward, head, loss, backward and update, in microseconds."""
    backward = "autograd::engine::evaluate_function: "
    head = event("fastdino part: head", 30, 40, self_time=100)
    passes = [event(f"{backward}{i}", 50 + i, 51 + i, sequence=7 - i) for i in range(3)]
    adam = event("Optimizer.step#AdamW.step", 70, 80)
    return [
        event("aten::convolution", 0, 1, self_time=1, kernels=[("implicit_conv", 10)]),
        event("aten::addmm", 1, 2, sequence=5, self_time=2, kernels=[("nvjet", 20)]),
        event("aten::bmm", 2, 3, self_time=4, kernels=[("cutlass", 40)]),
        event("aten::native_layer_norm", 3, 4, self_time=8, kernels=[("norm", 80)]),
        head,
        event("aten::addmm", 31, 32, head, sequence=6, self_time=16, kernels=[("nvjet", 160)]),
        event("aten::exp", 41, 42, sequence=7, self_time=32, kernels=[("exp", 320)]),
        event("aten::_local_scalar_dense", 43, 44),
        *passes,
        event("aten::mul", 50, 51, passes[0], self_time=64, kernels=[("mul", 640)]),
        event("aten::mm", 51, 52, passes[1], self_time=128, kernels=[("nvjet", 1280)]),
        event("aten::mm", 52, 53, passes[2], self_time=256, kernels=[("nvjet", 2560)]),
        adam,
        event("aten::_fused_adamw_", 71, 72, adam, self_time=512, kernels=[("adamw", 5120)]),
        event("aten::_local_scalar_dense", 73, 74, adam),
        event("aten::lerp_", 81, 82, self_time=1024, kernels=[("lerp", 10240)]),
    ]


@pytest.mark.parametrize(("on_gpu", "unit"), [(False, 1e-6), (True, 1e-5)])
def test_every_event_belongs_to_one_part(on_gpu, unit):
    profile = break_down(events_of_a_step(), 1.0, on_gpu=on_gpu)
    counted = dict(zip(PARTS, (1, 8, 2 + 256, 4, 16 + 128, 32 + 64, 512 + 1024), strict=True))
    assert profile.parts == pytest.approx({part: unit * n for part, n in counted.items()})
    assert profile.backward == pytest.approx(unit * (64 + 128 + 256))
    assert profile.rest == pytest.approx(1 - unit * sum(counted.values()))


def test_launches_and_reads_are_counted():
    on_cpu = break_down(events_of_a_step(), 1.0, on_gpu=False)
    assert (on_cpu.launches, on_cpu.reads) == (11, 1)  # the optimizer's host counters do not count
    launch = event("cudaLaunchKernel", 1, 2)
    copy = event("Memcpy DtoH (Device -> Pinned)", 3, 4)
    copy.device_type = DeviceType.CUDA
    on_gpu = break_down([*events_of_a_step(), launch, launch, copy], 1.0, on_gpu=True)
    assert (on_gpu.launches, on_gpu.reads) == (2, 1)


def test_linear_layers_in_marked_attention_are_products():
    mark = event("fastdino part: attention", 0, 10)
    inner = [event(name, 1, 2, mark, self_time=1) for name in ("aten::addmm", "aten::mul")]
    parts = break_down([mark, *inner], 1.0, on_gpu=False).parts
    assert (parts["GEMM"], parts["attention"]) == (1e-6, 1e-6)


def test_compiled_code_is_not_marked():
    network = nn.Sequential(*(nn.Sequential() for _ in range(3)))
    for block in network:
        block.attn = nn.Identity()
    network.head = nn.Identity()
    network[0].compile(backend="eager")
    network[1].forward = torch.compile(network[1].forward, backend="eager")
    network.head.forward = torch.compile(network.head.forward, backend="eager")
    assert {module for module, _ in markable(network)} == {network[2].attn, network.head}


def test_a_profiled_step_has_all_parts(tiny):
    config = tiny(freeze_last_layer=0, batch_size_per_gpu=2)
    step, crops = PaperStep(initial_setup(config, CPU)), synthetic_crops(config, CPU)
    step.step(crops)
    profile = profile_step(step, crops, CPU)
    assert all(seconds > 0 for seconds in profile.parts.values())
    assert sum(profile.parts.values()) <= profile.seconds
    clipped = sum(p.requires_grad for p in step.student.parameters())
    assert profile.reads == 1 + 2 * clipped  # the loss; each norm and its comparison
    assert not step.student.head._forward_hooks


def test_reads_of_many_values_are_counted(tiny):
    class Reads(PaperStep):
        def step(self, crops):
            torch.arange(3).tolist()
            torch.ones(()).item()

    step = Reads(initial_setup(tiny(), CPU))
    assert profile_step(step, [], CPU).reads == 2
    assert "tolist" not in vars(torch.Tensor)

"""fastdino_kernels.dino_loss under torch.compile, autocast, fake tensors and CUDA graphs."""

import pytest
import torch
from fastdino_kernels import dino_loss, teacher_entropy
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.dino_losses import TEMPS, draw, ours
from tests.multi_tensor import capture, needs_cuda


def test_new_temperature_does_not_recompile(target):
    student, teacher, center = (x.to(target["device"]) for x in draw())
    counter = CompileCounterWithBackend("aot_eager")

    def step(student, teacher_temp):
        options = {"student_temp": 0.1, "teacher_temp": teacher_temp, "impl": target["impl"]}
        return dino_loss(student, teacher, center, **options)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for epoch in range(12):
        temp = 0.04 + 0.001 * epoch
        torch.testing.assert_close(compiled(student, temp), step(student, temp))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(dtype, target):
    if dtype == torch.float64:
        target = target | {"impl": "torch"}
    inputs = draw(dtype=dtype)
    expected = ours(*inputs, **target)
    with torch.autocast(target["device"], dtype=torch.bfloat16):
        got = ours(*inputs, **target)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_as_one_graph(inplace_backward, target):
    inputs = draw(dtype=torch.bfloat16)

    def step(student, teacher, center):
        options = TEMPS | {"impl": target["impl"], "inplace_backward": inplace_backward}
        loss, total = dino_loss(2 * student, teacher, center, **options)
        return loss * 2, total

    student, teacher, center = (x.to(target["device"]) for x in inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaf = student.clone().requires_grad_()
        loss, total = run(leaf, teacher, center)
        loss.backward()
        results.append((loss.detach(), leaf.grad, total))
    assert all(map(torch.equal, *results))


def test_fake_tensors_pass_through(target):
    with FakeTensorMode():
        student = torch.randn(4, 3, 7, device=target["device"], requires_grad=True)
        teacher, center = (torch.randn(s, device=target["device"]) for s in ((2, 3, 7), (7,)))
        loss, total = dino_loss(student, teacher, center, impl=target["impl"], **TEMPS)
        loss.backward()
    assert (loss.shape, total.shape, student.grad.shape) == ((), (7,), (4, 3, 7))


@pytest.mark.gpu
@needs_cuda
def test_captured_graph_reads_inputs_and_temperatures_anew():
    student, teacher, center = (x.cuda() for x in draw(4, 2, 3, 4096, torch.bfloat16))
    student.requires_grad_()
    temps = {name: torch.tensor(value, device="cuda") for name, value in TEMPS.items()}

    def step():
        student.grad = None
        loss, total = dino_loss(student, teacher, center, impl="triton", **temps)
        loss.backward()
        return loss.detach(), student.grad, total

    graph, captured = capture(step)
    others = draw(4, 2, 3, 4096, torch.bfloat16, seed=1)
    with torch.no_grad():
        for mine, other in zip((student, teacher, center), others, strict=True):
            mine.copy_(other)
        temps["teacher_temp"].fill_(0.07)
    graph.replay()
    expected = ours(*others, impl="triton", device="cuda", student_temp=0.1, teacher_temp=0.07)
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-8)


def test_teacher_entropy_compiles_as_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(teacher_entropy, fullgraph=True, dynamic=True, backend=counter)
    for B in (5, 2, 9):
        _, teacher, center = draw(2, 2, B, 50)
        torch.testing.assert_close(
            compiled(teacher, center, 0.04), teacher_entropy(teacher, center, 0.04)
        )
    assert counter.frame_count == 1

"""Clipping and AdamWEMA of DTensors on two ranks against whole tensors on one."""

from pathlib import Path

import pytest
import torch
from fastdino_kernels import AdamWEMA, clip_grad_norm_, clip_grad_norms_
from fastdino_kernels.norms import norm

from tests.multi_tensor import long_normal
from tests.processes import run_two

IMPLS = ["torch"] if torch.cuda.is_available() else ["torch", "triton"]


def network():
    """Make a network whose 7 rows split unevenly and whose 1 row leaves rank 1 without rows."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 1))


def gradients_of(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) * 0.7**i
            for i, p in enumerate(module.parameters())]  # fmt: skip


def whole(tensors):
    return [t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for t in tensors]


def run(student, teacher, impl, give):
    """Run two steps and both clips; give(gradient, like) makes a gradient of a parameter."""
    results = {}
    optimizer = AdamWEMA(
        student.parameters(), lr=0.1, max_norm=0.8, teacher=list(teacher.parameters()),
        momentum=0.9, skip_nonfinite=True, impl=impl,
    )  # fmt: skip
    for step in range(2):
        for p, g in zip(student.parameters(), gradients_of(student, step), strict=True):
            p.grad = give(g, p)
        list(student.parameters())[step].grad = None
        if step == 1:  # in the row that only rank 0 has
            student[2].weight.grad = give(torch.full((1, 7), float("nan")), student[2].weight)
        optimizer.step()
        results[f"norms of step {step}"] = optimizer.norms
    for name, clip in (("each", clip_grad_norms_), ("all", clip_grad_norm_)):
        for p, g in zip(student.parameters(), gradients_of(student, 9), strict=True):
            p.grad = give(g, p)
        student[0].bias.grad = None
        results[name] = clip(student.parameters(), 0.8, impl=impl)
        left = [p.grad for p in student.parameters() if p.grad is not None]
        results[f"clipped {name}"] = whole(left)
    results["student"] = whole(p.detach() for p in student.parameters())
    results["teacher"] = whole(p.detach() for p in teacher.parameters())
    results["counts"] = [optimizer.steps, optimizer.refused_steps]
    return results


def of_two(folder: Path) -> None:
    """Run the same with FSDP2 on one of two ranks and save the results."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    def give(gradient, like):
        if not isinstance(like, DTensor):
            return gradient
        return distribute_tensor(gradient, like.device_mesh, like.placements)

    mesh, hybrid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    for impl in IMPLS:
        student, teacher = network(), network()
        for module in (student, teacher):
            fully_shard(module[0], mesh=mesh)  # the other layer is whole, except for its weight
            module[2].weight = torch.nn.Parameter(
                distribute_tensor(module[2].weight.detach(), hybrid, [Replicate(), Shard(0)])
            )
        torch.save(run(student, teacher, impl, give), folder / f"{impl}{rank}.pt")

    p = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Replicate()])
    assert clip_grad_norms_([p], 1.0).item() == pytest.approx(3**0.5)
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"parameters\[0\].grad must be sharded or repl.*Partial"):
        clip_grad_norms_([p], 1.0)
    x = long_normal()
    for placement in (Shard(0), Replicate()):
        value = norm(distribute_tensor(x, mesh, [placement]))
        assert value.item() == pytest.approx(x.double().norm().item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"tensor\[0\] must be sharded or replicated, .*Partial"):
        norm(p.grad)
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Replicate()])
    teacher = DTensor.from_local(torch.ones(3), mesh, [Shard(0)])
    with pytest.raises(
        ValueError, match=r"parameters\[0\] and teachers\[0\] must be sharded alike"
    ):
        AdamWEMA([p], teacher=[teacher]).step()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Path:
    """The folder with the results of two ranks."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    run_two(of_two, folder)
    return folder


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("impl", IMPLS)
def test_shards_give_the_same_result_as_whole_tensors(impl, outcomes):
    expected = run(network(), network(), impl, lambda gradient, like: gradient)
    assert expected["counts"][1].item() == 1
    for rank in range(2):
        results = torch.load(outcomes / f"{impl}{rank}.pt")
        torch.testing.assert_close(results, expected, equal_nan=True, rtol=1e-6, atol=1e-7)

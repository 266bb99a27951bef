"""fastdino_kernels.linear_dino_loss and linear_patch_loss: losses of the inputs of the last layers.

`target` is an implementation and a device: PyTorch, and Triton on a GPU or interpreted on a CPU.
Legend: S crops of the student, T crops of the teacher, B images, N rows, D features, K prototypes.
"""

import math
from functools import partial

import pytest
import torch
from fastdino_kernels import (
    dino_loss,
    last_layer_weight,
    linear_dino_loss,
    linear_patch_loss,
    patch_loss,
    reference,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastdino.bench.measurement import peak_bytes
from tests.linear_layers import TEMPS, Inputs, draw, error, of_logits, run
from tests.multi_tensor import capture, needs_cuda
from tests.processes import run_ranks

HALF = [torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
DINO, PATCH = (4, 5), (7,)  # leading dimensions of the student's rows


def plain_dino_loss(student, teacher, center, weights=None, ignore_diagonal=True, **temps):
    """Compute the loss by the reference's rows, in the logits' dtype."""
    center = center.to(teacher.dtype)
    probs = torch.softmax((teacher.detach() - center) / temps["teacher_temp"], dim=-1)
    rows = reference.soft_cross_entropy(student, probs, temps["student_temp"], ignore_diagonal)
    rows = rows if weights is None else rows * weights.to(rows.dtype)
    (S, B), T = rows.shape, len(teacher)
    pairs = S * T - (min(S, T) if ignore_diagonal else 0)
    return rows.sum() / max(pairs * B, 1), teacher.detach().sum(dim=(0, 1))


def plain_patch_loss(student, teacher, center, weights=None, **options):
    """Compute the reference's loss in the logits' dtype."""
    weights = None if weights is None else weights.to(student.dtype)
    center = center.to(teacher.dtype)
    return reference.patch_loss(student, teacher, center, weights=weights, **options)


LINEAR = {"dino": linear_dino_loss, "patch": linear_patch_loss}
LOGITS = {"dino": of_logits(dino_loss), "patch": of_logits(patch_loss)}
PLAIN = {"dino": of_logits(plain_dino_loss), "patch": of_logits(plain_patch_loss)}


def draw_for(kind: str, B: int = 5, **options) -> Inputs:
    return draw((4, B), (2, B), **options) if kind == "dino" else draw((B,), **options)


def to_double(inputs: Inputs) -> Inputs:
    return Inputs(*(t.double() for t in inputs))


OPTIONS = {
    "dino": [
        {},
        {"ignore_diagonal": False},
        {"weights": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])},
        {"weights": torch.arange(20.0).reshape(4, 5)},
    ],
    "patch": [
        {},
        {"denominator": 3},
        {"weights": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])},
        {"weights": torch.arange(5.0), "denominator": torch.tensor(7)},
    ],
}
CASES = [(kind, options) for kind, every in OPTIONS.items() for options in every]


@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 5, 100])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_matches_the_reference_in_float64(kind, options, chunk_rows):
    inputs = draw_for(kind)
    got = run(LINEAR[kind], inputs, 3.0, chunk_rows=chunk_rows, **options)
    expected = run(PLAIN[kind], to_double(inputs), 3.0, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_the_plain_loss_is_the_reference():
    student, teacher = torch.randn(4, 3, 9).double(), torch.randn(2, 3, 9).double()
    center = torch.randn(9).double()
    expected = reference.dino_loss(student, teacher, center, **TEMPS)
    torch.testing.assert_close(plain_dino_loss(student, teacher, center, **TEMPS), expected)


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_loss_of_the_logits(case, dtype, target):
    kind, options = CASES[case]
    if target == {"impl": "triton", "device": "cpu"} and dtype != [*HALF, torch.float32][case % 3]:
        pytest.skip("the interpreter is slow: one dtype per case")
    inputs = draw_for(kind, K=600, dtype=dtype)
    loss, total, *grads = run(LINEAR[kind], inputs, **options, **target, chunk_rows=3)
    expected = run(LOGITS[kind], inputs, **options, **target)
    exact = run(PLAIN[kind], to_double(inputs), **options)
    assert loss.dtype == total.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    assert error(loss, expected[0]) < 1e-6
    assert error(total, expected[1]) < 1e-6
    for got, want, truth in zip(grads, expected[2:], exact[2:], strict=True):
        if dtype == torch.float32:  # the temperatures multiply the products' rounding by 25
            assert error(got, truth) < error(want, truth) + 2e-6
        else:  # the gradients of the logits and the results are rounded
            assert error(got, want) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_is_at_least_as_accurate_as_plain_pytorch(kind, dtype):
    """On average: both have the rounding of the logits, whose errors may cancel."""
    errors = torch.zeros(2, 4)
    for seed in range(16):
        inputs = draw_for(kind, B=12, K=1000, D=30, dtype=dtype, seed=seed)
        expected = run(PLAIN[kind], to_double(inputs))
        for i, loss_fn in enumerate((partial(LINEAR[kind], chunk_rows=5), PLAIN[kind])):
            results = run(loss_fn, inputs)
            errors[i] += torch.tensor(list(map(error, results, expected)))
    assert (errors[0] <= errors[1] + 16e-6).all()


def test_a_mean_over_many_rows_does_not_vanish_in_fp16(target):
    inputs = draw_for("patch", K=512, dtype=torch.float16)
    rows = 2.0**22  # gradients of 1e-3/rows are below fp16's smallest number
    got = run(linear_patch_loss, inputs, rows, denominator=rows, **target)
    expected = run(linear_patch_loss, inputs, denominator=1, **target)
    assert all(map(torch.equal, got[2:], expected[2:]))
    assert got[2].abs().max() > 0


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_gradcheck(kind):
    inputs = draw_for(kind, B=3, K=5)
    leaves = [inputs.x_student.requires_grad_(), inputs.weight_student.requires_grad_()]

    def loss(x, weight):
        changed = inputs._replace(x_student=x, weight_student=weight)
        return LINEAR[kind](*changed, **TEMPS, chunk_rows=2)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_second_derivative_is_an_error(kind):
    inputs = draw_for(kind)
    loss, _ = LINEAR[kind](inputs.x_student.requires_grad_(), *inputs[1:], **TEMPS)
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(loss, inputs.x_student, create_graph=True)


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_backward_twice_through_a_kept_graph(kind):
    inputs = draw_for(kind)
    leaves = [inputs.x_student.requires_grad_(), inputs.weight_student.requires_grad_()]
    loss, _ = LINEAR[kind](*inputs, **TEMPS)
    first, second = (
        torch.autograd.grad(factor * loss, leaves, retain_graph=factor == 1) for factor in (1, 3)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_gradient_accumulation_adds_up(kind):
    inputs = draw_for(kind)
    x, weight = inputs.x_student.requires_grad_(), inputs.weight_student.requires_grad_()
    for _ in range(2):
        loss, _ = LINEAR[kind](*inputs, **TEMPS)
        (loss / 2).backward()
    expected = run(LINEAR[kind], inputs)
    torch.testing.assert_close((x.grad, weight.grad), expected[2:])


@pytest.mark.parametrize("kind", ["dino", "patch"])
@pytest.mark.parametrize("needed", ["both", "x_student", "weight_student", "none", "no_grad"])
def test_only_gradients_that_are_needed_are_made(kind, needed, monkeypatch):
    inputs = draw_for(kind)
    x, weight = inputs.x_student, inputs.weight_student
    x.requires_grad_(needed in ("both", "x_student", "no_grad"))
    weight.requires_grad_(needed in ("both", "weight_student", "no_grad"))
    made = {}
    op = torch.ops.fastdino_kernels.linear_pairwise
    module = __import__("fastdino_kernels.linear_pairwise", fromlist=["ops"])

    class Ops:
        @staticmethod
        def linear_pairwise(*arguments):
            results = op(*arguments)
            made.update(x_student=results[2].numel(), weight_student=results[3].numel())
            return results

    monkeypatch.setattr(module, "ops", Ops)
    with torch.set_grad_enabled(needed != "no_grad"):
        loss, _ = LINEAR[kind](*inputs, **TEMPS)
    names = ("x_student", "weight_student")
    wanted = [needed in ("both", name) for name in names]
    assert [made[name] > 0 for name in names] == wanted
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [t.grad is not None for t in (x, weight)] == wanted


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_teacher_and_center_are_constants(kind):
    inputs = Inputs(*(t.requires_grad_() for t in draw_for(kind)))
    before = [t.detach().clone() for t in inputs]
    loss, total = LINEAR[kind](*inputs, **TEMPS)
    loss.backward()
    assert not total.requires_grad
    assert [t.grad is not None for t in inputs] == [True, False, True, False, False]
    assert all(map(torch.equal, before, inputs))


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_empty_batch_has_loss_zero(kind, target):
    loss, total, dx, dweight = run(LINEAR[kind], draw_for(kind, B=0, dtype=torch.float32), **target)
    assert loss == 0
    assert dx.numel() == 0
    assert torch.equal(total, torch.zeros(40))
    assert torch.equal(dweight, torch.zeros(40, 6))


@pytest.mark.parametrize("scale", [1e-9, 1e3, 1e9])
def test_weights_of_any_size_in_fp16(scale, target):
    inputs, weights = draw_for("patch", dtype=torch.float16), torch.rand(5)
    got, expected = (
        run(LINEAR["patch"], inputs, weights=weights * x, denominator=x, **target)
        for x in (scale, 1.0)
    )
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4)


def test_weights_of_zero_in_fp16(target):
    inputs = draw_for("patch", dtype=torch.float16)
    loss, _, *gradients = run(LINEAR["patch"], inputs, weights=torch.zeros(5), **target)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("denominator", [torch.tensor(0), torch.tensor(0.0), 3.0, None])
def test_no_tokens_and_a_denominator_that_counts_them(denominator, target):
    inputs = draw_for("patch", B=0, dtype=torch.float32)
    for loss_function in (LINEAR["patch"], LOGITS["patch"]):
        loss, *gradients = run(loss_function, inputs, denominator=denominator, **target)
        assert loss == 0
        assert not any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_temperatures_and_denominator_may_be_tensors(kind, target):
    inputs = draw_for(kind, dtype=torch.float32)
    temps = {name: torch.tensor(value) for name, value in TEMPS.items()}
    expected = run(LINEAR[kind], inputs, **target)
    torch.testing.assert_close(run(LINEAR[kind], inputs, **temps, **target), expected)


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_non_contiguous_inputs(kind, target):
    inputs = draw_for(kind, dtype=torch.float32)
    expected = run(LINEAR[kind], inputs, **target)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs[:4]]
    got = run(LINEAR[kind], Inputs(*strided, inputs.center[None]), **target)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_same_input_gives_same_bits(target):
    inputs = draw_for("patch", B=9, K=600, dtype=torch.bfloat16)
    results = [run(linear_patch_loss, inputs, **target, chunk_rows=4) for _ in range(2)]
    assert all(map(torch.equal, *results))


# Precision of the products


@pytest.mark.parametrize("kind", ["dino", "patch"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_its_dtype(kind, x_dtype):
    inputs = draw_for(kind, K=300, dtype=torch.float32)
    inputs = inputs._replace(
        x_student=inputs.x_student.to(x_dtype), x_teacher=inputs.x_teacher.to(x_dtype)
    )
    low = Inputs(*(t.bfloat16() for t in inputs[:4]), inputs.center)
    expected = run(LINEAR[kind], low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, total, dx, dweight = run(LINEAR[kind], inputs)
    assert torch.equal(loss, expected[0])
    assert torch.equal(total, expected[1])
    assert (dx.dtype, dweight.dtype) == (x_dtype, torch.float32)
    assert torch.equal(dx.bfloat16(), expected[2])
    assert torch.equal(dweight.bfloat16(), expected[3])
    assert not torch.equal(dweight, dweight.bfloat16().float())  # more digits than the products


def test_autocast_leaves_fp64_alone():
    inputs = draw_for("patch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(linear_patch_loss, inputs)
    assert all(map(torch.equal, got, run(linear_patch_loss, inputs)))


def test_student_and_teacher_may_differ_in_dtype(target):
    inputs = draw_for("patch", K=300, dtype=torch.float32)
    expected = run(LOGITS["patch"], inputs)
    mixed = inputs._replace(
        x_teacher=inputs.x_teacher.bfloat16(), weight_teacher=inputs.weight_teacher.bfloat16()
    )
    got = run(linear_patch_loss, mixed, **target)
    assert [t.dtype for t in got] == [torch.float32] * 4
    assert error(got[0], expected[0]) < 0.01


# Memory


@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_peak_memory_is_that_of_a_chunk(kind):
    B, K, rows = 62, 8192, 6 if kind == "dino" else 2  # the last chunks are shorter
    inputs = draw_for(kind, B=B, K=K, dtype=torch.float32)
    leaves = [inputs.x_student.requires_grad_(), inputs.weight_student.requires_grad_()]

    def step(loss_fn, **options):
        for leaf in leaves:
            leaf.grad = None
        loss_fn(*inputs, **TEMPS, **options)[0].backward()

    held = sum(leaf.nbytes for leaf in leaves)
    peak = peak_bytes(partial(step, LINEAR[kind], chunk_rows=4), CPU) - held
    chunk = rows * 4 * K * 4
    assert chunk < peak < 2 * chunk + (4 << 18)  # temporaries of the loss: 256 KB each
    eager = peak_bytes(partial(step, LOGITS[kind]), CPU) - held
    assert eager > 5 * peak


def test_gradients_are_scaled_in_place():
    inputs = draw_for("patch", K=100_000, dtype=torch.float32)
    weight = inputs.weight_student.requires_grad_()

    def forward():
        return linear_patch_loss(*inputs, **TEMPS, chunk_rows=1)[0]

    losses = [forward()]
    assert peak_bytes(lambda: losses.pop().backward(), CPU) < weight.nbytes / 10


# torch.compile, fake tensors, CUDA graphs


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["dino", "patch"])
def test_compiles_as_one_graph(kind, autocast, target):
    if autocast and target["impl"] == "triton":
        pytest.skip("the same graph")
    inputs = draw_for(kind, dtype=torch.float32)

    def loss_fn(x, *others, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, total = LINEAR[kind](2 * x, *others, **options)
        return 2 * loss, total

    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    results = [run(f, inputs, **target) for f in (loss_fn, compiled)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_one_compiled_graph_serves_all_batch_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_patch_loss, dynamic=True, fullgraph=True, backend=counter)
    for B in (5, 3, 11):
        inputs = draw_for("patch", B=B, dtype=torch.float32)
        torch.testing.assert_close(run(compiled, inputs), run(linear_patch_loss, inputs))
    assert counter.frame_count == 1


def test_fake_tensors_pass_through(target):
    with FakeTensorMode():
        inputs = draw_for("dino", dtype=torch.float32)
        moved = [t.to(target["device"]) for t in inputs]
        loss, total = linear_dino_loss(
            moved[0].requires_grad_(), *moved[1:], **TEMPS, impl=target["impl"]
        )
        loss.backward()
    assert (loss.shape, total.shape, moved[0].grad.shape) == ((), (40,), (4, 5, 6))


@pytest.mark.gpu
@needs_cuda
def test_captured_graph_reads_inputs_and_temperatures_anew():
    inputs = [t.cuda() for t in draw_for("patch", B=70, K=4096, dtype=torch.bfloat16)]
    x, weight = inputs[0].requires_grad_(), inputs[2].requires_grad_()
    temps = {name: torch.tensor(value, device="cuda") for name, value in TEMPS.items()}

    def step():
        x.grad = weight.grad = None
        loss, total = linear_patch_loss(*inputs, **temps, chunk_rows=32)
        loss.backward()
        return loss.detach(), total, x.grad, weight.grad

    graph, captured = capture(step)
    others = draw_for("patch", B=70, K=4096, dtype=torch.bfloat16, seed=1)
    with torch.no_grad():
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
        temps["teacher_temp"].fill_(0.07)
    graph.replay()
    expected = run(linear_patch_loss, others, device="cuda", teacher_temp=0.07, chunk_rows=32)
    torch.testing.assert_close([t.cpu() for t in captured], list(expected))


# Several ranks


class Network(nn.Module):
    """A layer, and a weight-normed last layer whose logits are not computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 6, dtype=torch.float64)
        last = nn.Linear(6, 40, bias=False, dtype=torch.float64)
        self.last = nn.utils.parametrizations.weight_norm(last)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.body(images), dim=-1)


def patch_step(network: nn.Module, last: nn.Module, images: Tensor, accumulate: int = 1) -> None:
    teacher = draw_for("patch", B=len(images))
    for part in range(accumulate):
        some = slice(part, None, accumulate)
        loss, _ = linear_patch_loss(
            network(images[some]), teacher.x_teacher[some], last_layer_weight(last),
            teacher.weight_teacher, teacher.center, **TEMPS, denominator=len(images), chunk_rows=2,
        )  # fmt: skip
        loss.backward()


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters()]


def gradients_on_ranks() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    images = [torch.randn(4, 5, generator=torch.Generator().manual_seed(r)).double()
              for r in range(world)]  # fmt: skip
    every = []
    for part in images:
        alone = Network()
        patch_step(alone, alone.last, part)
        every.append(gradients(alone))
    network = DistributedDataParallel(Network())
    patch_step(network, network.module.last, images[rank])
    for got, *parts in zip(gradients(network), *every, strict=True):
        torch.testing.assert_close(got, sum(parts) / world)
    accumulated = DistributedDataParallel(Network())
    patch_step(accumulated, accumulated.module.last, images[rank], accumulate=2)
    torch.testing.assert_close(gradients(accumulated), gradients(network))
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_averages_the_gradients():
    run_ranks(2, gradients_on_ranks)


# Bad input


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_weight_must_be_gathered():
    mesh = init_device_mesh("cpu", (1,))
    inputs = draw_for("patch")
    sharded = distribute_tensor(inputs.weight_student, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"weight_student .*DTensor: call full_tensor\(\)"):
        linear_patch_loss(inputs.x_student, inputs.x_teacher, sharded, *inputs[3:], **TEMPS)
    loss, _ = linear_patch_loss(*inputs._replace(weight_student=sharded.full_tensor()), **TEMPS)
    assert torch.equal(loss, linear_patch_loss(*inputs, **TEMPS)[0])


X, Y, W, C = torch.zeros(4, 3, 6), torch.zeros(2, 3, 6), torch.zeros(7, 6), torch.zeros(7)


@pytest.mark.parametrize(
    ("changes", "raises", "match"),
    [
        ({"x_student": X[0]}, ValueError, r"x_student must be \[S, B, D\], got shape \(3, 6\)"),
        ({"x_teacher": Y[:0]}, ValueError, r"x_teacher must be \[T, B, D\], got shape \(0, 3, 6\)"),
        ({"x_student": X.long()}, TypeError, "x_student .*torch.int64"),
        ({"x_student": None}, TypeError, "x_student must be a torch.Tensor, got NoneType"),
        ({"x_teacher": Y[:, :2]}, ValueError, r"number of rows, .*\(4, 3, 6\) and \(2, 2, 6\)"),
        ({"weight_student": W[0]}, ValueError, r"weight_student must be .* got shape \(6,\)"),
        ({"weight_student": W.t()}, ValueError, r"D = 6 of x_student, got shape \(6, 7\)"),
        ({"weight_student": W[:6]}, ValueError, "same number K of prototypes, got 6 and 7"),
        ({"weight_teacher": W[:0]}, ValueError, "K >= 1"),
        ({"weight_teacher": W.bfloat16()}, ValueError,
         "same dtype .or use torch.autocast., got torch.float32 and torch.bfloat16"),
        ({"weight_student": W.to("meta")}, ValueError, "same device, got meta and cpu"),
        ({"x_teacher": Y.to("meta"), "weight_teacher": W.to("meta"), "center": C.to("meta")},
         ValueError, "x_student and x_teacher .*cpu and meta"),
        ({"center": C[:6]}, ValueError, r"center must be .* K = 7, got shape \(6,\)"),
        ({"center": C.long()}, TypeError, "center .*torch.int64"),
        ({"x_student": X[:1]}, ValueError, "S = 1 and T = 2"),
        ({"x_student": X[:1], "x_teacher": Y[:1]}, ValueError, "leave no pairs .*diagonal=F"),
        ({"weights": torch.ones(4)}, ValueError, r"weights must be \[B\] = \[3\] or \[S, B\]"),
        ({"weights": -torch.ones(3)}, ValueError, "weights must be >= 0, got -1"),
        ({"student_temp": 0.0}, ValueError, r"student_temp must be > 0 .*got 0\.0"),
        ({"teacher_temp": "warm"}, TypeError, "teacher_temp .*got str"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be >= 1 or None, got 0"),
        ({"chunk_rows": 1.5}, TypeError, "chunk_rows must be an int, got float"),
        ({"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ({"x_student": X.double(), "weight_student": W.double(), "impl": "triton"}, ValueError,
         "torch.float64"),
    ],
)  # fmt: skip
def test_invalid_arguments(changes, raises, match):
    arguments = dict(zip(Inputs._fields, (X, Y, W, W, C), strict=True)) | TEMPS | changes
    with pytest.raises(raises, match=match):
        linear_dino_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "raises", "match"),
    [
        ({"x_student": X}, ValueError, r"x_student must be \[N, D\], got shape \(4, 3, 6\)"),
        ({"x_teacher": Y[0, :2]}, ValueError, r"same number of rows, .*\(3, 6\) and \(2, 6\)"),
        ({"weights": torch.ones(4)}, ValueError, r"weights must be \[N\] = \[3\], got shape \[4\]"),
        ({"denominator": 0}, ValueError, "denominator must be > 0 .*got 0"),
        ({"denominator": math.nan}, ValueError, "denominator must be > 0 .*got nan"),
        ({"denominator": torch.ones(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
    ],
)
def test_invalid_arguments_of_the_patch_loss(changes, raises, match):
    arguments = dict(zip(Inputs._fields, (X[0], Y[0], W, W, C), strict=True)) | TEMPS | changes
    with pytest.raises(raises, match=match):
        linear_patch_loss(**arguments)

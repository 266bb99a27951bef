"""The CUDA path on a machine without a GPU: a simulated device runs what a run on a GPU does.

Code that would be wrong or slow on a GPU fails: tensors of different devices, waits of the host
in a step of --mode fast, pageable copies, missing waits between streams.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re

import fastdino_kernels
import pytest
import torch
from fastdino_kernels.compat import lightly, solo_learn, stable_pretraining

from fastdino import Trainer, checkpoint
from fastdino.models.head import DINOHead
from fastdino.models.vit import VIT_ARCHS
from fastdino.training.nonfinite import FiniteGuard
from tests.linear_layers import draw, error, run

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="simulates a GPU with Triton's interpreter, on machines without one",
)
if importlib.util.find_spec("triton") is not None:
    from tests.simulated_cuda.device import SimulatedCuda
    from tests.simulated_cuda.streams import CudaError

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def few_parameters(monkeypatch) -> None:
    """Shrink the networks: the interpreter takes 10 ms per parameter and step."""
    monkeypatch.setitem(VIT_ARCHS, "vit_nano", {"embed_dim": 32, "depth": 2, "num_heads": 2})
    widths = {"hidden_dim": 32, "bottleneck_dim": 16}
    monkeypatch.setattr(DINOHead.__init__, "__kwdefaults__", widths)


@pytest.fixture
def make_trainer(few_parameters, tiny):
    """A function that builds a Trainer of a small network."""

    def make(device: str = "cuda", steps_per_epoch: int = 100, **changes) -> Trainer:
        fixed = {"device": device, "compile": "off", "attention": "sdpa", "freeze_last_layer": 0}
        return Trainer(tiny(**fixed | changes), steps_per_epoch)

    return make


def pinned(crops: list[torch.Tensor]) -> list[torch.Tensor]:
    return [crop.pin_memory() for crop in crops]


def waits_in(gpu: SimulatedCuda, since: int) -> list[str]:
    """Return the functions' files in which the host waited since a number of waits."""
    return [wait.where.partition(":")[0] for wait in gpu.waits[since:]]


def on_other_stream(gpu):
    tensor = torch.ones(2, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        return tensor + 1


def write_while_read(gpu):
    side, tensor = torch.cuda.Stream(), torch.ones(2, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor + 1
    tensor.zero_()


def read_value(gpu):
    with gpu.no_wait():
        torch.ones(2, device="cuda").sum().item()


def select_by_mask(gpu):
    tensor = torch.ones(2, device="cuda")
    with gpu.no_wait():
        tensor[tensor > 0]


def copy_in_step(gpu):
    with gpu.no_wait():
        torch.ones(2).to("cuda")


def launch_on_cpu_tensor(gpu):
    center, logits = torch.zeros(8), torch.zeros(2, 3, 8, device="cuda")
    from fastdino_kernels import dino_loss

    dino_loss(logits, logits, center, student_temp=0.1, teacher_temp=0.1, impl="triton")


def rewrite_pinned(gpu):
    source = torch.ones(2).pin_memory()
    source.to("cuda", non_blocking=True)
    source.numpy()[:] = 2
    torch.cuda.synchronize()


def free_while_read(gpu):
    side, tensor = torch.cuda.Stream(), torch.ones(2, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor + 1
    del tensor


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (on_other_stream, "add.* on stream 1 may read before .*ones.* wait_stream or wait_event"),
        (write_while_read, "zero_.* writes memory that may still be in use by .*add"),
        (free_while_read, "freed while .*add.* on stream 1 may still run: record_stream"),
        (read_value, "_local_scalar_dense.* waits for the device"),
        (select_by_mask, "index.* waits for the device"),
        (copy_in_step, "copy of .* waits for the device"),
        (lambda gpu: torch.ones(2, device="cuda") + torch.ones(2), "to be on the same device"),
        (lambda gpu: torch.ones(2).to("cuda", non_blocking=True), "from memory that is not pinned"),
        (
            lambda gpu: torch.ones(4, 4).pin_memory().T.to("cuda", non_blocking=True),
            "from a pageable temporary copy",
        ),
        (rewrite_pinned, "pinned memory was rewritten while a copy on default stream 0"),
    ],
)
def test_the_simulation_reports_what_is_wrong_on_a_gpu(gpu, mistake, message):
    with contextlib.suppress(CudaError):
        mistake(gpu)
    assert re.search(message, "\n".join(gpu.faults)), gpu.faults
    gpu.faults.clear()


def test_a_wait_or_a_record_makes_the_same_code_right(gpu):
    side, tensor = torch.cuda.Stream(), torch.ones(2, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = tensor + 1
    tensor.record_stream(side)
    del tensor
    with pytest.raises(RuntimeError, match="invalid device ordinal 1"):
        torch.ones(2, device="cuda:1")
    with pytest.raises(AttributeError, match="wait_for_everything"):
        torch.cuda.wait_for_everything()
    torch.cuda.synchronize()
    assert result.tolist() == [2, 2]


def test_the_backward_pass_of_the_simulation_is_that_of_the_autograd_engine(gpu):
    generator = torch.Generator().manual_seed(0)
    results = []
    for device in ("cpu", "cuda"):
        generator.manual_seed(0)
        x, w, b = (torch.randn(shape, generator=generator) for shape in ((6, 5), (4, 5), (4,)))
        x, w, b = (leaf.to(device).requires_grad_() for leaf in (x, w, b))
        y = torch.nn.functional.linear(x, w, b).relu()
        y = torch.cat([y[:, :2] * y[:, 2:3], y.square().cumsum(1)], 1).unbind(1)
        loss = y[0].sum() + (y[1] * y[3]).mean() + y[5].half().float().logsumexp(0)
        grads = torch.autograd.grad(loss, [x, b], retain_graph=True)
        loss.backward()
        results.append([*grads, x.grad, w.grad, b.grad])
    for expected, actual in zip(*results, strict=True):
        assert actual.is_cuda
        assert torch.equal(actual.cpu(), expected)


def call_clip(gradient):
    parameter = torch.ones(8, device="cuda").requires_grad_()
    parameter.grad = torch.ones_like(parameter) if gradient else None
    for clip in (fastdino_kernels.clip_grad_norms_, fastdino_kernels.clip_grad_norm_):
        assert clip([parameter], 1.0).is_cuda


def patch_step(x: torch.Tensor) -> None:
    """Run a loss without logits forward and backward, all options on the device."""
    one, center, weights = (torch.ones(shape, device="cuda") for shape in ((), (4,), (4,)))
    loss, _ = fastdino_kernels.linear_patch_loss(
        x, x, x, x, center, student_temp=0.1, teacher_temp=one, weights=weights, denominator=one,
        chunk_rows=3,
    )  # fmt: skip
    loss.backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: call_clip(True),
        lambda x: call_clip(False),
        lambda x: fastdino_kernels.ema_update_([x], [x + 1], torch.full((), 0.5, device="cuda")),
        lambda x: fastdino_kernels.sinkhorn_knopp(x, torch.full((), 0.1, device="cuda")),
        lambda x: fastdino_kernels.sinkhorn_center(x[:0], 0.1),
        lambda x: fastdino_kernels.koleo_loss(x, topk=2),
        lambda x: patch_step(x.requires_grad_()),
        lambda x: patch_step(x.bfloat16().requires_grad_()),
        lambda x: fastdino_kernels.linear_sinkhorn_center(x, x[:3], 0.1, chunk_rows=2),
        lambda x: fastdino_kernels.gram_loss(x[None], x[None], per_image=False),
        lambda x: fastdino_kernels.teacher_entropy(x[None], x[0], 0.1),
    ],
)
def test_functions_of_the_kernel_package_do_not_wait(gpu, call):
    x = torch.randn(4, 8).to("cuda")
    with gpu.no_wait():
        call(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_without_logits_on_a_gpu_is_that_on_the_cpu(gpu, dtype):
    inputs = draw((7,), K=50, dtype=dtype)
    got = run(fastdino_kernels.linear_patch_loss, inputs, device="cuda", chunk_rows=2)
    expected = run(fastdino_kernels.linear_patch_loss, inputs, chunk_rows=2)
    limit = max(1e-5, 4 * torch.finfo(dtype).eps)  # the CPU rounds the gradients of each chunk
    assert all(error(*pair) < limit for pair in zip(got, expected, strict=True))
    assert gpu.products[dtype] >= 3 * 4  # two layers and a gradient, of 4 chunks


def lightly_losses():
    mask, temp = torch.ones(2, 1, 2, dtype=torch.bool).cuda(), torch.full((), 0.04).cuda()
    dino = lightly.DINOLoss(8).cuda()
    patch, all_patches = lightly.IBOTPatchLoss(8).cuda(), lightly.IBOTPlusPlusPatchLoss(8).cuda()

    def call(x, views):
        yield dino(views, list(views), temp)
        yield patch(x, x, mask)
        yield all_patches(views, views, mask, visible_loss_weight=0.5)
        yield lightly.KoLeoLoss()(x)

    return call


def solo_learn_losses():
    loss = solo_learn.DINOLoss(8, 0.04, 0.07, 0, 2).cuda()
    loss.epoch = -1

    def call(x, _):
        yield loss(x, x)
        loss.update_center(x)

    return call


def stable_pretraining_losses():
    loss = stable_pretraining.DINOv2Loss().cuda()

    def call(x, views):
        for _ in range(2):
            probs = loss.dino_loss.softmax_center_teacher(views, 0.04)
            loss.dino_loss.update_center(views)
        yield loss(views, probs, x, loss.ibot_loss.sinkhorn_knopp_teacher(x, 0.07))

    return call


@pytest.mark.parametrize(
    "make_losses", [lightly_losses, solo_learn_losses, stable_pretraining_losses]
)
def test_losses_of_other_repositories_do_not_wait(gpu, make_losses):
    x, losses = torch.randn(4, 8).to("cuda").requires_grad_(), make_losses()
    with gpu.no_wait():
        for loss in losses(x, x.view(2, 2, 8)):
            loss.backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("attempt", [1, 2])
def test_graphs_of_each_simulation_are_captured(gpu, attempt):
    x = torch.ones(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    torch.cuda.synchronize()
    graph.replay()
    assert x.tolist() == [2, 2]


# The training step.


BALANCED = {"centering": "sinkhorn", "koleo_weight": 0.1}


@pytest.mark.parametrize(
    ("mode", "precision", "loss_of"),
    [
        ("parity", "fp16", {}),
        ("parity", "bf16", {}),
        ("fast", "bf16", {}),
        ("fast", "fp16", {}),
        ("parity", "fp16", BALANCED),
    ],
)
def test_step_on_a_gpu_is_that_on_the_cpu(gpu, make_trainer, crops_of, mode, precision, loss_of):
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        trainer = make_trainer(device, mode=mode, amp_dtype=precision, packing="off", **loss_of)
        batches = [crops_of(trainer.config, i) for i in range(2)]
        steps = []
        for i, crops in enumerate(batches):
            if device == "cuda":
                gpu.products.clear()
            started = len(gpu.waits)
            steps.append(trainer.train_step(pinned(crops) if device == "cuda" else crops))
            if device == "cpu":
                continue
            # Only --mode parity checks each loss, and without a loss scale the gradients' norms.
            checks = {"fast": 0, "parity": 1 + (precision == "bf16")}[mode]
            allowed = ["fastdino/training/nonfinite.py"] * checks
            if i > 0:
                assert waits_in(gpu, started) == allowed
            koleo = {torch.float32} if loss_of else set()  # its dot products
            assert gpu.products.keys() == {HALF[precision]} | koleo
        losses[device] = [loss.item() for loss in steps]
        trainer.verify()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)
    kernels = {"pairwise_forward_kernel", "pairwise_backward_kernel"}
    kernels |= {"adamw_ema_kernel"} if mode == "fast" else {"scale_kernel", "ema_kernel"}
    kernels |= {"sinkhorn_columns_kernel", "sinkhorn_masses_kernel"} if loss_of else set()
    assert kernels <= set(gpu.launches)


@pytest.mark.parametrize("loss_of", [{}, BALANCED], ids=["paper", "sinkhorn and KoLeo"])
def test_graphed_step_is_the_eager_step(gpu, make_trainer, crops_of, loss_of):
    results = []
    for graphed in (False, True):
        settings = {"mode": "fast", "amp_dtype": "bf16", "warmup_epochs": 0} | loss_of
        trainer = make_trainer(cuda_graph=graphed, batch_size_per_gpu=2, **settings)
        launched = len(gpu.launches)  # the update's kernel also fills the cached last layer
        batches = [pinned(crops_of(trainer.config, i)) for i in range(7)]
        trainer.train_step(batches[0])
        with gpu.no_wait():
            losses = [trainer.train_step(crops) for crops in batches[1:4]]
        losses.append(trainer.train_step(batches[4]))  # captures a graph, which waits
        with gpu.no_wait():
            losses += [trainer.train_step(crops) for crops in batches[5:]]
        launched = gpu.launches[launched:].count("adamw_ema_kernel")
        assert launched == (5 if graphed else 7)  # two replays
        losses += trainer.terms.values()
        results.append(([x.item() for x in losses], trainer.state_dict()))
    (eager, eager_state), (replayed, replayed_state) = results
    assert replayed == eager
    for key in ("student", "teacher"):
        for name, tensor in eager_state[key].items():
            assert torch.equal(replayed_state[key][name], tensor), name


@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_attention_backend_is_probed_and_trains_on_a_gpu(
    gpu, emulated, make_trainer, crops_of, backend
):
    losses = []
    for name in ("sdpa", backend):
        trainer = make_trainer(attention=name, amp_dtype="bf16")
        assert trainer.runtime.attention.value == name
        losses.append(trainer.train_step(pinned(crops_of(trainer.config, 0))).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_check_of_a_checkpoint_waits_once(gpu, make_trainer):
    state = make_trainer(mode="fast", amp_dtype="bf16").state_dict()
    before = len(gpu.waits)
    checkpoint.check_finite(state)
    assert waits_in(gpu, before) == ["fastdino/checkpoint.py"]


def item_in_step(monkeypatch):
    watch_loss = FiniteGuard.watch_loss
    monkeypatch.setattr(
        FiniteGuard, "watch_loss", lambda guard, loss: watch_loss(guard, loss * loss.item())
    )


def center_on_cpu(monkeypatch):
    monkeypatch.setattr("fastdino.training.trainer.DINOLoss.to", lambda loss, device: loss)


def autocast_of_cpu(monkeypatch):
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, *rest: autocast("cpu", *rest))


def pageable_crops(monkeypatch):
    monkeypatch.setattr("tests.test_cuda_path.pinned", lambda crops: crops)


@pytest.mark.parametrize(
    ("break_step", "message"),
    [
        (item_in_step, "_local_scalar_dense.* waits for the device .at tests/test_cuda_path.py"),
        (center_on_cpu, "must be on the same device, got cpu and cuda:0"),
        (pageable_crops, "memory that is not pinned .at fastdino/training/trainer.py"),
        (autocast_of_cpu, "torch.float32"),
    ],
)
def test_mistake_in_the_step_is_reported(
    gpu, make_trainer, crops_of, monkeypatch, break_step, message
):
    def step() -> None:
        trainer = make_trainer(mode="fast", amp_dtype="bf16")
        trainer.train_step(pinned(crops_of(trainer.config, 0)))
        with gpu.no_wait():
            trainer.train_step(pinned(crops_of(trainer.config, 1)))
        assert gpu.products.keys() == {torch.bfloat16}

    break_step(monkeypatch)
    with pytest.raises((CudaError, ValueError, AssertionError), match=message):
        step()
    gpu.faults.clear()


def test_graphed_step_without_a_wait_between_streams_is_reported(gpu, make_trainer, crops_of):
    trainer = make_trainer(mode="fast", amp_dtype="bf16", cuda_graph=True)
    trainer._run_step._stream.wait_stream = lambda stream: None
    with pytest.raises(CudaError, match="wait_stream or wait_event is missing"):
        trainer.train_step(pinned(crops_of(trainer.config, 0)))
    gpu.faults.clear()

"""The CUDA path on a machine without a GPU: a simulated device runs what a run on a GPU does.

Code that would be wrong or slow on a GPU fails: tensors of different devices, waits of the host
in a step of --mode fast, pageable copies, missing waits between streams.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import re
from collections import deque
from collections.abc import Iterator

import fastdino_kernels
import pytest
import torch
from fastdino_kernels.compat import lightly, solo_learn, stable_pretraining
from fastdino_kernels.multi_crop import normalized_levels

from fastdino import Trainer, checkpoint
from fastdino.data import loader_fused
from fastdino.models import attention
from fastdino.models.head import DINOHead
from fastdino.models.vit import VIT_ARCHS
from fastdino.training.nonfinite import FiniteGuard
from tests.commands import write_colours
from tests.linear_layers import draw, error, run
from tests.loaders import assert_same, build_loader, make_config, needs_dali, photo

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="simulates a GPU with Triton's interpreter, on machines without one",
)
if importlib.util.find_spec("triton") is not None:
    from tests.simulated_cuda.device import SimulatedCuda, Stream
    from tests.simulated_cuda.install import simulate_cuda
    from tests.simulated_cuda.streams import CudaError

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def gpu() -> Iterator[SimulatedCuda]:
    with simulate_cuda() as device:
        yield device
    attention.token_layout.cache_clear()  # their tensors are on the simulated device
    normalized_levels.cache_clear()


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
        launched = len(gpu.launches)
        settings = {"mode": "fast", "amp_dtype": "bf16", "warmup_epochs": 0} | loss_of
        trainer = make_trainer(cuda_graph=graphed, **settings)
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


# Loaders.

SMALL = {
    "global_crops_size": 8, "local_crops_size": 4, "local_crops_number": 1,
    "batch_size_per_gpu": 2, "num_workers": 2,
}  # fmt: skip
LAST = 6  # the step from which three batches remain


@pytest.fixture
def nvjpeg(gpu, monkeypatch):
    fake = pytest.importorskip("tests.simulated_cuda.dali")
    monkeypatch.setattr(
        "fastdino.data.dali_decoding._pipeline", functools.partial(fake.FakeNvjpeg, gpu)
    )


def used_on_the_gpu(loader, start_step: int = LAST) -> list[list[torch.Tensor]]:
    """Return the crops after the main thread's stream has used them, and close the loader."""
    with contextlib.closing(loader):
        used = [
            [crop.to("cuda", non_blocking=True) * 1 for crop in batch]
            for batch in loader.epoch(0, start_step)
        ]
    return [[crop.cpu() for crop in batch] for batch in used]


@pytest.mark.parametrize(
    ("crops", "decode"),
    [
        ("torchvision", "auto"),
        ("fused", "pillow"),
        pytest.param("fused", "gpu", marks=needs_dali),
    ],
)
def test_loader_hands_exact_crops_over_to_the_step(gpu, photos, request, crops, decode):
    if decode == "gpu":
        request.getfixturevalue("nvjpeg")
    sizes = SMALL | {"num_workers": 0 if crops == "torchvision" else 2}
    expected = list(build_loader(make_config(**SMALL | {"num_workers": 0}), photos).epoch(0, LAST))
    loader = build_loader(make_config(crops=crops, decode=decode, **sizes), photos, device="cuda")
    assert_same(used_on_the_gpu(loader), expected)
    if crops == "fused":
        assert all("cuda" in part for part in loader.description.split(" on ")[1:2])
        assert all(kernel.startswith("multi_crop_") for kernel in gpu.launches)


@needs_dali
def test_dali_loader_hands_its_crops_over_to_the_step(gpu, photos, monkeypatch):
    dali = importlib.import_module("fastdino.augmentation.dali")
    fake = importlib.import_module("tests.simulated_cuda.dali")
    config = make_config(crops="dali", **SMALL)
    expected = [[c.clone() for c in batch] for batch in build_loader(config, photos).epoch(0, LAST)]
    pipeline = functools.partial(fake.FakeCropPipeline, gpu, dali.crop_pipeline)
    monkeypatch.setattr(dali, "crop_pipeline", pipeline)
    assert_same(used_on_the_gpu(build_loader(config, photos, device="cuda")), expected)


def without_record_stream(monkeypatch, loader):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)


def without_wait_event(monkeypatch, loader):
    monkeypatch.setattr(Stream, "wait_event", lambda *_: None)


def without_wait_for_copies(monkeypatch, loader):
    never = property(lambda _: None, lambda *_: None)
    monkeypatch.setattr(loader_fused._Staging, "_copied", never, raising=False)


def without_held_images(monkeypatch, loader):
    loader._backend._held = deque(maxlen=0)


@pytest.mark.parametrize(
    ("break_loader", "message"),
    [
        (without_record_stream, "record_stream is missing"),
        (without_wait_event, "wait_stream or wait_event is missing"),
        (without_wait_for_copies, "pinned memory was rewritten while a copy on stream 1"),
        pytest.param(
            without_held_images, "allocated on DALI's stream was freed while .*multi_crop",
            marks=needs_dali,
        ),
    ],
)  # fmt: skip
def test_mistake_in_the_fused_loader_is_reported(
    gpu, photos, monkeypatch, request, break_loader, message
):
    decode = "pillow"
    if break_loader is without_held_images:
        decode = "gpu"
        request.getfixturevalue("nvjpeg")
    monkeypatch.setattr(gpu, "launch_kernel", lambda *_: None)  # the pixels do not matter
    config = make_config(crops="fused", decode=decode, **SMALL)
    loader = build_loader(config, photos, device="cuda")
    break_loader(monkeypatch, loader)
    with contextlib.suppress(CudaError):
        used_on_the_gpu(loader, 0)
    with contextlib.suppress(CudaError):
        gpu.check_copies(finished=True)
    assert any(re.search(message, fault) for fault in gpu.faults), gpu.faults
    gpu.faults.clear()


# Evaluations.


def on_both(gpu, run, *words) -> list[tuple[int, str, str]]:
    """Run a command on the CPU and on the GPU, and check that it used the latter."""
    results = [run(*words, "--device", "cpu")]
    before = len(gpu.waits)
    results.append(run(*words, "--device", "cuda"))
    assert len(gpu.waits) > before
    assert [status for status, *_ in results] == [0, 0], results
    return results


def test_knn_on_a_gpu_is_that_on_the_cpu(gpu, run_nano, tmp_path):
    root = write_colours(tmp_path)
    words = [
        "--data_path",
        root,
        "--resize",
        36,
        "--crop",
        32,
        "--num_workers",
        0,
        "--nb_knn",
        1,
        3,
    ]
    cpu, cuda = on_both(gpu, run_nano, "knn", *words, "--batch_size_per_gpu", 5)
    assert cuda == cpu
    assert "3-NN classifier result" in cuda[1]


def test_attention_on_a_gpu_is_that_on_the_cpu(gpu, run_nano, tmp_path):
    photo(0).save(tmp_path / "photo.png")
    words = ["--image_path", tmp_path / "photo.png", "--image_size", 32, 48]
    words += ["--output_dir", tmp_path / "out"]
    statistics = []
    for device in ("cpu", "cuda"):
        status, _, error = run_nano("attention", *words, "--device", device)
        assert status == 0, error
        (image,) = json.loads((tmp_path / "out/attention.json").read_text())["images"]
        statistics.append(
            [value for head in image["heads"] for value in (*head.pop("peak"), *head.values())]
        )
    assert statistics[1] == pytest.approx(statistics[0], rel=1e-4)
    assert gpu.waits


def test_linear_probe_on_a_gpu_is_that_on_the_cpu(gpu, run_nano, tmp_path):
    words = ["--data_path", write_colours(tmp_path), "--num_workers", 0, "--epochs", 2]
    words += ["--batch_size_per_gpu", 4]
    logs = []
    for device in ("cpu", "cuda"):
        status, _, error = run_nano(
            "linear", *words, "--output_dir", tmp_path / device, "--device", device
        )
        assert status == 0, error
        lines = (tmp_path / device / "log.txt").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert logs[1] == [pytest.approx(epoch, rel=1e-4) for epoch in logs[0]]
    assert any(wait.where.startswith("fastdino/evals/linear_probe.py") for wait in gpu.waits)

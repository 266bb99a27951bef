"""Settings whose effect needs a GPU, which is simulated, several ranks, or a compiler."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from fastdino import Trainer, checkpoint
from fastdino.models import attention, linear_layer, matmul_attention
from fastdino.models.head import DINOHead
from fastdino.models.vit import VIT_ARCHS
from fastdino.training.cuda_graph import GraphedStep
from tests.flag_effects import RANK_1, TWO_RANKS
from tests.loaders import build_loader, make_config, needs_dali
from tests.processes import run_two
from tests.test_settings_effect import ELSEWHERE
from tests.tiny_runs import train_tiny, write_pictures

TESTED_HERE = set()
simulated = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="simulates a GPU with Triton's interpreter, on machines without one",
)


def effect_of(*names: str) -> Callable[[Any], Any]:
    """Mark a test as that of these settings."""
    TESTED_HERE.update(names)
    return lambda test: test


@pytest.fixture
def gpu() -> Iterator[Any]:
    from tests.simulated_cuda.install import simulate_cuda

    with simulate_cuda() as device:
        yield device
    attention.token_layout.cache_clear()  # their tensors are on the simulated device


@pytest.fixture
def make_trainer(monkeypatch, tiny) -> Callable[..., Trainer]:
    """A function that builds a Trainer of a narrow network."""
    monkeypatch.setitem(VIT_ARCHS, "vit_nano", {"embed_dim": 32, "depth": 2, "num_heads": 2})
    widths = {"hidden_dim": 32, "bottleneck_dim": 16}
    monkeypatch.setattr(DINOHead.__init__, "__kwdefaults__", widths)

    def make(**changes: Any) -> Trainer:
        fixed = {"device": "cuda", "compile": "off", "attention": "sdpa", "warmup_epochs": 0}
        return Trainer(tiny(**fixed | changes), 2)

    return make


@effect_of("use_fp16")
@simulated
def test_use_fp16_selects_the_precision_of_the_products(gpu, make_trainer, crops_of):
    losses = []
    for use, dtype in ((True, torch.float16), (False, torch.float32)):
        trainer = make_trainer(use_fp16=use)
        gpu.products.clear()
        crops = [crop.pin_memory() for crop in crops_of(trainer.config, 0)]
        losses.append(trainer.train_step(crops).item())
        assert gpu.products.keys() == {dtype}
        assert trainer.scaler.is_enabled() is use
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@effect_of("attention")
@simulated
def test_attention_selects_the_backend(gpu, emulated, make_trainer, crops_of, monkeypatch):
    varlen = importlib.import_module("torch.nn.attention.varlen")
    calls, real = [], varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args: calls.append(1) or real(*args))
    losses, counts = [], []
    for name in ("sdpa", "varlen"):
        trainer = make_trainer(attention=name, amp_dtype="bf16")
        calls.clear()  # those that test the backend
        crops = [crop.pin_memory() for crop in crops_of(trainer.config, 0)]
        losses.append(trainer.train_step(crops).item())
        counts.append(len(calls))
    assert counts == [0, 4]  # two blocks of two networks
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@effect_of("attention")
def test_attention_selects_the_backend_on_a_cpu(make_trainer, crops_of, monkeypatch):
    calls, real = [], matmul_attention._MatmulAttention.apply
    monkeypatch.setattr(
        matmul_attention._MatmulAttention, "apply", lambda *qkv: calls.append(1) or real(*qkv)
    )
    losses, counts = [], []
    for name in ("sdpa", "matmul"):
        trainer = make_trainer(attention=name, device="cpu")
        calls.clear()  # those that test the backend
        losses.append(trainer.train_step(crops_of(trainer.config, 0)).item())
        counts.append(len(calls))
    assert counts == [0, 6]  # two blocks; the student has two sizes of crops, the teacher one
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@effect_of("cuda_graph")
@simulated
def test_cuda_graph_replays_the_step(gpu, make_trainer):
    """test_cuda_path.py compares the replayed steps with the eager ones."""
    settings = {"mode": "fast", "amp_dtype": "bf16"}
    steps = [make_trainer(**settings, cuda_graph=on)._run_step for on in (False, True)]
    assert [isinstance(step, GraphedStep) for step in steps] == [False, True]


@effect_of("hw_decoder_load")
@needs_dali
@simulated
def test_hw_decoder_load_reaches_the_decoder(gpu, photos, monkeypatch):
    from tests.simulated_cuda.dali import FakeNvjpeg

    loads = []

    def pipeline(options: dict[str, Any], **settings: Any) -> FakeNvjpeg:
        loads.append(options["hw_decoder_load"])
        return FakeNvjpeg(gpu, options, **settings)

    monkeypatch.setattr("fastdino.data.dali_decoding._pipeline", pipeline)
    for load in (0.65, 0.25):
        config = make_config(crops="fused", decode="gpu", hw_decoder_load=load)
        build_loader(config, photos, device="cuda").close()
    assert loads == [0.65, 0.25]


@effect_of("compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised by Dynamo
def test_compile_traces_blocks_and_head(make_trainer, crops_of, monkeypatch):
    """The graphs run without generated code, which test_compile_gates.py and others measure."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    losses, graphs = [], []
    for compiled in ("off", "on"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make_trainer(device="cpu", compile=compiled)
        losses.append(trainer.train_step(crops_of(trainer.config, 0)).item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    # Student and teacher: a block, a last block and a head.
    assert graphs == [0, 6]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@effect_of("onednn")
@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="no oneDNN")
def test_onednn_computes_the_products(make_trainer, crops_of, monkeypatch):
    assert linear_layer.onednn_problem() is None  # computes products, once
    calls, product = [], linear_layer._product
    monkeypatch.setattr(
        linear_layer, "_product", lambda *inputs: calls.append(inputs) or product(*inputs)
    )
    numbers = []
    for mode in ("parity", "fast"):
        for onednn in ("off", "on"):
            trainer = make_trainer(device="cpu", mode=mode, use_fp16=False, onednn=onednn)
            trainer.train_step(crops_of(trainer.config, 0))
            numbers.append(len(calls))
            calls.clear()
    assert numbers[::2] == [0, 0]
    assert numbers[1] == numbers[3] > 0


def train_in_ranks(root: Path) -> None:
    """Train twice, with other rendezvous URLs, and with --fsdp; save the weights."""
    for name, changes in (("first", {}), ("second", {"fsdp": True})):
        settings = {"batch_size_per_gpu": 2, "dist_url": f"file://{root}/meet-{name}"} | changes
        with pytest.MonkeyPatch.context() as patch:
            run = train_tiny(patch, root / "images", root / name, settings)
        assert run.error is None, run.error
        sharded = {isinstance(p, DTensor) for p in run.trainer.student.parameters()}
        assert sharded == {"fsdp" in changes}


@effect_of("fsdp", "dist_url")
def test_fsdp_shards_the_parameters_and_ranks_meet_at_dist_url(tmp_path):
    write_pictures(tmp_path / "images")
    run_two(train_in_ranks, tmp_path)
    assert {path.name for path in tmp_path.glob("meet-*")} == {"meet-first", "meet-second"}
    whole, sharded = (
        checkpoint.load(tmp_path / name / "checkpoint.pth")["student"]
        for name in ("first", "second")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-4)


@effect_of("dist_timeout_minutes")
def test_dist_timeout_minutes_limits_the_wait_for_rank_0(tmp_path, monkeypatch):
    for name, value in (TWO_RANKS | RANK_1).items():
        monkeypatch.setenv(name, value)
    write_pictures(tmp_path / "images")
    run = train_tiny(
        monkeypatch, tmp_path / "images", tmp_path / "run", {"dist_timeout_minutes": 0.005}
    )
    assert "no answer for 0.3 s" in str(run.error)


def test_every_setting_has_a_test():
    assert TESTED_HERE == ELSEWHERE

"""--mode fast: the same training as parity, without a host sync per step."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino import Trainer, cpu_speed
from fastdino.models import backbones
from fastdino.models.head import DINOHead

STEPS = 3  # per epoch
COMPILE = torch.compile
small = pytest.mark.usefixtures("small_networks")


@pytest.fixture
def fast(tiny):
    """Build the config of a small run in --mode fast, without compilation."""

    def make(**overrides):
        return tiny(**({"mode": "fast", "compile": "off"} | overrides))

    return make


@small
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_last_layer": False, "freeze_last_layer": 2, "clip_grad": 0.05},
        {"use_bn_in_head": True, "clip_grad": 0.0, "freeze_last_layer": 0},
        {"batch_size_per_gpu": 2, "grad_accum": 2, "packing": "on"},
        {"optimizer": "sgd"},
        {"centering": "sinkhorn", "koleo_weight": 0.1},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_fast_mode_trains_like_parity(float64, tiny, fast, settings, crops_of):
    ours = Trainer(fast(**settings), steps_per_epoch=2)
    theirs = Trainer(tiny(**settings), steps_per_epoch=2)
    for i in range(6):
        crops = crops_of(ours.config, i)
        expected = theirs.train_step(crops).item()
        assert ours.train_step(crops).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(ours.loss.center, theirs.loss.center, rtol=1e-9, atol=1e-12)
    for name in ("student", "teacher"):
        got, expected = (getattr(trainer, name).state_dict() for trainer in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


def flat(network):
    """Return all weights of a network as one vector."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_bf16_on_a_cpu_is_parity_within_rounding(monkeypatch, tiny, fast, crops_of):
    """The gradient is as near to fp32 as that of bf16 with PyTorch's own attention."""
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: 3.0)
    monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: 3.0)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    sizes = {"embed_dim": 64, "depth": 3, "num_heads": 2}
    monkeypatch.setitem(backbones.VIT_ARCHS, "vit_nano", sizes)
    unclipped = {"clip_grad": 0.0}
    configs = tiny(**unclipped), fast(**unclipped), fast(**unclipped, attention="sdpa")
    trainers = [Trainer(config, steps_per_epoch=STEPS) for config in configs]
    chosen = trainers[1].runtime
    assert (chosen.precision.value, chosen.attention.value) == ("bf16", "matmul")
    start = copy.deepcopy(trainers[0])
    losses, gradients = [], []
    for trainer in trainers:
        losses.append(trainer.train_step(crops_of(trainer.config, 0)).item())
        parts = [p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
        assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
        assert trainer.loss.center.dtype == torch.float32
    assert losses[1:] == [pytest.approx(losses[0], rel=0.01)] * 2
    ours, plain = ((g - gradients[0]).norm() / gradients[0].norm() for g in gradients[1:])
    assert 0 < ours < 1.2 * plain < 0.1
    torch.testing.assert_close(
        trainers[1].loss.center, trainers[0].loss.center, rtol=0.02, atol=1e-3
    )
    for step in range(1, 2 * STEPS):  # the learning rate rises from 0
        losses = [trainer.train_step(crops_of(trainer.config, step)).item() for trainer in trainers]
        assert losses[1:] == [pytest.approx(losses[0], rel=0.02)] * 2
    for name in ("student", "teacher"):
        begin, parity, *ours = (flat(getattr(trainer, name)) for trainer in (start, *trainers))
        moved = (parity - begin).norm()
        assert all((x - parity).norm() < 0.05 * moved for x in ours)


@small
@pytest.mark.parametrize("first", ["fast", "parity"])
def test_checkpoint_resumes_in_the_other_mode(float64, fast, first, crops_of):
    second = {"fast": "parity", "parity": "fast"}[first]
    uninterrupted = Trainer(fast(mode=first), steps_per_epoch=2)
    for i in range(3):
        uninterrupted.train_step(crops_of(uninterrupted.config, i))
    other = Trainer(fast(mode=second, seed=5), steps_per_epoch=2)
    other.load_state_dict(copy.deepcopy(uninterrupted.state_dict()))
    for i in (3, 4):
        expected = uninterrupted.train_step(crops_of(uninterrupted.config, i)).item()
        assert other.train_step(crops_of(uninterrupted.config, i)).item() == pytest.approx(
            expected, rel=1e-9
        )


def unit_rows(layer):
    """Return the weight that the optimizer should have written."""
    return torch.nn.functional.normalize(layer.weight_v.double(), dim=1)


@small
def test_bf16_update_writes_the_normalised_last_layer_of_the_teacher(fast, crops_of):
    trainer = Trainer(fast(amp_dtype="bf16", freeze_last_layer=0), steps_per_epoch=STEPS)
    layer = trainer.teacher.head.last_layer
    address = layer.cached_weight.data_ptr()
    for i in range(2):
        torch.testing.assert_close(
            layer.cached_weight.double(), unit_rows(layer), rtol=2**-8, atol=1e-9
        )
        trainer.train_step(crops_of(trainer.config, i))
        before = layer.cached_weight.clone()
    poisoned = crops_of(trainer.config, 2)
    poisoned[0][0, 0, 0, 0] = math.nan
    trainer.train_step(poisoned)
    assert torch.equal(layer.cached_weight, before)
    other = Trainer(fast(amp_dtype="bf16", seed=5), steps_per_epoch=STEPS)
    other.teacher.load_state_dict(trainer.teacher.state_dict())
    torch.testing.assert_close(
        other.teacher.head.last_layer.cached_weight, before, rtol=2**-7, atol=1e-9
    )
    assert layer.cached_weight.data_ptr() == address
    assert "head.last_layer.cached_weight" not in trainer.teacher.state_dict()
    assert trainer.student.head.last_layer.cached_weight is None


def test_resumed_trainer_has_the_bits_of_the_written_last_layer(
    monkeypatch, small_networks, fast, crops_of
):
    """Another way to normalise it rounds about one value in 100,000 differently."""
    settings = {"hidden_dim": 32, "bottleneck_dim": 256}
    monkeypatch.setattr(DINOHead.__init__, "__kwdefaults__", settings)
    config = fast(amp_dtype="fp16", freeze_last_layer=0, warmup_epochs=0, out_dim=4096)
    trainer, other = (Trainer(config, steps_per_epoch=STEPS) for _ in range(2))
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    for i in range(2):
        written, loaded = (t.teacher.head.last_layer.cached_weight for t in (trainer, other))
        assert torch.equal(written, loaded)
        trainer.train_step(crops_of(config, i))
        other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert torch.equal(written, loaded)


def test_written_last_layer_is_used_only_under_autocast(fast):
    trainer = Trainer(fast(amp_dtype="bf16"), steps_per_epoch=STEPS)
    head = trainer.teacher.head
    x = torch.randn(6, head.in_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = head(x)
        with torch.autocast("cpu", torch.bfloat16):
            written = head(x)
            head.last_layer.cached_weight.zero_()
            assert not head(x).any()
        torch.testing.assert_close(head(x), plain)
    torch.testing.assert_close(written.float(), plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "settings", [{}, {"mode": "parity"}, {"norm_last_layer": False}, {"optimizer": "sgd"}]
)
def test_last_layer_is_not_written_in_other_settings(fast, settings):
    amp_dtype = "bf16" if settings else "auto"
    trainer = Trainer(fast(amp_dtype=amp_dtype, **settings), steps_per_epoch=STEPS)
    assert trainer.teacher.head.last_layer.cached_weight is None


@small
def test_scaler_skips_fp16_steps_that_overflow(monkeypatch, fast, crops_of):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    trainer = Trainer(fast(amp_dtype="fp16"), steps_per_epoch=STEPS)
    weight = trainer.student.head.mlp[0].weight
    before = weight.detach().clone()
    trainer.train_step(crops_of(trainer.config, 0))
    trainer.verify()
    assert torch.equal(weight, before)
    assert trainer.scaler.get_scale() == 2.0**59


def recorder(base, hook, names, calls):
    """Make a PyTorch mode that appends to `calls` each called function that is in `names`."""

    def record(self, function, types, args=(), kwargs=None):
        name = getattr(getattr(function, "overloadpacket", function), "__name__", "")
        if name in names.split():
            calls.append(name)
        return function(*args, **(kwargs or {}))

    return type("Recorder", (base,), {hook: record})()


@pytest.mark.parametrize(("mode", "waits"), [("fast", False), ("parity", True)])
def test_only_parity_steps_wait_for_the_device(monkeypatch, fast, mode, waits, crops_of):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FASTDINO_KERNELS", "triton")
    # Small networks, as Triton's interpreter is slow.
    small = functools.partial(DINOHead, hidden_dim=16, bottleneck_dim=8)
    monkeypatch.setattr(backbones, "DINOHead", small)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    monkeypatch.setitem(backbones.VIT_ARCHS, "vit_nano", sizes)
    trainer = Trainer(fast(mode=mode, freeze_last_layer=0), steps_per_epoch=STEPS)
    trainer.train_step(crops_of(trainer.config, 0))
    crops = crops_of(trainer.config, 1)
    names = "tolist item __bool__ __float__ __int__ cpu numpy"
    operators, calls = "_local_scalar_dense is_nonzero nonzero equal", []
    with (
        recorder(TorchFunctionMode, "__torch_function__", names, calls),
        recorder(TorchDispatchMode, "__torch_dispatch__", operators, calls),
    ):
        trainer.train_step(crops)
    assert bool(calls) == waits, calls


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from PyTorch's tracing
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_compute_the_same_loss(float64, monkeypatch, fast, backend, crops_of):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    sizes = {"embed_dim": 16, "depth": 3, "num_heads": 2}
    monkeypatch.setitem(backbones.VIT_ARCHS, "vit_nano", sizes)
    torch._dynamo.reset()
    settings = {"drop_path_rate": 0.3, "packing": "on", "koleo_weight": 0.1}
    compiled = Trainer(fast(**settings, compile="on"), steps_per_epoch=STEPS)
    eager = Trainer(fast(**settings), steps_per_epoch=STEPS)
    for i in range(3):
        crops = crops_of(eager.config, i)
        losses = []
        for trainer in (compiled, eager):
            torch.manual_seed(i)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                losses.append(trainer.train_step(crops).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert compiled.student.state_dict().keys() == eager.student.state_dict().keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.usefixtures("one_process_group")
def test_ddp_does_not_split_compiled_blocks(monkeypatch, fast, crops_of):
    """By default Dynamo splits a graph at DDP's gradient buckets, of 1 MB at first."""
    monkeypatch.setitem(
        backbones.VIT_ARCHS, "vit_nano", {"embed_dim": 192, "depth": 2, "num_heads": 3}
    )
    graphs = []
    for parallel in (False, True):
        counter = CompileCounterWithBackend("eager")
        monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=counter))
        torch._dynamo.reset()
        trainer = Trainer(fast(compile="on"), steps_per_epoch=STEPS)
        if parallel:
            trainer._forward_student = torch.nn.parallel.DistributedDataParallel(trainer.student)
        trainer.train_step(crops_of(trainer.config, 0))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


@small
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("recompute", ["on", "off"])
def test_recompute_changes_the_compiler_config_of_its_blocks_only(
    monkeypatch, fast, crops_of, recompute
):
    """Other compiled code in the process keeps the default config."""
    seen = []

    def inductor(graph, inputs):
        seen.append(torch._functorch.config.ban_recompute_materialized_backward)
        return graph

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: inductor)
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="eager"))
    trainer = Trainer(fast(compile="on", recompute=recompute), steps_per_epoch=STEPS)
    trainer.train_step(crops_of(trainer.config, 0))
    assert set(seen) == ({False} if recompute == "on" else set())
    assert torch._functorch.config.ban_recompute_materialized_backward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("freeze", "compiled"), [(0, "off"), (1, "off"), (1, "on")], ids=["eager", "frozen", "compiled"]
)
def test_captured_step_trains_like_an_eager_one(fast, freeze, compiled, crops_of):
    settings = {
        "amp_dtype": "bf16", "epochs": 4, "freeze_last_layer": freeze, "device": "cuda",
        "compile": compiled, "drop_path_rate": 0.3,
    }  # fmt: skip
    eager = Trainer(fast(**settings), steps_per_epoch=5)
    graphed = Trainer(fast(**settings, cuda_graph=True), steps_per_epoch=5)
    assert graphed.runtime.cuda_graph.on
    for i in range(16):
        crops = crops_of(eager.config, i)
        torch.manual_seed(i)  # a replay must draw the same random numbers
        expected = eager.train_step(crops).item()
        torch.manual_seed(i)
        assert graphed.train_step(crops).item() == pytest.approx(expected, rel=1e-3)
        assert (graphed.entropy is None) == (eager.entropy is None)
    graphed.verify()
    other = Trainer(fast(**settings, cuda_graph=True, seed=3), steps_per_epoch=5)
    other.load_state_dict(graphed.state_dict())
    for i in range(16, 20):
        crops = crops_of(eager.config, i)
        torch.manual_seed(i)
        expected = graphed.train_step(crops).item()
        torch.manual_seed(i)
        assert other.train_step(crops).item() == pytest.approx(expected, rel=1e-3)

"""Linear layers by oneDNN: their results, where they apply, and when --mode fast takes them."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino import Trainer, cpu_speed, distributed, runtime
from fastdino.bench.flops import executed_flops
from fastdino.errors import ConfigError
from fastdino.models import linear_layer as module
from fastdino.models.attention import AttentionInputs
from fastdino.models.linear_layer import linear, onednn_problem, product
from fastdino.runtime import Choice, choose_onednn, resolve_runtime
from tests.processes import run_two

CPU = torch.device("cpu")
ONEDNN_SPEEDUP = cpu_speed.onednn_speedup
PRODUCTS = ("mm", "addmm", "_linear_pointwise")
pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN"
)


class Calls(TorchDispatchMode):
    """Counts the products: {operator: calls}."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            self.number[name] += 1
        return function(*args, **(kwargs or {}))


def leaves(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (37, 192), (3, 5, 24), (0, 8), (2, 0, 8), (8,)], ids=str)
def test_results_are_those_of_float64(shape, with_bias):
    x, weight, bias = leaves(shape, (2 * shape[-1] + 1, shape[-1]), (2 * shape[-1] + 1,))
    inputs = (x, weight, bias) if with_bias else (x, weight)
    y = linear(*inputs, onednn=True)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(y, inputs, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = F.linear(*exact)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for got, want in zip((y, *gradients), (expected, *wanted), strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_parts_of_a_weight_and_strided_rows_are_multiplied():
    x, weight, bias = leaves((6, 8), (12, 8), (12,))
    parts = weight.split((4, 8))
    got = linear(x[::2], parts[1], bias[4:], onednn=True)
    torch.testing.assert_close(got, (x[::2] @ parts[1].T + bias[4:]))
    dy = torch.ones(1, 1).expand(3, 8)
    torch.testing.assert_close(product(dy, parts[1], onednn=True), dy @ parts[1])


def test_only_gradients_that_are_needed_are_computed():
    x, weight, bias = leaves((6, 8), (12, 8), (12,))
    weight.requires_grad_(False)
    with Calls() as calls:
        linear(x, weight, bias, onednn=True).sum().backward()
        linear(x.detach(), weight, bias, onednn=True).sum().backward()
        with torch.no_grad():
            assert not linear(x, weight, bias, onednn=True).requires_grad
    assert calls.number == {"_linear_pointwise": 4}


@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_a_frozen_weight_keeps_only_what_its_gradient_needs(frozen):
    x, weight, bias = leaves((6, 8), (12, 8), (12,))
    (weight if frozen == "weight" else x).requires_grad_(False)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, bias, onednn=True)
    kept = weight if frozen == "weight" else x
    assert [tensor.data_ptr() for tensor in saved] == [kept.data_ptr()]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:FutureWarning")
def test_transformations_and_traces_use_pytorchs_blas(monkeypatch):
    monkeypatch.setattr(module, "_product", None)
    x, weight, bias = (tensor.detach() for tensor in leaves((6, 8), (12, 8), (12,)))

    def layer(x):
        return linear(x, weight, bias, onednn=True)

    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(torch.vmap(layer)(x[:, None])[:, 0], expected)
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(6, 8))
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x), expected)
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    assert torch.equal(layer(nested).values(), expected)


@pytest.mark.parametrize("onednn", [True, False])
def test_wrong_shapes_and_dtypes_are_pytorchs_errors(onednn):
    x, weight, bias = (tensor.detach() for tensor in leaves((6, 8), (12, 7), (12,)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight, bias, onednn=onednn)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, torch.zeros(12, 8, dtype=torch.float64), bias, onednn=onednn)
    assert linear(x, torch.zeros(0, 8), onednn=onednn).shape == (6, 0)


@pytest.mark.parametrize("default", ["float64", "meta"])
def test_the_check_does_not_depend_on_defaults(default):
    before = torch.get_default_dtype()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        assert onednn_problem.__wrapped__() is None
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("dtype", "context"),
    [
        (torch.float64, nullcontext()),
        (torch.bfloat16, nullcontext()),
        (torch.float32, torch.autocast("cpu", torch.bfloat16)),
    ],
    ids=["float64", "bf16", "autocast"],
)
def test_other_precisions_use_pytorchs_blas(dtype, context):
    x, weight, bias = (tensor.detach().to(dtype) for tensor in leaves((6, 8), (12, 8), (12,)))
    with context, Calls() as calls:
        got = linear(x, weight, bias, onednn=True)
        product(x, weight.T, onednn=dtype == torch.bfloat16)
        assert torch.equal(got, F.linear(x, weight, bias))
    assert "_linear_pointwise" not in calls.number


def test_compiled_code_uses_pytorchs_blas(monkeypatch):
    monkeypatch.setattr(module, "_product", None)
    x, weight, bias = leaves((6, 8), (12, 8), (12,))
    compiled = torch.compile(
        lambda *inputs: linear(*inputs, onednn=True), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


def test_a_missing_or_wrong_operator_is_a_problem(monkeypatch):
    check = onednn_problem.__wrapped__
    assert check() is None
    with monkeypatch.context() as patch:
        patch.setattr(module, "_product", lambda a, b, bias=None: F.linear(a, b))
        assert check().startswith("mat1 and mat2 shapes cannot be multiplied")
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "_product", lambda a, b, bias=0: a @ b + (0 if bias is None else bias) + 1e-3
        )
        assert check() == "its result is off by 0.001"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_product", lambda a, b, bias=None: torch.full((1, 1), torch.nan))
        assert check() == "its result is off by nan"
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace()))
    assert "does not have its operator" in check()


def trainer(config, *, onednn, monkeypatch) -> Trainer:
    monkeypatch.setattr(cpu_speed, "onednn_speedup", lambda rows, dim: 9.0 if onednn else 1.0)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_PRODUCT", 0)
    torch.manual_seed(0)
    made = Trainer(config, 3, device=CPU)
    assert made.runtime.onednn.on == onednn
    return made


@pytest.mark.parametrize("rows", ["few", "many"])
def test_every_product_of_a_step_is_onednns_and_losses_agree(
    tiny, crops_of, small_networks, monkeypatch, rows
):
    """The last layer scales the product for few rows, and the weight for many."""
    images = {"few": 1, "many": 16}[rows]
    config = tiny(mode="fast", batch_size_per_gpu=images, attention="sdpa", norm_last_layer=False)
    losses, counts, flops = [], [], []
    for onednn in (True, False):
        one = trainer(config, onednn=onednn, monkeypatch=monkeypatch)
        losses.append([one.train_step(crops_of(config, i)).item() for i in range(3)])
        with Calls() as calls:
            one.train_step(crops_of(config, 3))
        counts.append(calls.number)
        flops.append(executed_flops(lambda one=one: one.train_step(crops_of(config, 4))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert set(counts[0]) == {"_linear_pointwise"}
    assert "_linear_pointwise" not in counts[1]
    assert counts[0].total() == counts[1].total()
    assert flops[0] == flops[1]


def test_two_ranks_with_sharded_networks_train_like_one(
    tiny, crops_of, small_networks, monkeypatch, tmp_path
):
    config = tiny(mode="fast", batch_size_per_gpu=4, attention="sdpa")
    one = trainer(config, onednn=True, monkeypatch=monkeypatch)
    crops = [crops_of(config, i) for i in range(2)]
    expected = [one.train_step(crops_) for crops_ in crops]
    for fsdp in (False, True):
        settings = config.to_dict() | {"batch_size_per_gpu": 2, "fsdp": fsdp}
        run_two(train_rank, settings, crops, tmp_path / f"{fsdp}")
        losses = torch.load(tmp_path / f"{fsdp}", weights_only=True)
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=0)


def train_rank(settings, crops, path) -> None:
    from fastdino import TrainConfig
    from tests.small_networks import shrink_networks

    with pytest.MonkeyPatch.context() as patch:
        shrink_networks(patch)
        torch.set_num_threads(1)
        with distributed.process_group(CPU, "env://", 1.0):
            one = trainer(TrainConfig(**settings), onednn=True, monkeypatch=patch)
            rank, images = distributed.rank(), settings["batch_size_per_gpu"]
            own = slice(rank * images, (rank + 1) * images)
            losses = torch.stack([one.train_step([x[own] for x in some]) for some in crops])
            torch.distributed.all_reduce(losses)
            if rank == 0:
                torch.save(losses / 2, path)


INPUTS = AttentionInputs(CPU, torch.float32, images=4)
FAST, SAME = Choice("fp32", ""), Choice("off", "")


@pytest.mark.parametrize(("speedup", "value"), [(2.2, "on"), (1.15, "on"), (1.1, "off")])
def test_the_faster_products_are_taken_and_pytorchs_in_a_tie(tiny, monkeypatch, speedup, value):
    measured = []
    monkeypatch.setattr(
        cpu_speed, "onednn_speedup", lambda *sizes: measured.append(sizes) or speedup
    )
    choice = choose_onednn(tiny(mode="fast"), FAST, SAME, INPUTS)
    assert choice == Choice(value, f"{speedup:.2g}x PyTorch's BLAS, measured")
    assert measured == [(4 * (2 * 197 + 8 * 37), 192)]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "parity"}, "--mode parity on a CPU"),
        ({"amp_dtype": "bf16"}, "products are in bf16"),
        ({"recompute": "on"}, "--recompute on: it would compute products twice"),
        ({"batch_size_per_gpu": 1, "arch": "vit_nano"}, "too little work to measure"),
        ({"arch": "resnet18"}, "only vit_* architectures have it"),
    ],
    ids=str,
)
def test_where_nothing_is_measured(tiny, monkeypatch, settings, reason):
    monkeypatch.setattr(cpu_speed, "onednn_speedup", lambda rows, dim: 9.0)
    config = tiny(**{"mode": "fast", "arch": "vit_tiny"} | settings)
    for recorded in ({}, {"onednn": "on"}):
        resolved = resolve_runtime(config, CPU, make_crops=False, recorded=recorded)
        assert resolved.onednn == Choice("off", reason)


def test_compiled_blocks_a_problem_and_a_gpu_leave_it_off(tiny, monkeypatch):
    monkeypatch.setattr(cpu_speed, "onednn_speedup", lambda rows, dim: 9.0)
    config = tiny(mode="fast")

    def choose(**changes) -> Choice:
        inputs = AttentionInputs(**{"device": CPU, "dtype": torch.float32, "images": 4} | changes)
        return choose_onednn(config, FAST, SAME, inputs, "on" if "compiled" in changes else None)

    assert choose().on
    assert choose(compiled=True) == Choice("off", "blocks are compiled")
    assert choose(dtype=torch.float64) == Choice("off", "weights are in torch.float64")
    assert choose(device=torch.device("cuda")) == Choice("off", "--mode fast on a GPU")
    monkeypatch.setattr(runtime, "onednn_problem", lambda: "a problem")
    assert choose() == Choice("off", "a problem")


@pytest.mark.parametrize("mode", ["parity", "fast"])
def test_a_requested_value_is_not_measured(tiny, monkeypatch, mode):
    monkeypatch.setattr(cpu_speed, "onednn_speedup", None)
    for onednn in ("on", "off"):
        config = tiny(mode=mode, use_fp16=False, onednn=onednn, recompute="on")
        resolved = resolve_runtime(config, CPU, make_crops=False, recorded={"onednn": "off"})
        assert resolved.onednn == Choice(onednn, "requested")


def test_a_requested_value_that_does_not_work_is_an_error(tiny, monkeypatch):
    for settings, problem in (
        ({"amp_dtype": "bf16"}, "--onednn on does not work: products are in bf16; use --onednn au"),
        ({"arch": "resnet18"}, "--onednn on is for vit_* architectures, not for --arch resnet18"),
    ):
        with pytest.raises(ConfigError, match=re.escape(problem)):
            resolve_runtime(tiny(onednn="on", **settings), CPU, make_crops=False)
    gathered = [None, "a problem of rank 1"]
    monkeypatch.setattr(distributed, "gather", lambda problem: gathered)
    with pytest.raises(ConfigError, match="a problem of rank 1"):
        resolve_runtime(tiny(onednn="on"), CPU, make_crops=False)


def test_a_resumed_run_keeps_its_choice(tiny, monkeypatch):
    config = tiny(mode="fast", arch="vit_tiny")
    for value in ("on", "off"):
        monkeypatch.setattr(
            cpu_speed, "onednn_speedup", lambda rows, dim, value=value: 1 + 8 * (value == "off")
        )
        recorded = {"precision": "fp32", "onednn": value}
        resolved = resolve_runtime(config, CPU, make_crops=False, recorded=recorded)
        assert resolved.onednn == Choice(value, runtime.KEPT)


def test_rank_0_measures_for_all_ranks(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "from_main", lambda make: 2.0)
    monkeypatch.setattr(cpu_speed, "onednn_speedup", None)
    choice = choose_onednn(tiny(mode="fast"), FAST, SAME, INPUTS)
    assert choice == Choice("on", "2x PyTorch's BLAS, measured")


@pytest.mark.parametrize(("rows", "measured"), [(0, 1), (7, 7), (1 << 40, 512)])
def test_the_measured_layer_is_a_blocks_largest_of_bounded_size(monkeypatch, rows, measured):
    monkeypatch.setattr(cpu_speed, "MEASURED_PRODUCT", 512 * 4 * 16 * 16)
    monkeypatch.setattr(cpu_speed, "_SECONDS", 1000.0)
    now, calls = [0.0], []

    def counted(x, weight, *, onednn):
        calls.append((tuple(x.shape), tuple(weight.shape), onednn))
        now[0] += 1.0 if onednn else 3.0
        return linear(x, weight, onednn=onednn)

    monkeypatch.setattr(cpu_speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cpu_speed, "linear", counted)
    ONEDNN_SPEEDUP.cache_clear()
    assert ONEDNN_SPEEDUP(rows, 16) == 3.0
    ONEDNN_SPEEDUP.cache_clear()
    assert set(calls) == {((measured, 16), (64, 16), onednn) for onednn in (True, False)}

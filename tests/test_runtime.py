"""fastdino.runtime: the resolution of `auto` and the reasons it reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastdino import TrainConfig, Trainer, cpu_speed, distributed, runtime
from fastdino.errors import ConfigError
from fastdino.models.attention import AttentionBackend, AttentionInputs
from fastdino.models.backbones import build_networks
from fastdino.models.matmul_attention import _MatmulAttention
from fastdino.runtime import Choice, resolve_runtime

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INPUTS = AttentionInputs(CUDA)
EXACT = "the paper's crops, exact"


@pytest.fixture
def problems(monkeypatch) -> dict[str, str]:
    """Backend name -> problem; a backend that is not in the dict works."""
    reported: dict[str, str] = {}
    for name in ("fused", "dali", "dali_decode"):
        monkeypatch.setattr(
            runtime, f"{name}_problem", lambda *device, name=name: reported.get(name)
        )
    monkeypatch.setattr(runtime, "attention_problem", lambda name, _: reported.get(name))
    monkeypatch.setattr(runtime, "compile_problem", lambda device: reported.get("compile"))
    return reported


def test_runtime_resolves_every_setting_and_serializes(tiny):
    resolved = resolve_runtime(tiny(device="cpu", crops="auto"))
    values = {name: choice.value for name, choice in resolved.choices().items()}
    assert values.pop("decode") in ("cpu", "pillow")
    assert values == {
        "device": "cpu", "precision": "fp32", "compile": "off", "attention": "sdpa",
        "packing": "on", "last_block": "cls", "recompute": "off", "kernels": "torch",
        "cuda_graph": "off", "crops": "fused", "onednn": "off",
    }  # fmt: skip
    assert all(choice.reason for choice in resolved.choices().values())
    assert json.loads(json.dumps(resolved.to_dict()))["crops"] == {
        "value": "fused", "reason": EXACT
    }  # fmt: skip
    assert resolved.autocast is None
    assert "packing: on (one pass for all crop sizes)" in resolved.summary()
    assert not any("off (--mode parity" in text for text in resolved.summary())


def test_runtime_without_a_loader_resolves_no_crop_backend(tiny, problems):
    problems["dali"] = "DALI is not installed"
    with pytest.raises(ConfigError, match="--crops dali: DALI is not installed"):
        resolve_runtime(tiny(crops="dali"), CPU)
    resolved = resolve_runtime(tiny(crops="dali"), CPU, make_crops=False)
    assert resolved.crops is resolved.decode is None
    assert "crops" not in resolved.choices()


def start_as(monkeypatch, rank):
    """Set the variables that torchrun sets for a rank of three on one machine."""
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3}
    for name, value in (environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("wanted", "gpus", "rank", "device", "reason"),
    [
        ("auto", 0, 0, "cpu", "PyTorch sees no GPU"),
        ("cpu", 2, 0, "cpu", "requested"),
        ("auto", 2, 1, "cuda:1", "PyTorch sees a GPU"),
        ("cuda", 1, 0, "cuda:0", "requested"),
    ],
)
def test_device_is_the_gpu_of_the_local_rank(
    tiny, problems, monkeypatch, wanted, gpus, rank, device, reason
):
    current = []
    start_as(monkeypatch, rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(runtime, "choose_kernels", lambda device: Choice("torch", "test"))
    assert resolve_runtime(tiny(device=wanted)).device == Choice(device, reason)
    assert current == ([torch.device(device)] if device != "cpu" else [])


def test_a_missing_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: PyTorch sees no GPU"):
        runtime.choose_device("cuda")
    start_as(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"local rank 2 has no GPU, this machine has 2"):
        runtime.choose_device("auto")


@pytest.mark.parametrize(
    ("settings", "device", "precision", "reason"),
    [
        ({}, CPU, "fp32", "--mode parity on a CPU"),
        ({}, CUDA, "fp16", "loss scaling"),
        ({"mode": "fast"}, CUDA, "bf16", "--mode fast"),
        ({"mode": "fast"}, CPU, "fp32", "bf16: 1x fp32 in a measured product, less than 2x"),
        ({"amp_dtype": "bf16"}, CPU, "bf16", "requested"),
        ({"amp_dtype": "fp16", "mode": "fast"}, CPU, "fp16", "loss scaling"),
        ({"use_fp16": False}, CUDA, "fp32", "--use_fp16 false"),
    ],
)
def test_precision(tiny, settings, device, precision, reason):
    choice = runtime.choose_precision(tiny(**settings), device)
    assert choice.value == precision
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("name", "args", "broken", "choice"),
    [
        ("compile", ("off", "fast", CUDA), None, "off (requested)"),
        ("compile", ("auto", "parity", CUDA), None, "off (--mode parity)"),
        ("compile", ("auto", "fast", CPU), None, "off (no gain on a CPU)"),
        ("compile", ("auto", "fast", CUDA), None, "on (--mode fast)"),
        ("compile", ("on", "parity", CPU), None, "on (requested)"),
        ("compile", ("auto", "fast", CUDA), "compile", "off (a problem)"),
        (
            "attention",
            ("auto", INPUTS),
            None,
            "xformers (the first of xformers, varlen, sdpa",
        ),
        ("attention", ("varlen", INPUTS), None, "varlen (requested)"),
        ("attention", ("auto", INPUTS), "xformers", "varlen (no xformers: a problem)"),
        ("crops", ("auto", CPU), None, "fused (the paper's crops, exact)"),
        ("crops", ("dali", CPU), None, "dali (near PIL; --crops fused and"),
        ("crops", ("auto", CPU), "fused", "torchvision (the paper's crops, exact; a problem)"),
        ("crops", ("torchvision", CPU), "fused", "torchvision (the paper's crops, exact)"),
        ("decode", ("auto", "fused", "cpu"), None, "cpu (Pillow's pixels)"),
        ("decode", ("auto", "fused", "cuda"), None, "cpu (Pillow's pixels)"),
        ("decode", ("cpu", "fused", "cuda"), None, "cpu (Pillow's pixels)"),
        ("decode", ("pillow", "fused", "cuda"), None, "pillow (requested)"),
        ("decode", ("auto", "fused", "cuda"), "dali_decode", "pillow (a problem)"),
        ("decode", ("gpu", "fused", "cuda:1"), None, "gpu (near Pillow's pixels)"),
        ("decode", ("auto", "torchvision", "cuda"), None, "pillow (the decoder of --crops"),
        ("decode", ("auto", "dali", "cpu"), None, "cpu (the decoder of --crops dali)"),
        ("decode", ("auto", "dali", "cuda"), None, "gpu (the decoder of --crops dali)"),
    ],
)
def test_auto_depends_on_the_machine_and_working_backends(problems, name, args, broken, choice):
    problems[broken] = "a problem"
    assert str(getattr(runtime, f"choose_{name}")(*args)).startswith(choice)


@pytest.mark.parametrize(
    ("name", "args", "broken", "message"),
    [
        ("compile", ("on", "parity", CPU), "compile", "on: a problem; use --compile off"),
        ("attention", ("xformers", INPUTS), "xformers", "xformers does .*; use --attention varlen"),
        ("crops", ("fused", CPU), "fused", "fused: a problem"),
        ("crops", ("dali", CPU), "dali", "dali: a problem"),
        ("decode", ("cpu", "fused", "cpu"), "dali_decode", "cpu: a problem; use --decode pillow"),
        ("decode", ("gpu", "fused", "cpu"), None, "gpu .*needs a GPU.*: use --decode cpu"),
        ("decode", ("gpu", "fused", "cuda"), "dali", "gpu: a problem; use --decode"),
        ("decode", ("gpu", "torchvision", "cuda"), None, "gpu is for --crops fused.*torchvision"),
    ],
)
def test_unsupported_requests_are_errors(problems, name, args, broken, message):
    problems[broken] = "a problem"
    with pytest.raises(ConfigError, match=f"--{name} {message}"):
        getattr(runtime, f"choose_{name}")(*args)


@pytest.mark.parametrize("decode", ["cpu", "gpu", "pillow"])
@pytest.mark.parametrize("crops", ["torchvision", "dali"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_only_the_fused_crops_have_a_choice_of_decoders(problems, crops, decode, device):
    with pytest.raises(ConfigError, match=f"--decode {decode} is for --crops fused, .*{crops}"):
        runtime.choose_decode(decode, crops, device)


@pytest.mark.parametrize("crops", ["auto", "fused", "dali", "torchvision"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_crops_and_decoder_are_those_of_the_runs_device(tiny, monkeypatch, crops, device):
    """Each backend works on one device only, which is faked."""
    monkeypatch.setattr(runtime, "dali_problem", lambda *device: None)
    monkeypatch.setattr(runtime, "dali_decode_problem", lambda: None)
    fused = {"cpu": "Numba is not installed", "cuda": None}
    monkeypatch.setattr(runtime, "fused_problem", lambda device: fused[torch.device(device).type])
    config = tiny(crops=crops)
    if crops == "fused" and device == CPU:
        with pytest.raises(ConfigError, match="--crops fused: Numba is not installed"):
            runtime.resolve_crops(config, device)
        return
    made, decode = runtime.resolve_crops(config, device)
    on_gpu = device == CUDA
    expected = {"auto": "fused" if on_gpu else "torchvision"}.get(crops, crops)
    assert made.value == expected
    assert decode.value == {
        "fused": "cpu", "torchvision": "pillow", "dali": "gpu" if on_gpu else "cpu"
    }[expected]  # fmt: skip


def test_decoder_on_a_gpu_needs_dali_but_not_its_equality_with_pillow(monkeypatch):
    monkeypatch.setattr(runtime, "dali_problem", lambda *device: None)
    monkeypatch.setattr(runtime, "dali_decode_problem", lambda: "other pixels than Pillow's")
    assert runtime.choose_decode("gpu", "fused", CUDA).value == "gpu"
    assert runtime.choose_decode("auto", "fused", CUDA).value == "pillow"


@pytest.mark.parametrize(
    ("speedup", "value"), [(3.06, "bf16"), (2.0, "bf16"), (1.96, "fp32"), (0.1, "fp32")]
)
def test_bf16_on_a_cpu_is_for_products_of_twice_the_speed(tiny, monkeypatch, speedup, value):
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: speedup)
    choice = runtime.choose_precision(tiny(mode="fast"), CPU)
    assert choice.value == value
    assert f"bf16: {speedup:.2g}x fp32 in a measured product" in choice.reason


ATTENTION = AttentionInputs(CPU, torch.float32, images=4)


@pytest.mark.parametrize(
    ("speedup", "value"), [(4.0, "matmul"), (1.15, "matmul"), (1.1, "sdpa"), (0.5, "sdpa")]
)
def test_attention_on_a_cpu_is_the_faster_one_and_sdpa_in_a_tie(monkeypatch, speedup, value):
    monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: speedup)
    choice = runtime.measure_attention(ATTENTION)
    assert choice == Choice(value, f"matmul: {speedup:.2g}x sdpa, measured")


def test_attention_on_a_cpu_is_sdpa_where_nothing_is_to_be_measured(monkeypatch):
    monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: 9.0)
    few = replace(ATTENTION, sequences=((2, 5),))
    for recorded in (None, "sdpa", "matmul"):  # the same reason when a run starts and resumes
        choice = runtime.measure_attention(few, recorded)
        assert choice == Choice("sdpa", "too little work to measure")
    compiled = replace(ATTENTION, compiled=True)
    for recorded in (None, "matmul", "sdpa"):
        assert runtime.measure_attention(compiled, recorded) == Choice("sdpa", "compiled blocks")
    monkeypatch.setattr(runtime, "attention_problem", lambda name, inputs: "a problem")
    assert runtime.measure_attention(ATTENTION) == Choice("sdpa", "no matmul: a problem")


@pytest.mark.parametrize(
    ("factor", "recorded", "value", "reason"),
    [
        (4.0, None, "matmul", "matmul: 9x sdpa, measured"),
        (3.9, None, "sdpa", "matmul would keep 0.0468 GB of attention weights, more than 25%"),
        (0.0, None, "sdpa", "more than 25% of the 0 GB available per rank"),
        (1.0, "matmul", "matmul", "as chosen when the run started"),
        (0.9, "matmul", "sdpa", "more than 100% of the 0.0421 GB available per rank"),
        (0.0, "sdpa", "sdpa", "as chosen when the run started"),
    ],
)
def test_matmul_may_keep_a_quarter_of_the_memory(monkeypatch, factor, recorded, value, reason):
    monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: 9.0)
    memory = factor * ATTENTION.kept_bytes
    monkeypatch.setattr(runtime, "memory_per_rank", lambda: memory)
    choice = runtime.measure_attention(ATTENTION, recorded)
    assert choice.value == value
    assert reason in choice.reason


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"last_block": "all"},
        {"amp_dtype": "bf16"},
        {"local_crops_number": 0},
        {"global_batch_size": 6},
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_networks")
def test_memory_of_matmul_is_what_a_step_keeps(tiny, monkeypatch, crops_of, settings, packing):
    config = tiny(mode="fast", attention="matmul", packing=packing, **settings)
    inputs, kept, apply = [], [], _MatmulAttention.apply
    monkeypatch.setattr(runtime, "attention_problem", lambda name, one: inputs.append(one))
    trainer = Trainer(config, steps_per_epoch=1)

    def noted(*qkv):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            out = apply(*qkv)
        kept.extend(x.untyped_storage().nbytes() for x in saved[3:])  # all but query, key, value
        return out

    monkeypatch.setattr(_MatmulAttention, "apply", noted)
    crops = [crop[: trainer.batch.images] for crop in crops_of(config, 0)]
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.runtime.autocast is not None):
        trainer.student(crops)
    assert [one.kept_bytes for one in inputs] == [sum(kept)]
    assert kept


def test_choices_of_the_checkpoint_are_not_measured_again(tiny, monkeypatch):
    def measure(*inputs):
        raise AssertionError("measured")

    monkeypatch.setattr(cpu_speed, "bf16_speedup", measure)
    monkeypatch.setattr(cpu_speed, "matmul_speedup", measure)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    recorded = {"precision": "bf16", "attention": "matmul"}
    config = tiny(mode="fast")
    resolved = resolve_runtime(config, CPU, make_crops=False, recorded=recorded)
    assert resolved.precision == Choice("bf16", "as chosen when the run started")
    assert resolved.attention == Choice("matmul", "as chosen when the run started")


@pytest.mark.parametrize("recorded", ["on", "off", None, "unknown"])
def test_products_of_the_checkpoint_that_cannot_run_here_are_pytorchs(tiny, monkeypatch, recorded):
    """Such as on another PyTorch: the first product would fail."""
    monkeypatch.setattr(cpu_speed, "onednn_speedup", lambda rows, dim: 9.0)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_PRODUCT", 0)
    monkeypatch.setattr(runtime, "onednn_problem", lambda: "a problem")
    values = {"precision": "fp32"} | ({"onednn": recorded} if recorded else {})
    resolved = resolve_runtime(tiny(mode="fast"), CPU, make_crops=False, recorded=values)
    assert resolved.onednn == Choice("off", "a problem")


@pytest.mark.parametrize("speedup", [0.014, 1.0])
def test_a_bf16_that_is_slow_on_the_cpu_of_a_resumed_run_is_a_warning(tiny, monkeypatch, speedup):
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: speedup)
    text = "the run started in bf16, in which a product takes 71 times as long as in fp32 on this"
    for settings, recorded in (
        ({}, {"precision": "bf16"}),
        ({}, {"precision": "fp32"}),
        ({"amp_dtype": "bf16"}, {}),
    ):
        config = tiny(mode="fast", **settings)
        resolved = resolve_runtime(config, CPU, make_crops=False, recorded=recorded)
        warning = runtime.slow_precision(resolved)
        assert warning.startswith(text) == (speedup < 1 and recorded == {"precision": "bf16"})
        assert bool(warning) == warning.startswith(text)


@pytest.mark.parametrize(
    ("settings", "value", "reason"),
    [
        ({"mode": "parity"}, "sdpa", "--mode parity on a CPU"),
        ({"recompute": "on"}, "sdpa", "--recompute on: it saves less"),
        ({"attention": "sdpa"}, "sdpa", "requested"),
        ({"mode": "parity", "attention": "matmul"}, "matmul", "requested"),
        ({}, "matmul", "matmul: 9x sdpa, measured"),
    ],
    ids=str,
)
def test_only_auto_in_fast_mode_measures_attention(tiny, monkeypatch, settings, value, reason):
    monkeypatch.setattr(cpu_speed, "matmul_speedup", lambda inputs: 9.0)
    monkeypatch.setattr(cpu_speed, "NEGLIGIBLE_WEIGHTS", 0)
    config = tiny(**{"mode": "fast"} | settings)
    assert resolve_runtime(config, CPU, make_crops=False).attention == Choice(value, reason)


def test_rank_0_measures_for_all_ranks(monkeypatch):
    """Another rank takes what rank 0 sends, and measures nothing itself."""
    sent = [3.0, Choice("matmul", "matmul: 3x sdpa, measured")]
    monkeypatch.setattr(distributed, "from_main", lambda make: sent.pop(0))
    assert runtime.choose_precision(TrainConfig(mode="fast"), CPU).value == "bf16"
    assert runtime.measure_attention(ATTENTION).value == "matmul"
    assert not sent


def test_attention_is_tested_with_the_heads_and_crops_of_the_run(tiny, monkeypatch):
    tested = []
    monkeypatch.setattr(runtime, "compile_problem", lambda device: None)
    monkeypatch.setattr(runtime, "attention_problem", lambda name, inputs: tested.append(inputs))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for local_crops, compiled, batch, last_block in (
        (2, "off", 0, "cls"), (0, "on", 0, "cls"), (2, "off", 20, "all")
    ):  # fmt: skip
        config = tiny(
            arch="deit_nano", patch_size=8, local_crops_number=local_crops, global_crops_size=32,
            local_crops_size=20, compile=compiled, attention="sdpa", amp_dtype="bf16",
            global_batch_size=batch, last_block=last_block,
        )  # fmt: skip
        resolve_runtime(config, CPU, make_crops=False)
    inputs = AttentionInputs(CPU, torch.bfloat16, head_dim=32, heads=3, images=4, blocks=6)
    assert tested == [
        replace(inputs, sequences=((2, 17), (2, 5))),
        replace(inputs, sequences=((2, 17),), compiled=True),
        replace(inputs, sequences=((2, 17), (2, 5)), images=2, cls_only=False),
    ]


@pytest.mark.parametrize(
    ("settings", "device", "name", "choice"),
    [
        ({}, CPU, "packing", Choice("on", "one pass for all crop sizes")),
        ({"packing": "off"}, CPU, "packing", Choice("off", "requested")),
        ({}, CPU, "last_block", Choice("cls", "the head reads no other token")),
        ({"last_block": "all"}, CPU, "last_block", Choice("all", "requested")),
        ({}, CUDA, "recompute", Choice("off", "--mode parity on a GPU")),
        ({"recompute": "on"}, CPU, "recompute", Choice("on", "requested")),
        ({"mode": "fast"}, CUDA, "recompute", Choice("on", "--mode fast on a GPU")),
        ({"mode": "fast"}, CPU, "recompute", Choice("off", "--mode fast on a CPU")),
        ({"mode": "fast", "recompute": "off"}, CUDA, "recompute", Choice("off", "requested")),
    ],
)
def test_vit_settings(tiny, problems, monkeypatch, settings, device, name, choice):
    monkeypatch.setattr(runtime, "choose_kernels", lambda device: Choice("torch", "test"))
    assert getattr(resolve_runtime(tiny(**settings), device), name) == choice


def test_other_architectures_use_their_own_attention_one_size_at_a_time(tiny):
    resolved = resolve_runtime(tiny(arch="resnet18"), CPU)
    assert resolved.attention == Choice("none", "the architecture has its own")
    assert resolved.packing == Choice("off", "the architecture takes one crop size at a time")
    assert not resolved.recompute.on


@pytest.mark.parametrize(
    "settings", [{"packing": "on"}, {"attention": "sdpa"}, {"recompute": "on"}]
)
def test_vit_settings_are_refused_for_other_architectures(tiny, settings):
    [(flag, value)] = settings.items()
    with pytest.raises(ConfigError, match=f"--{flag} {value} is for vit_.* --arch resnet18"):
        resolve_runtime(tiny(arch="resnet18", **settings), CPU)


def test_runtime_configures_the_networks(tiny):
    config = tiny(packing="on", last_block="all", recompute="on", amp_dtype="bf16")
    student, _ = build_networks(config)
    assert (student.packing, student.backbone.cls_only) == (False, True)
    resolve_runtime(config, CPU).apply_to(student)
    assert (student.packing, student.backbone.cls_only) == (True, False)
    assert student.backbone.attention == AttentionBackend("sdpa", torch.bfloat16)
    assert all(block.recompute for block in student.backbone.blocks)


def test_kernels_follow_the_environment_variable(monkeypatch):
    assert runtime.choose_kernels(CPU).value == "torch"
    monkeypatch.setenv("FASTDINO_KERNELS", "torch")
    assert runtime.choose_kernels(CPU) == Choice("torch", "FASTDINO_KERNELS=torch")
    monkeypatch.setenv("FASTDINO_KERNELS", "fast")
    with pytest.raises(ConfigError, match="FASTDINO_KERNELS must be one of"):
        runtime.choose_kernels(CPU)


def test_kernels_report_why_a_gpu_does_not_run_them(monkeypatch):
    monkeypatch.setattr("fastdino_kernels.dispatch.triton_problem", lambda device: "it is too old")
    assert runtime.choose_kernels(CUDA) == Choice("torch", "it is too old")


@pytest.mark.parametrize(
    ("settings", "device", "precision", "processes", "reason"),
    [
        ({}, CPU, "bf16", 1, "a CPU has no CUDA graphs"),
        ({"mode": "parity"}, CUDA, "bf16", 1, "--mode parity waits"),
        ({"optimizer": "lars"}, CUDA, "bf16", 1, "--optimizer lars waits"),
        ({}, CUDA, "fp16", 1, "--amp_dtype bf16"),
        ({}, CUDA, "bf16", 2, "several processes"),
        ({}, CUDA, "bf16", 1, "requested"),
        ({"cuda_graph": False}, CUDA, "bf16", 1, "--cuda_graph false"),
    ],
)
def test_cuda_graph_is_off_if_a_step_cannot_be_recorded(
    tiny, monkeypatch, settings, device, precision, processes, reason
):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    config = tiny(**({"cuda_graph": True, "mode": "fast"} | settings))
    choice = runtime.choose_cuda_graph(config, device, Choice(precision, "test"))
    assert reason in choice.reason
    assert choice.on == (reason == "requested")

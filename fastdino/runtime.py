"""One place that resolves every `auto` setting of a run, with a reason for each choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from fastdino_kernels.dispatch import explain_impl

from fastdino import cpu_speed, distributed
from fastdino.augmentation import dali_problem, fused_problem
from fastdino.config import PATCHED_ARCHS, TrainConfig
from fastdino.data.decoding import dali_decode_problem
from fastdino.errors import ConfigError
from fastdino.host_memory import memory_per_rank
from fastdino.launch import read_launch
from fastdino.models.attention import BACKENDS, AttentionBackend, AttentionInputs, attention_problem
from fastdino.models.compile import compile_problem
from fastdino.models.head import MultiCropWrapper
from fastdino.models.linear_layer import OneDNNLayer, onednn_problem
from fastdino.models.vit import VIT_ARCHS, Block, VisionTransformer

# The choices that a CPU measures in --mode fast, and the settings that they depend on. A resumed
# run with the same settings keeps those of its checkpoint.
MEASURED = {
    "precision": ("mode", "use_fp16", "amp_dtype"),
    "attention": ("mode", "use_fp16", "amp_dtype", "attention", "compile", "recompute"),
    "onednn": ("mode", "use_fp16", "amp_dtype", "onednn", "compile", "recompute"),
}
KEPT = "as chosen when the run started"
# matmul may keep this share of the available memory for the backward pass: networks, other
# activations, data workers and the copy of a checkpoint need memory too.
MATMUL_MEMORY = 0.25
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
REQUESTED = "requested"


@dataclass(frozen=True)
class Choice:
    """The value of a setting, spelled as on the command line, and the reason in one phrase."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"

    @property
    def on(self) -> bool:
        """True if the value of an on/off setting is "on"."""
        return self.value == "on"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The resolved settings of a run: one choice each, none of which changes the maths.

    Attributes:
        device: "cpu" or "cuda:<index>".
        precision: "fp32", or the dtype of the autocast regions: "bf16" or "fp16".
        compile: torch.compile over blocks and head.
        attention: backend of softmax attention; "none" if the architecture brings its own.
        packing: crops of all sizes in one sequence.
        last_block: tokens that the last block computes, "cls" or "all".
        recompute: norms and GELU recomputed in the backward pass instead of kept.
        onednn: fp32 products of linear layers on a CPU by oneDNN instead of PyTorch's BLAS.
        kernels: implementation of fastdino_kernels: "triton" or "torch".
        cuda_graph: the training step replayed as a CUDA graph.
        crops, decode: crop backend and JPEG decoder; None if the caller makes the crops.
    """

    device: Choice
    precision: Choice
    compile: Choice
    attention: Choice
    packing: Choice
    last_block: Choice
    recompute: Choice
    onednn: Choice
    kernels: Choice
    cuda_graph: Choice
    crops: Choice | None = None
    decode: Choice | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast regions; None for fp32."""
        return AUTOCAST_DTYPES[self.precision.value]

    def choices(self) -> dict[str, Choice]:
        """Return the choices by name, in the order to print them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: choice for name, choice in values.items() if choice is not None}

    def summary(self) -> list[str]:
        """Return "name: value (reason)" for each choice; leave out what is off by a flag."""
        return [
            f"{name}: {choice}"
            for name, choice in self.choices().items()
            if choice.value != "off" or not choice.reason.startswith("--")
        ]

    def to_dict(self) -> dict[str, dict[str, str]]:
        """Return {name: {"value": ..., "reason": ...}} for JSON."""
        return {name: dataclasses.asdict(choice) for name, choice in self.choices().items()}

    def apply_to(self, network: MultiCropWrapper) -> None:
        """Set attention, packing, last block, recomputation and linear layers of a network."""
        network.packing = self.packing.on
        for layer in network.modules():
            if isinstance(layer, OneDNNLayer):
                layer.onednn = self.onednn.on
        if isinstance(network.backbone, VisionTransformer):
            network.backbone.attention = AttentionBackend(
                self.attention.value, _attention_dtype(self.precision)
            )
            network.backbone.cls_only = self.last_block.value == "cls"
            for block in network.backbone.blocks:
                assert isinstance(block, Block)
                block.recompute = self.recompute.on


def resolve_runtime(
    config: TrainConfig,
    device: torch.device | None = None,
    *,
    make_crops: bool = True,
    recorded: Mapping[str, str] | None = None,
) -> Runtime:
    """Resolve every setting of `config` that depends on the machine; all ranks must call it.

    Args:
        config: the settings of the run.
        device: overrides config.device.
        make_crops: also resolve --crops and --decode; False for a Trainer that is given crops.
        recorded: values of MEASURED to keep from the checkpoint to resume, instead of measuring.

    Raises: ConfigError: a setting requested by name is not supported on this machine.
    """
    why_device = REQUESTED
    if device is None:
        device = choose_device(config.device)
        if config.device == "auto":
            why_device = f"PyTorch sees {'a' if device.type == 'cuda' else 'no'} GPU"
    recorded = recorded or {}
    precision = choose_precision(config, device, recorded.get("precision"))
    compiled = choose_compile(config.compile, config.mode, device)
    crops, decode = resolve_crops(config, device) if make_crops else (None, None)
    return Runtime(
        device=Choice(str(device), why_device),
        precision=precision,
        compile=compiled,
        kernels=choose_kernels(device),
        cuda_graph=choose_cuda_graph(config, device, precision),
        crops=crops,
        decode=decode,
        **_vit_choices(config, device, precision, compiled, recorded),
    )


def choose_device(wanted: str) -> torch.device:
    """Resolve --device {auto, cuda, cpu}; with several GPUs, the local rank is the index.

    The GPU becomes PyTorch's current device.

    Raises: ConfigError: --device cuda without a GPU, or more processes than GPUs.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU; `fastdino info` shows the reason")
    local_rank, count = read_launch().local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU, this machine has {count}: start one process per "
            f"GPU (--nproc_per_node={count})"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_precision(
    config: TrainConfig, device: torch.device, recorded: str | None = None
) -> Choice:
    """Resolve --use_fp16 and --amp_dtype; weights are fp32 in every case.

    On a CPU, `auto` in --mode fast is bf16 where a large product is at least twice as fast in it.

    Args: recorded: the value that was measured before, if it was.
    """
    if not config.use_fp16:
        return Choice("fp32", "--use_fp16 false")
    if config.amp_dtype == "bf16":
        return Choice("bf16", f"autocast, fp32 weights; {REQUESTED}")
    if config.amp_dtype == "auto" and config.mode == "fast" and device.type == "cuda":
        return Choice("bf16", "autocast, fp32 weights; --mode fast")
    if config.amp_dtype == "fp16" or device.type == "cuda":
        return Choice("fp16", "autocast with loss scaling, fp32 weights")
    if config.mode != "fast":
        return Choice("fp32", _mode_and_device(config, device))
    if recorded in ("fp32", "bf16"):
        return Choice(recorded, KEPT)
    speedup = distributed.from_main(lambda: cpu_speed.bf16_speedup())
    reason = f"bf16: {speedup:.2g}x fp32 in a measured product"
    if speedup >= cpu_speed.BF16_GAIN:
        return Choice("bf16", f"autocast, fp32 weights; {reason}")
    return Choice("fp32", f"{reason}, less than {cpu_speed.BF16_GAIN:g}x")


def slow_precision(runtime: Runtime) -> str:
    """Return a warning if a resumed run keeps a bf16 that this CPU is slow in, else "".

    All ranks must call it.
    """
    if (runtime.precision.value, runtime.precision.reason) != ("bf16", KEPT):
        return ""
    speedup = distributed.from_main(lambda: cpu_speed.bf16_speedup())
    if speedup >= 1:
        return ""
    return (
        f"the run started in bf16, in which a product takes {1 / speedup:.2g} times as long as in "
        "fp32 on this CPU: use --use_fp16 false, with slightly other results, or another machine"
    )


def _attention_dtype(precision: Choice) -> torch.dtype:
    """Return the dtype of queries and keys: that of autocast, or of the weights."""
    return AUTOCAST_DTYPES[precision.value] or torch.get_default_dtype()


def choose_compile(wanted: str, mode: str, device: torch.device) -> Choice:
    """Resolve --compile {auto, on, off}; raise ConfigError if `on` is not supported."""
    if wanted == "off":
        return Choice("off", REQUESTED)
    if wanted == "auto" and mode != "fast":
        return Choice("off", f"--mode {mode}")
    if wanted == "auto" and device.type == "cpu":
        return Choice("off", "no gain on a CPU")
    problem = compile_problem(device)
    if problem is None:
        return Choice("on", REQUESTED if wanted == "on" else "--mode fast")
    if wanted == "on":
        raise ConfigError(f"--compile on: {problem}; use --compile off")
    return Choice("off", problem)


def _vit_choices(
    config: TrainConfig,
    device: torch.device,
    precision: Choice,
    compiled: Choice,
    recorded: Mapping[str, str],
) -> dict[str, Choice]:
    """Resolve what is for vit_* only: --attention, --packing, --last_block, --recompute, oneDNN."""
    if config.arch not in PATCHED_ARCHS:
        for flag in ("attention", "packing", "recompute", "onednn"):
            value = getattr(config, flag)
            if value not in ("auto", "off"):
                raise ConfigError(
                    f"--{flag} {value} is for vit_* architectures, not for --arch {config.arch}: "
                    f"remove --{flag}"
                )
        return {
            "attention": Choice("none", "the architecture has its own"),
            "packing": Choice("off", "the architecture takes one crop size at a time"),
            "last_block": Choice("all", "only vit_* architectures have it"),
            "recompute": Choice("off", "only vit_* architectures have it"),
            "onednn": Choice("off", "only vit_* architectures have it"),
        }
    sizes = [(2, config.global_crops_size), (config.local_crops_number, config.local_crops_size)]
    shape = VIT_ARCHS[config.arch.replace("deit_", "vit_", 1)]
    inputs = AttentionInputs(
        device,
        _attention_dtype(precision),
        head_dim=shape["embed_dim"] // shape["num_heads"],
        sequences=tuple(
            (crops, 1 + (size // config.patch_size) ** 2) for crops, size in sizes if crops
        ),
        compiled=compiled.on,
        heads=shape["num_heads"],
        images=config.split_batch(distributed.world_size()).images,
        blocks=shape["depth"],
        cls_only=config.last_block == "cls",
    )
    on_gpu = device.type == "cuda"
    reason = _mode_and_device(config, device)
    recompute = Choice("on" if config.mode == "fast" and on_gpu else "off", reason)
    cls = Choice("cls", "the head reads no other token")
    recompute = _requested_or(recompute, config.recompute)
    if config.attention == "auto" and not on_gpu:
        fixed = reason if config.mode != "fast" else ""
        fixed = "--recompute on: it saves less" if recompute.on else fixed
        attention = (
            Choice("sdpa", fixed) if fixed else measure_attention(inputs, recorded.get("attention"))
        )
    else:
        attention = choose_attention(config.attention, inputs)
    return {
        "attention": attention,
        "packing": _requested_or(Choice("on", "one pass for all crop sizes"), config.packing),
        "last_block": _requested_or(cls, config.last_block),
        "recompute": recompute,
        "onednn": choose_onednn(config, precision, recompute, inputs, recorded.get("onednn")),
    }


def _mode_and_device(config: TrainConfig, device: torch.device) -> str:
    return f"--mode {config.mode} on a {'GPU' if device.type == 'cuda' else 'CPU'}"


def _requested_or(default: Choice, wanted: str) -> Choice:
    return default if wanted in ("auto", default.value) else Choice(wanted, REQUESTED)


def choose_attention(wanted: str, inputs: AttentionInputs) -> Choice:
    """Resolve --attention {auto, xformers, varlen, sdpa, matmul}: `auto` is the first that works.

    Raises: ConfigError: a backend requested by name does not work; the message names one that does.
    """
    problems: dict[str, str] = {}
    for name in BACKENDS if wanted == "auto" else (wanted,):
        problem = attention_problem(name, inputs)
        if problem is None:
            skipped = "; ".join(f"no {other}: {problems[other]}" for other in problems)
            first = f"the first of {', '.join(BACKENDS)}" if wanted == "auto" else REQUESTED
            return Choice(name, skipped or first)
        problems[name] = problem
    nearest = choose_attention("auto", inputs).value
    raise ConfigError(
        f"--attention {wanted} does not work: {problems[wanted]}; use --attention {nearest}"
    )


def measure_attention(inputs: AttentionInputs, recorded: str | None = None) -> Choice:
    """Resolve --attention auto on a CPU: matmul where it is measurably faster than sdpa.

    The attention weights that it keeps must fit into MATMUL_MEMORY of the available memory, or
    where it was chosen before, into all of it.

    Rank 0 measures the speed for all ranks, which must all call it.

    Args: recorded: the value that was measured before, if it was.
    """
    if inputs.compiled:
        return Choice("sdpa", "compiled blocks")
    if inputs.weights < cpu_speed.NEGLIGIBLE_WEIGHTS:
        return Choice("sdpa", "too little work to measure")
    if recorded == "sdpa":
        return Choice("sdpa", KEPT)
    if recorded == "matmul":
        problem = _memory_problem(inputs, 1.0)
        return Choice("sdpa", problem) if problem else Choice("matmul", KEPT)
    if problem := _memory_problem(inputs, MATMUL_MEMORY):
        return Choice("sdpa", problem)
    return distributed.from_main(lambda: _faster_attention(inputs))


def _memory_problem(inputs: AttentionInputs, share: float) -> str:
    """Return a reason if matmul keeps more than a share of the memory of a rank, else ""."""
    memory = memory_per_rank()
    if inputs.kept_bytes <= share * memory:
        return ""
    return (
        f"matmul would keep {inputs.kept_bytes / 1e9:.3g} GB of attention weights, more than "
        f"{share:.0%} of the {memory / 1e9:.3g} GB available per rank"
    )


def _faster_attention(inputs: AttentionInputs) -> Choice:
    problem = attention_problem("matmul", inputs)
    if problem is not None:
        return Choice("sdpa", f"no matmul: {problem}")
    speedup = cpu_speed.matmul_speedup(inputs)
    faster = speedup >= cpu_speed.MATMUL_GAIN
    return Choice("matmul" if faster else "sdpa", f"matmul: {speedup:.2g}x sdpa, measured")


def choose_onednn(
    config: TrainConfig,
    precision: Choice,
    recompute: Choice,
    inputs: AttentionInputs,
    recorded: str | None = None,
) -> Choice:
    """Resolve --onednn: `auto` is on in --mode fast where it is measurably faster.

    Rank 0 measures for all ranks, which must all call it.

    Args: recorded: the value that was measured before, if it was.

    Raises: ConfigError: --onednn on does not work.
    """
    if config.onednn == "off":
        return Choice("off", REQUESTED)
    wanted = config.onednn == "on"
    if not wanted and (config.mode != "fast" or inputs.device.type != "cpu"):
        return Choice("off", _mode_and_device(config, inputs.device))
    problem = _onednn_problem(precision, inputs)
    if problem and wanted:
        raise ConfigError(f"--onednn on does not work: {problem}; use --onednn auto")
    if wanted:
        return Choice("on", REQUESTED)
    if problem:
        return Choice("off", problem)
    if recompute.on:
        return Choice("off", "--recompute on: it would compute products twice")
    rows = inputs.images * sum(crops * n for crops, n in inputs.sequences)
    dim = inputs.heads * inputs.head_dim
    if 4 * rows * dim * dim < cpu_speed.NEGLIGIBLE_PRODUCT:
        return Choice("off", "too little work to measure")
    if recorded in ("on", "off"):
        return Choice(recorded, KEPT)
    speedup = distributed.from_main(lambda: cpu_speed.onednn_speedup(rows, dim))
    faster = speedup >= cpu_speed.ONEDNN_GAIN
    return Choice("on" if faster else "off", f"{speedup:.2g}x PyTorch's BLAS, measured")


def _onednn_problem(precision: Choice, inputs: AttentionInputs) -> str | None:
    """Return the reason why oneDNN cannot compute linear layers, of any rank; None if it can."""
    if inputs.device.type != "cpu":
        return "it is for CPUs"
    if precision.value != "fp32":
        return f"products are in {precision.value}"
    if inputs.dtype != torch.float32:
        return f"weights are in {inputs.dtype}"
    if inputs.compiled:
        return "blocks are compiled"
    problems = distributed.gather(onednn_problem())
    return next(filter(None, problems), None)


def choose_kernels(device: torch.device) -> Choice:
    """Resolve the implementation of fastdino_kernels; raise ConfigError if it is not supported."""
    try:
        return Choice(*explain_impl(device))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def choose_cuda_graph(config: TrainConfig, device: torch.device, precision: Choice) -> Choice:
    """Resolve --cuda_graph; "off" if a step cannot be recorded."""
    if not config.cuda_graph:
        return Choice("off", "--cuda_graph false")
    kind, mode, optimizer = device.type, config.mode, config.optimizer
    problems = {
        f"a {kind.upper()} has no CUDA graphs": kind != "cuda",
        f"--mode {mode} waits for the device in each step, --mode fast does not": mode != "fast",
        f"--optimizer {optimizer} waits for the device, adamw does not": optimizer != "adamw",
        "the loss scale of fp16 is on the host: use --amp_dtype bf16": precision.value == "fp16",
        "collectives of several processes are not recorded": distributed.world_size() > 1,
    }
    problem = next((text for text, applies in problems.items() if applies), None)
    return Choice("off", problem) if problem else Choice("on", REQUESTED)


def resolve_crops(config: TrainConfig, device: torch.device | str) -> tuple[Choice, Choice]:
    """Resolve --crops and --decode; raise ConfigError if one is not supported."""
    crops = choose_crops(config.crops, device)
    return crops, choose_decode(config.decode, crops.value, device)


def choose_crops(wanted: str, device: torch.device | str) -> Choice:
    """Resolve --crops {auto, fused, dali, torchvision}.

    `auto` is fused if it works here, else torchvision: both make exactly the paper's crops. DALI's
    are approximate, so only --crops dali selects them.

    Raises: ConfigError: fused or dali requested, and not supported.
    """
    exact = "the paper's crops, exact"
    if wanted == "torchvision":
        return Choice("torchvision", exact)
    problem = dali_problem(device) if wanted == "dali" else fused_problem(device)
    if problem is not None and wanted != "auto":
        raise ConfigError(f"--crops {wanted}: {problem}")
    if wanted == "dali":
        return Choice("dali", "near PIL; --crops fused and --crops torchvision are exact")
    return Choice("torchvision", f"{exact}; {problem}") if problem else Choice("fused", exact)


def choose_decode(wanted: str, crops: str, device: torch.device | str) -> Choice:
    """Resolve --decode {auto, cpu, pillow, gpu} for a resolved --crops.

    Raises: ConfigError: a decoder that is not supported here or for these crops.
    """
    cuda = torch.device(device).type == "cuda"
    if crops != "fused":
        if wanted != "auto":
            raise ConfigError(
                f"--decode {wanted} is for --crops fused, and --crops {crops} decodes by its own "
                "decoder: remove --decode"
            )
        own = "pillow" if crops == "torchvision" else "gpu" if cuda else "cpu"
        return Choice(own, f"the decoder of --crops {crops}")
    if wanted == "pillow":
        return Choice("pillow", REQUESTED)
    if wanted == "gpu" and not cuda:
        raise ConfigError(
            "--decode gpu (nvJPEG) needs a GPU, and this run is on the CPU: use --decode cpu, "
            "which is exact"
        )
    problem = dali_problem() if wanted == "gpu" else dali_decode_problem()
    if problem is None and wanted == "gpu":
        return Choice("gpu", "near Pillow's pixels")
    if problem is None:
        return Choice("cpu", "Pillow's pixels")
    if wanted != "auto":
        raise ConfigError(f"--decode {wanted}: {problem}; use --decode pillow, which is exact")
    return Choice("pillow", problem)

"""Calls of the public functions with every option, dtype and shape that reaches a launch.

kernel_calls.py has those of training. A call makes its tensors on the device that it is given, see
emulated_gpu.py, and returns some that its kernels wrote.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastdino_kernels import (
    AdamWEMA,
    CropParams,
    DINOLoss,
    adamw_ema_update_,
    clip_grad_norm_,
    clip_grad_norms_,
    dino_loss,
    ema_update_,
    linear_dino_loss,
    linear_patch_loss,
    linear_sinkhorn_center,
    multi_crop,
    multi_crop_groups,
    patch_loss,
    sinkhorn_center,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from fastdino_kernels.compat import dinov2, lightly, solo_learn
from torch import Tensor

from benchmarks.gpu.kernel_calls import BF16, FP16, FP32, FP64, NAMES, Calls

HALVES = (BF16, FP16)
FLOATS = (FP32, BF16, FP16)
PROTOTYPES = (1, 7, 16, 1000, 1024, 65536, 65537)
# Sizes next to the chunks of the multi-tensor kernels; the last one's copy has rows of norm 1.
SHAPES = ((3,), (129, 7), (2049,), (1,), (5000,), (37, 64))

Make = Callable[[torch.device], Any]


def option_calls() -> Calls:
    """Yield (name, call) for every call."""
    yield from _loss_calls()
    yield from _row_calls()
    yield from _module_calls()
    yield from _sinkhorn_calls()
    yield from _linear_calls()
    yield from _ema_calls()
    yield from _clip_calls()
    yield from _adamw_ema_calls()
    yield from _optimizer_calls()
    yield from _multi_crop_calls()
    yield from boundary_calls()


def random(shape: Sequence[int], dtype: torch.dtype = FP32) -> Make:
    """Return a function that draws a tensor of normal numbers."""

    def make(device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make


def view(make: Make, change: Callable[[Tensor], Tensor]) -> Make:
    """Return a function that makes a view of a tensor."""
    return lambda device: change(make(device))


def scalar(value: float, dtype: torch.dtype = FP32) -> Make:
    """Return a function that makes a 0-d tensor."""
    return lambda device: torch.full((), value, dtype=dtype, device=device)


def _made(value: Any, device: torch.device) -> Any:
    """Make what is to be made of an argument on the device."""
    if isinstance(value, (list, tuple)):
        return [_made(each, device) for each in value]
    return value(device) if callable(value) else value


# --- losses ---------------------------------------------------------------------------------------


def _logits(crops: int, K: int, dtype: torch.dtype = FP32, B: int = 2) -> Make:
    return random((crops, B, K), dtype)


def _dino_loss(student: Make, teacher: Make, center: Make, **options: Any) -> Callable[..., Any]:
    options = {"student_temp": 0.1, "teacher_temp": 0.04} | options

    def call(device: torch.device) -> list[Tensor]:
        leaf = student(device).requires_grad_()
        made = {name: _made(value, device) for name, value in options.items()}
        loss, teacher_sum = dino_loss(
            leaf * 1, teacher(device), center(device), **made, impl="triton"
        )
        return [loss, teacher_sum, *torch.autograd.grad(loss.sum(), leaf)]

    return call


def _patch_loss(student: Make, teacher: Make, center: Make, **options: Any) -> Callable[..., Any]:
    options = {"student_temp": 0.1, "teacher_temp": 0.04} | options

    def call(device: torch.device) -> list[Tensor]:
        leaf = student(device).requires_grad_()
        made = {name: _made(value, device) for name, value in options.items()}
        loss, teacher_sum = patch_loss(
            leaf * 1, teacher(device), center(device), **made, impl="triton"
        )
        return [loss, teacher_sum, *torch.autograd.grad(loss, leaf)]

    return call


def _soft_cross_entropy(student: Make, probs: Make, **options: Any) -> Callable[..., Any]:
    options = {"student_temp": 0.1} | options

    def call(device: torch.device) -> list[Tensor]:
        leaf = student(device).requires_grad_()
        made = {name: _made(value, device) for name, value in options.items()}
        rows = soft_cross_entropy(leaf * 1, probs(device), **made, impl="triton")
        return [rows, *torch.autograd.grad(rows.square().sum(), leaf)]

    return call


def _loss_calls() -> Calls:
    for K, dtype in itertools.product(PROTOTYPES, FLOATS):
        crops = _logits(4, K, dtype), _logits(2, K, dtype)
        yield f"dino_loss K {K} {NAMES[dtype]}", _dino_loss(*crops, random((K,)))
        if dtype == BF16:
            yield f"soft_cross_entropy K {K}", _soft_cross_entropy(*crops)
    for dtypes in itertools.permutations(FLOATS, 2):
        crops = _logits(4, 1024, dtypes[0]), _logits(2, 1024, dtypes[1])
        names = " and ".join(NAMES[dtype] for dtype in dtypes)
        yield f"dino_loss {names}", _dino_loss(*crops, random((1024,), dtypes[1]))
        yield f"soft_cross_entropy {names}", _soft_cross_entropy(*crops)
    student, teacher, center = _logits(4, 1024), _logits(2, 1024), random((1024,))
    for name, options in _loss_options():
        yield f"dino_loss {name}", _dino_loss(student, teacher, center, **options)
        del options["teacher_temp"]
        yield f"soft_cross_entropy {name}", _soft_cross_entropy(student, teacher, **options)
    yield "ignore_diagonal", _soft_cross_entropy(student, teacher, ignore_diagonal=True)
    for S, T, B in ((2, 1, 1), (2, 2, 3), (12, 2, 300), (3, 3, 2)):
        crops = _logits(S, 48, BF16, B), _logits(T, 48, BF16, B)
        yield f"dino_loss S {S} T {T} B {B}", _dino_loss(*crops, random((1, 48)))
        yield f"soft_cross_entropy S {S} T {T} B {B}", _soft_cross_entropy(*crops)
    for name, change in _views():
        crops = view(_logits(4, 1026, BF16), change), view(_logits(2, 1026, BF16), change)
        unaligned = view(random((1026,)), lambda x: x[1:1025])
        yield f"dino_loss {name}", _dino_loss(*crops, unaligned)
        yield f"soft_cross_entropy {name}", _soft_cross_entropy(*crops)


def _row_calls() -> Calls:
    """Yield the loss of patches, and the DINO loss with rows, weights and all pairs."""
    for K, dtype in itertools.product(PROTOTYPES, FLOATS):
        tokens = random((3, K), dtype), random((3, K), dtype)
        weights = view(random((3,)), torch.abs)
        yield f"patch_loss K {K} {NAMES[dtype]}", _patch_loss(*tokens, random((K,)))
        yield (
            f"patch_loss K {K} {NAMES[dtype]} weighted",
            _patch_loss(*tokens, random((K,)), weights=weights),
        )
    tokens, center = (random((5, 1024), BF16), random((5, 1024), BF16)), random((1, 1024))
    for name, options in _loss_options():
        yield f"patch_loss {name}", _patch_loss(*tokens, center, **options)
    denominators = ((name, scalar(3, dtype)) for dtype, name in NAMES.items())
    for name, denominator in (("int", 3), ("float", 0.5), *denominators):
        yield f"patch_loss {name}", _patch_loss(*tokens, center, denominator=denominator)
    for name, change in _views():
        rows = view(view(random((5, 1, 1026), BF16), change), lambda x: x[:, 0])
        yield f"patch_loss {name}", _patch_loss(rows, rows, random((1024,)))
    for B in (1, 300, 3000):
        rows, weights = random((B, 48), BF16), view(random((B,), FP16), torch.abs)
        yield f"patch_loss N {B}", _patch_loss(rows, rows, random((48,)), weights=weights)
    for S, T in ((1, 1), (4, 2), (1, 3)):
        crops = _logits(S, 48, BF16, 3), _logits(T, 48, BF16, 3)
        for reduction, shape in itertools.product(("mean", "none"), ((3,), (S, 3), None)):
            options = {"ignore_diagonal": False, "reduction": reduction}
            if shape is not None:
                options["weights"] = view(random(shape), torch.abs)
            name = f"dino_loss S {S} T {T} {reduction} weights {shape}"
            yield name, _dino_loss(*crops, random((48,)), **options)
    crops = _logits(4, 48), _logits(2, 48)
    yield "dino_loss rows", _dino_loss(*crops, random((48,)), reduction="none")


def _loss_options() -> Iterator[tuple[str, dict[str, Any]]]:
    temps = ((name, scalar(0.1, dtype)) for dtype, name in NAMES.items())
    for name, temp in (("int", 1), *temps):
        yield f"temperatures {name}", {"student_temp": temp, "teacher_temp": temp}
        yield f"teacher_temp {name}", {"student_temp": 0.1, "teacher_temp": temp}
    yield "in place", {"student_temp": 0.1, "teacher_temp": 0.1, "inplace_backward": True}


def _views() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield views [.., 1024] of tensors [.., 1026]."""
    yield "unaligned", lambda x: x[..., 1:1025]
    yield "rows apart", lambda x: x[..., :1024]
    yield "images first", lambda x: x[..., :1024].transpose(0, 1).contiguous().transpose(0, 1)
    yield "prototypes apart", lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)[..., :1024]


def _module_calls() -> Calls:
    for inplace in (False, True):
        yield f"DINOLoss in place {inplace}", _module(partial(_dino_module, inplace), 3)
    yield "DINOLoss with Sinkhorn-Knopp", _module(_sinkhorn_module, 3)
    yield "lightly.DINOLoss", _module(lambda: lightly.DINOLoss(48), 3)
    yield "solo_learn.DINOLoss", _module(_solo_learn_loss, 2)
    yield "dinov2.cross_entropy", _function(dinov2.cross_entropy, temp=0.1)
    yield "dinov2.cross_entropy in place", _function(dinov2.cross_entropy, temp=1, bw_inplace=True)
    yield "dinov2.dino_clstoken_loss", _function(dinov2.dino_clstoken_loss, student_temp=0.1)
    yield (
        "dinov2.dino_cross_entropy",
        _function(
            dinov2.dino_cross_entropy, student_temp=0.1, ignore_diagonal=True, inplace_backward=True
        ),
    )


def _dino_module(inplace: bool) -> torch.nn.Module:
    return DINOLoss(48, 4, 0.04, 0.07, 1, 3, 0.1, 0.9, inplace_backward=inplace)


def _sinkhorn_module() -> torch.nn.Module:
    return DINOLoss(48, 4, 0.04, 0.07, 1, 3, centering="sinkhorn")


def _solo_learn_loss() -> torch.nn.Module:
    return solo_learn.DINOLoss(48, 0.04, 0.07, 1, 3, num_large_crops=2)


def _module(make: Callable[[], torch.nn.Module], epochs: int) -> Callable[..., Any]:
    """Call a loss in each form that it takes: one tensor, and pieces of one."""

    def call(device: torch.device) -> list[Tensor]:
        module, losses = make().to(device), []
        crops = 2 if isinstance(module, solo_learn.DINOLoss) else 4
        for epoch in range(epochs):
            student = random((crops * 2, 48))(device).requires_grad_()
            teacher = random((4, 48))(device)
            if isinstance(module, lightly.DINOLoss):
                loss = module(list(teacher.chunk(2)), list((student * 1).chunk(crops)))
            else:
                loss = module(student * 1, teacher, epoch)
            losses += [loss, *torch.autograd.grad(loss, student)]
        return losses

    return call


def _function(function: Callable[..., Tensor], **options: Any) -> Callable[..., Any]:
    def call(device: torch.device) -> list[Tensor]:
        student = _logits(2, 48, BF16)(device).requires_grad_()
        loss = function(student * 1, _logits(2, 48)(device).softmax(-1), **options)
        return [loss, *torch.autograd.grad(loss.sum(), student)]

    return call


def _sinkhorn(teacher: Make, temp: Any = 0.07, n_iterations: int = 3) -> Callable[..., Any]:
    def call(device: torch.device) -> list[Tensor]:
        made = teacher(device), _made(temp, device), n_iterations
        return [
            function(*made, group=None, impl="triton")
            for function in (sinkhorn_center, sinkhorn_knopp)
        ]

    return call


def _sinkhorn_calls() -> Calls:
    for K, dtype in itertools.product(PROTOTYPES, FLOATS):
        yield f"sinkhorn K {K} {NAMES[dtype]}", _sinkhorn(random((5, K), dtype))
    for N in (1, 1000, 5000):
        yield f"sinkhorn N {N}", _sinkhorn(random((N, 48), BF16))
    for dtype, name in NAMES.items():
        yield f"sinkhorn temp {name}", _sinkhorn(random((5, 48)), scalar(0.07, dtype))
    for n_iterations in (1, 2):
        yield f"sinkhorn n {n_iterations}", _sinkhorn(random((5, 48)), 1, n_iterations)
    for name, change in _views():
        strided = view(random((4, 2, 1026), BF16), change)
        yield f"sinkhorn {name}", _sinkhorn(view(strided, lambda x: x[0]))


def _linear_loss(
    function: Callable[..., Any], student: Sequence[int], teacher: Sequence[int], **options: Any
) -> Callable[..., Any]:
    """Call a loss of the last layers' inputs [*student, 16] and [*teacher, 24]."""
    dtype, K = options.pop("dtype", BF16), options.pop("K", 1000)
    options = {"student_temp": 0.1, "teacher_temp": 0.04} | options
    makes = [random(shape, dtype) for shape in ((*student, 16), (*teacher, 24), (K, 16), (K, 24))]

    def call(device: torch.device) -> list[Tensor]:
        inputs = [make(device) for make in makes]
        leaves = [inputs[0].requires_grad_(), inputs[2].requires_grad_()]
        made = {name: _made(value, device) for name, value in options.items()}
        results = function(*inputs, random((K,))(device), **made, impl="triton")
        return [*results, *torch.autograd.grad(results[0], leaves)]

    return call


def _linear_sinkhorn(dtype: torch.dtype, **options: Any) -> Callable[..., Any]:
    def call(device: torch.device) -> Tensor:
        layer = random((7, 16), dtype)(device), random((1000, 16), dtype)(device)
        made = {name: _made(value, device) for name, value in options.items()}
        return linear_sinkhorn_center(*layer, group=None, impl="triton", **made)

    return call


def _linear_calls() -> Calls:
    dino, patch = partial(_linear_loss, linear_dino_loss), partial(_linear_loss, linear_patch_loss)
    for dtype, K in itertools.product(FLOATS, (7, 1024)):
        case = {"dtype": dtype, "K": K, "chunk_rows": 2}
        yield f"linear_dino_loss K {K} {NAMES[dtype]}", dino((4, 3), (2, 3), **case)
        yield f"linear_patch_loss K {K} {NAMES[dtype]}", patch((3,), (3,), **case)
    temps = {"student_temp": scalar(0.1), "teacher_temp": scalar(0.04, FP64)}
    weights = view(random((3,)), torch.abs)
    yield "linear_dino_loss temperatures", dino((4, 3), (2, 3), **temps)
    yield (
        "linear_dino_loss all pairs, weights",
        dino((1, 3), (2, 3), ignore_diagonal=False, weights=weights),
    )
    yield (
        "linear_patch_loss weights, denominator",
        patch((3,), (3,), weights=weights, denominator=scalar(5), **temps),
    )
    for dtype, keep_logits in itertools.product(FLOATS, (False, True)):
        yield (
            f"linear_sinkhorn_center {NAMES[dtype]} kept {keep_logits}",
            _linear_sinkhorn(
                dtype, temp=0.07, n_iterations=2, keep_logits=keep_logits, chunk_rows=3
            ),
        )
    yield "linear_sinkhorn_center temp tensor", _linear_sinkhorn(BF16, temp=scalar(0.07))


# --- lists of tensors -----------------------------------------------------------------------------


def _list(dtype: torch.dtype = FP32) -> list[Make]:
    return [random(shape, dtype) for shape in SHAPES]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


LAYOUTS: tuple[tuple[str, list[Make]], ...] = (
    ("unaligned", [view(random((4097,)), lambda x: x[1:])]),
    ("transposed", [view(random((65, 33)), lambda x: x.t())]),
    ("channels last", [view(random((2, 8, 5, 5)), _channels_last)]),
    ("empty", [random((0, 3)), random((5,))]),
    ("0-d", [random(())]),
)  # fmt: skip


def _ema(teacher: list[Make], student: list[Make], momentum: Any, shadow: Any) -> Any:
    def call(device: torch.device) -> list[Tensor]:
        teachers, students, copies = (_made(each, device) for each in (teacher, student, shadow))
        ema_update_(teachers, students, _made(momentum, device), shadow=copies, impl="triton")
        return [*teachers, *(copies or [])]

    return call


def _ema_calls() -> Calls:
    for dtypes in itertools.product(FLOATS, FLOATS):
        names = " and ".join(NAMES[dtype] for dtype in dtypes)
        yield f"ema_update_ {names}", _ema(_list(dtypes[0]), _list(dtypes[1]), 0.9, None)
    for shadow in FLOATS:
        yield f"ema_update_ shadow {NAMES[shadow]}", _ema(_list(), _list(), 0.9, _list(shadow))
    for dtype, name in NAMES.items():
        momentum = scalar(0.9, dtype)
        yield f"ema_update_ momentum {name}", _ema(_list(), _list(), momentum, None)
    for number in (0, 1):
        yield f"ema_update_ momentum {number}", _ema(_list(), _list(), number, None)
    for name, tensors in LAYOUTS:
        yield f"ema_update_ {name}", _ema(tensors, tensors, 0.9, None)


def _clip(clip: Callable[..., Tensor], gradients: list[Make | None], max_norm: float) -> Any:
    def call(device: torch.device) -> list[Tensor]:
        made = _made(gradients, device)
        parameters = [
            torch.zeros(3, device=device) if g is None else torch.zeros_like(g) for g in made
        ]
        for parameter, gradient in zip(parameters, made, strict=True):
            parameter.grad = gradient
        return [clip(parameters, max_norm, impl="triton")]

    return call


def _clip_calls() -> Calls:
    for clip in (clip_grad_norms_, clip_grad_norm_):
        for dtype in FLOATS:
            yield f"{clip.__name__} {NAMES[dtype]}", _clip(clip, [*_list(dtype), None], 0.3)
        yield f"{clip.__name__} inf", _clip(clip, [*_list()], float("inf"))
        yield f"{clip.__name__} mixed", _clip(clip, [*_list(), *_list(BF16), *_list(FP16)], 1)
        for name, tensors in LAYOUTS:
            yield f"{clip.__name__} {name}", _clip(clip, [*tensors], 0.3)


def _adamw_ema_calls() -> Calls:
    for name, options in _update_options():
        yield f"adamw_ema_update_ {name}", _adamw_ema(**options)
    for dtypes in itertools.product(FLOATS, FLOATS):
        names = " and ".join(NAMES[dtype] for dtype in dtypes)
        tensors = {"parameters": _list(dtypes[0]), "exp_avgs": _list(dtypes[0])}
        tensors |= {"gradients": _list(dtypes[1]), "exp_avg_sqs": _list(dtypes[1])}
        yield f"adamw_ema_update_ {names}", _adamw_ema(**tensors)
    for name, layout in LAYOUTS:
        roles = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "teachers")
        tensors = dict.fromkeys(roles, layout)
        yield f"adamw_ema_update_ {name}", _adamw_ema(**tensors, momentum=0.9)


def _update_options() -> Iterator[tuple[str, dict[str, Any]]]:
    some = [None, *_list()[1:]]
    teachers: dict[str, Any] = {"teachers": _list(), "momentum": 0.9}
    flag, number = scalar(0, torch.bool), scalar(1.0)
    yield "plain", {}
    yield "numbers", {"betas": (0, 0.95), "eps": 0, "weight_decay": 0, "lr": 1}
    for dtype, name in NAMES.items():
        numbers = {"lr": scalar(0.1, dtype), "weight_decay": scalar(0.1, dtype)}
        yield f"lr and weight_decay {name}", numbers
        yield f"momentum {name}", teachers | {"momentum": scalar(0.9, dtype)}
    yield "max_norm", {"max_norm": 0.3, "norms": random((len(SHAPES),))}
    yield "max_norm inf", {"max_norm": float("inf"), "norms": random((len(SHAPES),))}
    yield "global norm", {"max_norm": 0.3, "clip": "all", "grad_scale": number}
    yield "global norm given", {"max_norm": 0.3, "clip": "all", "norms": scalar(1.0)}
    yield "some gradients and teachers", teachers | {"gradients": some, "teachers": some}
    for dtype in HALVES:
        shadows = {"shadows": _list(dtype), "teacher_shadows": _list(dtype)}
        yield f"copies {NAMES[dtype]}", teachers | shadows
        yield f"unit_rows {NAMES[dtype]}", teachers | shadows | {"unit_rows": len(SHAPES) - 1}
    yield "skip", {"skip": flag}
    yield "found_inf", {"found_inf": number, "grad_scale": number}
    yield "refused_steps", {"refused_steps": scalar(0, torch.int64), "skip": flag}


def _adamw_ema(**options: Any) -> Callable[..., Any]:
    lists = {name: _list() for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")}
    arguments = {"lr": 1e-3} | lists | options

    def call(device: torch.device) -> list[Tensor]:
        made = {name: _made(value, device) for name, value in arguments.items()}
        made["exp_avg_sqs"] = [each.abs() for each in made["exp_avg_sqs"]]
        steps = torch.zeros(len(made["parameters"]), device=device)
        adamw_ema_update_(steps=steps, **made, impl="triton")
        return [*made["parameters"], steps]

    return call


def _optimizer_calls() -> Calls:
    yield "AdamWEMA plain", _optimizer()
    yield "AdamWEMA all options", _optimizer(
        lr=scalar(0.1), betas=(0.8, 0.9), eps=1e-6, weight_decay=scalar(0.04), max_norm=0.3,
        teacher=_list(), momentum=scalar(0.9, FP64), shadow=_list(BF16),
        teacher_shadow=_list(BF16), unit_rows=-1, skip_nonfinite=True, amsgrad=False,
        maximize=False, foreach=None, capturable=True, differentiable=False, fused=True,
    )  # fmt: skip
    yield "AdamWEMA global norm", _optimizer(max_norm=0.3, clip="all")


def _optimizer(**options: Any) -> Callable[..., Any]:
    def call(device: torch.device) -> list[Tensor]:
        parameters = _made(_list(), device)
        for parameter in parameters:
            parameter.requires_grad_().grad = torch.ones_like(parameter)
        made = {name: _made(value, device) for name, value in options.items()}
        if "unit_rows" in made:
            made["unit_rows"] = parameters[made["unit_rows"]]
        optimizer = AdamWEMA(parameters, **made, impl="triton")
        for momentum in (None, 0.9, scalar(0.9, FP64)):
            optimizer.step(momentum=_made(momentum, device))
        return list(parameters)

    return call


# --- crops ----------------------------------------------------------------------------------------


def crop_params(
    sizes: Sequence[tuple[int, int]], crops: int, device: torch.device | None = None
) -> CropParams:
    """Return crops of whole images in which every operation is on in some and off in others."""
    shape = len(sizes), crops
    index = torch.arange(shape[0] * shape[1]).reshape(shape)
    extent = torch.tensor(sizes, dtype=torch.int32)[:, None, :].expand(*shape, 2)
    zero, bit = torch.zeros(shape, dtype=torch.int32), [(index >> k & 1).bool() for k in range(4)]
    order = ((torch.arange(4) - index.reshape(-1, 1)) % 4).int()
    params = (
        zero, zero, extent[..., 0].contiguous(), extent[..., 1].contiguous(), bit[0], ~bit[1],
        order.reshape(*shape, 4), torch.full((*shape, 4), 0.4), bit[2], 1.5 * bit[0], ~bit[3],
    )  # fmt: skip
    return CropParams(*(value if device is None else value.to(device) for value in params))


def image(height: int, width: int, device: torch.device) -> Tensor:
    """Return a gray image whose memory ends at a multiple of 4 bytes.

    The kernel reads whole words of 4 bytes, so up to 3 bytes beyond the last pixel. Every allocator
    of a GPU rounds up to more, but memcheck would report them.
    """
    count = height * width * 3
    memory = torch.full((-(-count // 4) * 4,), 77, dtype=torch.uint8, device=device)
    return memory[:count].view(height, width, 3)


def _multi_crop(
    size: int, dtype: torch.dtype, crops: int = 3, *, on_device: bool = False
) -> Callable[..., Any]:
    def call(device: torch.device) -> list[Tensor]:
        sizes = [(37, 53), (1, 9), (64, 31)]
        images = [image(*s, device) for s in sizes]
        params = crop_params(sizes, crops, device if on_device else None)
        options: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
        return [multi_crop(images, params, size=size, **options, dtype=dtype, impl="triton")]

    return call


def _multi_crop_groups(device: torch.device) -> list[Tensor]:
    sizes = [(37, 53), (64, 31)]
    images = [image(*s, device) for s in sizes]
    groups = [(crop_params(sizes, crops), size) for crops, size in ((2, 100), (0, 50), (3, 33))]
    return multi_crop_groups(
        images, groups, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), dtype=BF16, impl="triton"
    )


def _multi_crop_calls() -> Calls:
    yield "multi_crop_groups", _multi_crop_groups
    for size in (1, 7, 97, 128, 4096):
        yield f"multi_crop {size}", _multi_crop(size, FP32, 1)
    for dtype in HALVES:
        yield f"multi_crop {NAMES[dtype]}", _multi_crop(33, dtype)
    yield "multi_crop parameters on the device", _multi_crop(33, FP32, on_device=True)


# --- sizes that fill no block ---------------------------------------------------------------------


def boundary_calls() -> Calls:
    """Yield calls that launch each kernel with partly filled blocks, for compute-sanitizer."""
    for dtype in FLOATS:
        name = NAMES[dtype]
        student, teacher = _logits(4, 1037, dtype, 3), _logits(2, 1037, dtype, 3)
        for inplace in (False, True):
            options = {"inplace_backward": inplace}
            case = f"{name}{' in place' if inplace else ''}, K 1037"
            yield f"dino_loss {case}", _dino_loss(student, teacher, random((1037,)), **options)
            tokens = random((9, 1037), dtype), random((9, 1037), dtype)
            weights = view(random((9,)), torch.abs)
            yield (
                f"patch_loss {case}",
                _patch_loss(*tokens, random((1037,)), weights=weights, inplace_backward=inplace),
            )
            probs = view(teacher, lambda x: x.softmax(-1))
            yield (
                f"soft_cross_entropy {case}",
                _soft_cross_entropy(student, probs, ignore_diagonal=True, **options),
            )
        yield f"sinkhorn {name} K 1037", _sinkhorn(random((13, 1037), dtype))
        yield f"ema_update_ {name} all", _ema(_list(dtype), _list(dtype), 0.9, _list(dtype))
        for clip in (clip_grad_norms_, clip_grad_norm_):
            yield f"{clip.__name__} {name} all", _clip(clip, [*_list(dtype)], 0.3)
        yield f"adamw_ema_update_ {name} all", _adamw_ema(
            parameters=_list(dtype), gradients=_list(dtype), exp_avgs=_list(dtype),
            exp_avg_sqs=_list(dtype), teachers=_list(dtype), momentum=0.9,
            teacher_shadows=_list(dtype), unit_rows=len(SHAPES) - 1, max_norm=0.3,
            skip=scalar(0, torch.bool), lr=scalar(0.1), refused_steps=scalar(0, torch.int64),
        )  # fmt: skip
        for size in (33, 17):
            yield f"multi_crop {name} {size}", _multi_crop(size, dtype)

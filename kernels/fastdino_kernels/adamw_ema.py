"""The whole optimizer step in one pass: clip by norm, AdamW, teacher EMA, low-precision copies.

Bytes per parameter, in fp32, and in brackets with bf16 copies of student and teacher:

    |          | norms | clip | AdamW | EMA | copies | total   |
    |----------|-------|------|-------|-----|--------|---------|
    | separate | 4     | 8    | 28    | 12  | (8)    | 52 (60) |
    | fused    | 4     |      36            | (4)    | 40 (44) |

Separately, clipping reads and writes a gradient (if it is clipped), AdamW reads four tensors and
writes three, the EMA reads two and writes one (and the teacher's copy), and the student is read
again for its copy. Fused, five are read and four are written; the gradient is unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import (
    check_float_tensor,
    check_lengths,
    check_number,
    check_range,
    check_same_device,
    check_scalar,
)
from .clip import check_max_norm, measure, norm_dtype
from .dispatch import choose_impl
from .dtensor import local_lists, norms_over_shards
from .pointer_table import Cache, make_pointers, thread_cache
from .tensor_lists import (
    Lists,
    Some,
    Tables,
    are_plain,
    cached_chunks,
    check_lists,
    check_no_overlap,
    holes,
    key_of,
    present,
    triton_takes,
)

# Columns of a parameter whose teacher's copy is normalised: they divide a part of a chunk.
UNIT_COLUMNS = tuple(1 << i for i in range(11))


@dataclass(frozen=True)
class Group:
    """Hyperparameters of the next `count` parameters."""

    count: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float | Tensor


@dataclass(frozen=True)
class Call:
    """The tensors to update and all options, as in adamw_ema_update_.

    lists: parameters, exp_avgs, exp_avg_sqs, teachers, shadows, teacher_shadows, gradients: the
        names of the public function, of one length, None for a missing tensor. Parameters beyond
        the groups have no gradient.
    steps: one count [] for each parameter in the groups, None without moments.
    Numbers that are tensors are on the parameters' device.
    """

    lists: Lists
    steps: Some
    groups: list[Group]
    max_norm: float | None
    each: bool
    norms: Tensor | None
    momentum: float | Tensor
    skip: Tensor | None
    found_inf: Tensor | None
    grad_scale: Tensor | None
    refused_steps: Tensor | None
    unit_rows: int | None = None

    @property
    def needs_norms(self) -> bool:
        """Return True if the norms have to be measured."""
        return self.norms is None and not (self.max_norm is None and self.refused_steps is None)


@torch.compiler.disable  # a traced graph would break at the first address
@torch.no_grad()
def adamw_ema_update_(
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor | None],
    exp_avgs: Iterable[Tensor | None],
    exp_avg_sqs: Iterable[Tensor | None],
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    max_norm: float | None = None,
    clip: str = "each",
    norms: Tensor | None = None,
    teachers: Iterable[Tensor | None] | None = None,
    momentum: float | Tensor | None = None,
    shadows: Iterable[Tensor | None] | None = None,
    teacher_shadows: Iterable[Tensor | None] | None = None,
    skip: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
    refused_steps: Tensor | None = None,
    unit_rows: int | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """Clip gradients by their norms, step AdamW and update the teacher, in one pass in place.

    For each parameter p with gradient g and teacher t, as clip_grad_norms_ (clip="each") or
    clip_grad_norm_ (clip="all"), torch.optim.AdamW and ema_update_ one after the other:

        g <- g/grad_scale * min(1, max_norm/(norm + 1e-6)), norm that of g/grad_scale, or of all
        step <- step + 1;  m <- b1*m + (1 - b1)*g;  v <- b2*v + (1 - b2)*g^2
        p <- p - lr*weight_decay*p - lr * m/(1 - b1^step) / (sqrt(v/(1 - b2^step)) + eps)
        t <- momentum*t + (1 - momentum)*p

    A parameter without a gradient is unchanged, neither decayed nor counted, but its teacher is
    updated. Gradients are only read. Half precision is computed in fp32 and rounded once. No value
    is read back to the host, and a captured CUDA graph reads every 0-d tensor anew. All tensors are
    on one device. DTensors are updated shard by shard, with norms over all shards (one all-reduce).

    Args:
        parameters: n tensors, fp16/bf16/fp32/fp64, updated.
        gradients: n tensors of the same shapes, or None.
        exp_avgs, exp_avg_sqs: AdamW's moments m and v, updated; None if there is no gradient.
        steps: [n] fp32: AdamW's step count of each parameter, updated.
        lr, weight_decay: >= 0; floats, or 0-d tensors, whose values are not checked.
        betas, eps: of AdamW.
        max_norm: > 0; None: no clipping; inf: the norms are only measured.
        clip: "each" gradient by its own norm, or "all" by the global norm.
        norms: fp32 [n], or [] for "all", of the gradients divided by grad_scale, if already known.
        teachers: n tensors or None, updated.
        momentum: in [0, 1], as in ema_update_; required with teachers.
        shadows, teacher_shadows: copies of parameters and teachers, often in lower precision,
            rewritten in the same pass; n tensors or None.
        unit_rows: the index of a parameter [K, D], D a power of two up to 1024, whose teacher's
            copy gets rows of L2 norm 1: the weight that a weight-normed layer multiplies by.
        skip: 0-d; if it is not 0, no tensor changes, to the bit.
        found_inf: 0-d; if it is not 0, parameters, moments and steps are unchanged and the teacher
            is updated: the paper's loss scaling, whose EMA runs in every step.
        grad_scale: 0-d fp32, the loss scale.
        refused_steps: 0-d, fp32 or integer. If given, a step with a NaN or infinite norm changes
            nothing, as with `skip`, and adds 1 here. If found_inf is not 0, such norms are
            expected and not counted.
        impl: "triton" (no fp64), "torch" (torch's fused AdamW, multi-tensor operations), or
            "auto". Triton leaves the call to PyTorch if a tensor is not dense or has another
            layout than its parameter.

    Returns: norms [n] of the gradients before clipping, 0 without a gradient, or their global norm
        []; fp32 (fp64 if every gradient is fp64); None if neither max_norm nor refused_steps needs
        them.

    Raises:
        ValueError: lengths, shapes or devices that differ, numbers out of range, a missing momentum
            or moment, DTensors that are sharded differently, or written tensors that share memory
            with another tensor or within themselves; the message has the indices.
        TypeError: an argument that is not a dense floating-point tensor.
        RuntimeError: a CUDA graph is being captured, and no earlier call had tensors on the GPU.

    """
    n = len(parameters := list(parameters))
    given = {
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "teachers": teachers,
        "shadows": shadows,
        "teacher_shadows": teacher_shadows,
        "gradients": gradients,
    }
    lists: Lists = {"parameters": parameters} | {
        name: [None] * n if some is None else list(some) for name, some in given.items()
    }
    check_lengths(lists)
    if n == 0:
        choose_impl(impl, [])  # raises for an unknown name
        return None
    device = check_float_tensor("parameters[0]", parameters[0]).device
    if momentum is None:
        if present([lists["teachers"]]):
            raise ValueError("momentum must be given with teachers, got None")
        momentum = 1.0
    if check_float_tensor("steps", steps).shape != (n,):
        raise ValueError(f"steps must have shape ({n},), got {tuple(steps.shape)}")
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    call = Call(
        lists,
        steps.unbind(),
        [make_group(n, numbers, device)],
        None if max_norm is None else check_max_norm(max_norm),
        is_each(clip),
        norms,
        check_hyperparameter("momentum", momentum, device, most=1),
        skip,
        found_inf,
        grad_scale,
        refused_steps,
        unit_rows,
    )
    norms = update(call, impl, thread_cache("adamw_ema"))
    *written, _ = lists.values()
    torch.autograd.graph.increment_version(present(written))
    return norms


def update(
    call: Call, impl: str, cache: Cache, keys: tuple[Hashable, Hashable] | None = None
) -> Tensor | None:
    """Run adamw_ema_update_ for groups with checked numbers; return the norms.

    Args:
        call: the tensors and options.
        impl: as in adamw_ema_update_.
        cache: holds the tables and the results of the checks.
        keys: everything that they depend on, for plain tensors: that of the gradients, and that of
            the other tensors. By default all tensors are read for it.
    """
    _check_options(call)
    local = local_lists(call.lists) if keys is None else call.lists
    state, gradients = _plan(call, local, impl, cache, keys)
    norms = call.norms
    if call.needs_norms and (gradients is None or local is not call.lists):
        norms = _measure(call, local)
    if state is None or gradients is None:
        from .adamw_ema_torch import torch_adamw_ema_

        torch_adamw_ema_(call, local, norms)
        return norms
    from .adamw_ema_triton import launch_adamw_ema

    return launch_adamw_ema(state, gradients, call, norms, cache)


def _plan(
    call: Call, local: Lists, impl: str, cache: Cache, keys: tuple[Hashable, Hashable] | None
) -> tuple[Tables | None, Tables | None]:
    """Check all tensors; return the tables of the state and of the gradients, None for PyTorch.

    The gradients have a cache entry of their own, as they move more often.
    """
    *state, gradients = local.values()
    parameter = state[0][0]
    assert parameter is not None

    def make_state() -> tuple[Tables | None, frozenset[int]]:
        _check_state(call, local)
        addresses = frozenset(tensor.data_ptr() for tensor in present(state) if tensor.numel())
        return _state_tables(call, local, impl), addresses

    def make_gradients() -> Tables | None:
        tables, addresses = checked
        _check_gradients(local, addresses)
        return None if tables is None else _gradient_tables(local, impl)

    if keys is None:
        keys = key_of([gradients]), key_of([*state, call.steps])
    if keys[0] is None or keys[1] is None:
        checked = make_state()
        return checked[0], make_gradients()
    counts = [group.count for group in call.groups]
    chosen = choose_impl(impl, [parameter])
    key = impl, chosen, counts, call.unit_rows, keys[1]
    checked = cache.get(key, parameter.device, make_state)
    return checked[0], cache.get((checked, keys[0]), parameter.device, make_gradients)


def _state_tables(call: Call, local: Lists, impl: str) -> Tables | None:
    *state, gradients = local.values()
    parameters = present(state[:1])
    if choose_impl(impl, present([*state, gradients])) == "torch" or not triton_takes(state):
        return None
    from .adamw_ema_triton import CHUNK

    device, others = parameters[0].device, len(parameters) - len(call.steps)
    chunks = cached_chunks([p.numel() for p in parameters], CHUNK, device)
    group_of = [i for i, group in enumerate(call.groups) for _ in range(group.count)]
    roles = [*state, [*call.steps, *[None] * others]]
    return Tables(chunks, make_pointers(roles, device, group_of + [0] * others))


def _gradient_tables(local: Lists, impl: str) -> Tables | None:
    parameters, *_, gradients = local.values()
    held, device = present([gradients]), present([parameters])[0].device
    moving = [p if g is not None else None for p, g in zip(parameters, gradients, strict=True)]
    if not triton_takes([moving, gradients]) or (held and choose_impl(impl, held) == "torch"):
        return None
    from .clip_triton import CHUNK

    chunks = cached_chunks([0 if g is None else g.numel() for g in gradients], CHUNK, device)
    return Tables(chunks, make_pointers([gradients], device))


def _measure(call: Call, local: Lists) -> Tensor:
    """Return the norms by PyTorch: those of whole gradients, divided by grad_scale."""
    n = len(call.steps)
    whole, shards = call.lists["gradients"][:n], local["gradients"][:n]
    if held := present([shards]):
        norms = measure(shards)
        if local is not call.lists:
            norms = norms_over_shards(norms, "gradients", whole)
        norms = norms.to(norm_dtype(held))
    else:
        norms = torch.zeros(n, device=present(local.values())[0].device)
    norms = norms if call.each else torch.linalg.vector_norm(norms)
    return norms if call.grad_scale is None else norms / call.grad_scale


def check_hyperparameter(
    name: str, value: object, device: torch.device, most: float = math.inf
) -> float | Tensor:
    """Return a number in [0, most], or a 0-d tensor on the device.

    A 0-d tensor on the CPU becomes a number if the device is another one.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: a number out of range, a tensor of another shape or on another device.
    """
    scalar = check_scalar(name, value)
    if isinstance(scalar, Tensor):
        if scalar.device == device:
            return scalar
        if not scalar.is_cpu:
            raise ValueError(
                f"{name} is on {scalar.device} but the parameters on {device}: expected one device"
            )
        scalar = scalar.item()  # already on the host: no synchronisation
    check_range(name, scalar, most)
    return float(scalar)


def make_group(count: int, numbers: Mapping[str, Any], device: torch.device) -> Group:
    """Make a group of checked hyperparameters: lr, betas, eps, weight_decay.

    Raises: TypeError, ValueError: as check_hyperparameter; betas that are not two in [0, 1).
    """
    betas, eps = numbers["betas"], numbers["eps"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"betas must be two floats, got {betas!r}")
    beta1, beta2 = (_host_number(f"betas[{i}]", beta) for i, beta in enumerate(betas))
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be in [0, 1), got {tuple(betas)}")
    return Group(
        count,
        check_hyperparameter("lr", numbers["lr"], device),
        beta1,
        beta2,
        float(check_hyperparameter("eps", check_number("eps", eps), device)),
        check_hyperparameter("weight_decay", numbers["weight_decay"], device),
    )


def _host_number(name: str, value: object) -> float:
    """Return a number, given as such or as a tensor of one element on the CPU."""
    if isinstance(value, Tensor):
        if not value.is_cpu or value.numel() != 1:
            raise ValueError(
                f"{name} must be a float, or a tensor of one element on the CPU, got shape "
                f"{tuple(value.shape)} on {value.device}"
            )
        return float(value)
    return check_number(name, value)


def is_each(clip: object) -> bool:
    """Return True for "each", False for "all"; raise ValueError for anything else."""
    if clip not in ("each", "all"):
        raise ValueError(f"clip must be 'each' or 'all', got {clip!r}")
    return clip == "each"


def _check_options(call: Call) -> None:
    """Check all but the lists and the groups.

    Raises: TypeError, ValueError: the message has the argument's name.
    """
    parameter = call.lists["parameters"][0]
    assert parameter is not None
    shapes = {"norms": (len(call.steps),) if call.each else ()}
    for name in ("norms", "skip", "found_inf", "grad_scale", "refused_steps"):
        tensor, shape = getattr(call, name), shapes.get(name, ())
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        check_same_device("parameters[0]", parameter, name, tensor)


def _check_state(call: Call, local: Lists) -> None:
    """Check all tensors but those of the options.

    Raises: TypeError, ValueError: the message has the tensors' names.
    """
    check_lists(local)
    parameters, exp_avgs, exp_avg_sqs, teachers, _, copies, _ = local.values()
    first = parameters[0]
    assert first is not None
    for i, parameter in enumerate(parameters):
        assert parameter is not None
        check_same_device("parameters[0]", first, f"parameters[{i}]", parameter)
        if (exp_avgs[i] is None) != (exp_avg_sqs[i] is None):
            raise ValueError(f"exp_avgs[{i}] and exp_avg_sqs[{i}]: expected both or none")
        if copies[i] is not None and teachers[i] is None:
            raise ValueError(f"teacher_shadows[{i}] is given: expected teachers[{i}]")
    for i, step in enumerate(call.steps):
        if step is not None and (step.shape, step.dtype) != ((), torch.float32):
            raise ValueError(f"steps[{i}] must be fp32 [], got {step.dtype} {tuple(step.shape)}")
        if step is not None:
            check_same_device("parameters[0]", first, f"steps[{i}]", step)
    _check_unit_rows(call)
    check_no_overlap(local, len(local) - 1)


def _check_gradients(local: Lists, addresses: frozenset[int]) -> None:
    """Check the gradients, given the addresses of all other tensors, which are checked."""
    parameters, exp_avgs, *_, gradients = local.values()
    check_lists({"parameters": parameters, "gradients": gradients})
    for i in holes(exp_avgs):
        if gradients[i] is not None:
            raise ValueError(
                f"gradients[{i}] is given: expected exp_avgs[{i}] and exp_avg_sqs[{i}]"
            )
    if not addresses.isdisjoint(map(Tensor.data_ptr, present([gradients]))):
        check_no_overlap(local, len(local) - 1)


def _check_unit_rows(call: Call) -> None:
    """Raise ValueError unless each program of the kernel has whole rows of the normalised copy."""
    index, parameters = call.unit_rows, call.lists["parameters"]
    if index is None:
        return
    if not 0 <= index < len(parameters):
        raise ValueError(f"unit_rows must be the index of a parameter, got {index}")
    p = parameters[index]
    assert p is not None
    columns = p.shape[-1] if p.dim() == 2 else 0
    if columns not in UNIT_COLUMNS or not p.is_contiguous() or not are_plain([[p]]):
        raise ValueError(
            f"unit_rows: expected parameters[{index}] to be a contiguous tensor [K, D] that is not "
            f"sharded, D a power of two up to {UNIT_COLUMNS[-1]}, got {tuple(p.shape)}, "
            f"strides {p.stride()}"
        )
    if call.lists["teacher_shadows"][index] is None:
        raise ValueError(f"unit_rows is given: expected teacher_shadows[{index}]")

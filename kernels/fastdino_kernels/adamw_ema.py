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

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .adamw_ema_arguments import (
    LISTS,
    Call,
    check_gradients,
    check_hyperparameter,
    check_options,
    check_state,
    is_each,
    make_group,
)
from .checks import check_float_tensor, check_lengths
from .clip import check_max_norm
from .dispatch import choose_impl
from .dtensor import local_lists
from .memory import Ranges
from .norms import measure, norm_dtype
from .pointer_table import Cache, make_pointers, thread_cache
from .tensor_lists import Lists, Tables, cached_chunks, key_of, present, triton_takes


@dataclass(frozen=True, eq=False)  # compared by identity, as a part of the gradients' key
class _State:
    """All tensors but the gradients, checked: their tables, None for PyTorch, and their memory."""

    tables: Tables | None
    memory: Ranges


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
    given = (parameters, exp_avgs, exp_avg_sqs, teachers, shadows, teacher_shadows, gradients)
    made = ([None] * n if some is None else list(some) for some in given)
    lists: Lists = dict(zip(LISTS, made))
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
        check_hyperparameter("momentum", momentum, device, most=1),
        norms,
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
    check_options(call)
    local = local_lists(call.lists) if keys is None else call.lists
    state, gradients = _plan(call, local, impl, cache, keys)
    norms = call.norms
    if call.needs_norms and (gradients is None or local is not call.lists):
        norms = _measure(call)
    if state is None or gradients is None:
        from .adamw_ema_torch import torch_adamw_ema_

        torch_adamw_ema_(call, local, norms)
        return norms
    from .adamw_ema_triton import launch_adamw_ema

    return launch_adamw_ema(state, gradients, call, norms)


def _plan(
    call: Call, local: Lists, impl: str, cache: Cache, keys: tuple[Hashable, Hashable] | None
) -> tuple[Tables | None, Tables | None]:
    """Check all tensors; return the tables of the state and of the gradients, None for PyTorch.

    The gradients have a cache entry of their own, as they move more often.
    """
    *state, gradients = local.values()
    parameter = state[0][0]
    assert parameter is not None

    def make_state() -> _State:
        check_state(call, local)
        return _State(_state_tables(call, local, impl), Ranges(present(state)))

    def make_gradients() -> Tables | None:
        check_gradients(local, checked.memory)
        return None if checked.tables is None else _gradient_tables(local, impl)

    if keys is None:
        keys = key_of([gradients]), key_of([*state, call.steps])
    if keys[0] is None or keys[1] is None:
        checked = make_state()
        return checked.tables, make_gradients()
    counts = [group.count for group in call.groups]
    chosen = choose_impl(impl, [parameter])
    key = impl, chosen, counts, call.unit_rows, keys[1]
    checked = cache.get(key, parameter.device, make_state)
    return checked.tables, cache.get((checked, keys[0]), parameter.device, make_gradients)


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
    moving = [p if g is not None else None for p, g in zip(parameters, gradients)]
    if not triton_takes([moving, gradients]) or (held and choose_impl(impl, held) == "torch"):
        return None
    from .clip_triton import CHUNK

    chunks = cached_chunks([0 if g is None else g.numel() for g in gradients], CHUNK, device)
    return Tables(chunks, make_pointers([gradients], device))


def _measure(call: Call) -> Tensor:
    """Return the norms by PyTorch: those of whole gradients, divided by grad_scale."""
    n = len(call.steps)
    gradients = call.lists["gradients"][:n]
    if held := present([gradients]):
        norms = measure(gradients, "gradients").to(norm_dtype(held))
    else:
        norms = torch.zeros(n, device=present(call.lists.values())[0].device)
    norms = norms if call.each else torch.linalg.vector_norm(norms)
    return norms if call.grad_scale is None else norms / call.grad_scale

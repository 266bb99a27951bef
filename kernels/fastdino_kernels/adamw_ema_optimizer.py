"""AdamWEMA: adamw_ema_update_ as a torch.optim.Optimizer that replaces clip, AdamW and EMA."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adamw_ema import update
from .adamw_ema_arguments import LISTS, Call, check_hyperparameter, is_each, make_group
from .checks import is_number
from .clip import check_max_norm
from .dispatch import choose_impl
from .pointer_table import Cache
from .tensor_lists import are_plain, key_of, present

Belonging = Sequence["Tensor | None"] | Mapping[Tensor, Tensor]

# The entries of a torch.optim.AdamW group that choose its implementation, as in its fused form, so
# that state_dicts are interchangeable.
_AS_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}
_REFUSED = {
    "amsgrad": "no maximum of exp_avg_sq is kept",
    "maximize": "minimize the negated loss",
    "differentiable": "autograd does not record the step",
}
# Attributes that pickles and copies keep, in addition to those of any optimizer.
_KEPT = (
    "max_norm", "clip", "momentum", "skip_nonfinite", "impl", "norms", "refused_steps",
    "_teachers", "_shadows", "_teacher_shadows", "_given_as_list", "_unit_rows",
)  # fmt: skip

_STATE = ("step", "exp_avg", "exp_avg_sq")
_NO_STATE = dict.fromkeys(_STATE)
_state_of = operator.itemgetter(*_STATE)
_gradient_of: Callable[[Tensor], Tensor | None] = Tensor.grad.__get__  # type: ignore[union-attr]


@dataclass
class _Arrangement:
    """Lists in the order of the groups, then of the parameters that are only averaged.

    Looking tensors up in dictionaries takes as long as AdamW, so the lists are kept while the
    parameters of the groups and the entries of `state` are the same objects.
    """

    parameters: list[Tensor]  # of the groups
    counts: list[int]  # parameters of each group
    entries: list[Any]  # the values of optimizer.state
    states: list[dict[str, Any]]  # of each parameter, _NO_STATE if it has none
    every: list[Tensor]
    belonging: list[list[Tensor | None]]  # teachers, shadows, teacher_shadows
    unit_index: int | None
    cache: Cache = field(default_factory=Cache)

    def __post_init__(self) -> None:
        self.fixed = present([self.every, *self.belonging])
        self.written = present([self.parameters, *self.belonging])
        self.stateless = [i for i, state in enumerate(self.states) if state is _NO_STATE]
        self.held = [state for state in self.states if state is not _NO_STATE]
        self.are_plain = are_plain([self.fixed])

    def fits(self, parameters: list[Tensor], counts: list[int], entries: Iterable[Any]) -> bool:
        """Return True if these are the objects that were arranged."""
        entries = list(entries)
        return (
            counts == self.counts
            and all(map(operator.is_, parameters, self.parameters))
            and len(entries) == len(self.entries)
            and all(map(operator.is_, entries, self.entries))
        )

    def keys(self, gradients: list[Tensor | None]) -> tuple[Hashable, Hashable] | None:
        """Return everything that checks and tables depend on, gradients first; None if unknown."""
        if not self.are_plain:
            return None
        own, fixed = key_of([gradients]), key_of([self.fixed])
        if own is None or fixed is None:
            return None
        # A moment has the layout that it got from its parameter.
        state = itertools.chain.from_iterable(map(_state_of, self.held))
        return own, (fixed, tuple(map(Tensor.data_ptr, state)))


class AdamWEMA(torch.optim.Optimizer):
    """torch.optim.AdamW that also clips gradients and averages a teacher, in one pass over memory.

        optimizer = AdamWEMA(groups, lr=5e-4, weight_decay=0.04, max_norm=3.0,
                             teacher=dict(zip(student.parameters(), teacher.parameters())))
        loss.backward()
        optimizer.step(momentum=0.996)  # clip_grad_norms_, AdamW.step, ema_update_

    adamw_ema_update_ documents the equations and when a step changes nothing; gradients are only
    read. Parameters whose gradient is None are skipped, as by AdamW, but their teachers are
    updated. `lr` and `weight_decay` of a group, and the momentum, may be 0-d tensors on the device,
    which a captured CUDA graph reads anew (step once before the capture). All parameters are on one
    device.

    state_dict() has the format of torch.optim.AdamW(fused=True), and each can load the other's.
    Loaded values are copied into existing tensors, so that a captured graph stays valid. Teachers
    and copies are not part of it. With torch.amp.GradScaler use scaler.step(optimizer,
    momentum=...) without unscale_: a step that overflows keeps the parameters and updates the
    teacher, as in the paper's code.

    torch.distributed.checkpoint creates the state of a new optimizer by a step with learning rate 0
    and gradients of 0. Such a first step changes nothing.

    Args:
        params: parameters, or groups of them, each with any of lr, betas, eps, weight_decay.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW; betas may be tensors on the CPU.
        amsgrad, maximize, differentiable: only False.
        foreach, capturable, fused: ignored, as the step is fused and can be captured.
        max_norm: the maximum norm of gradients; None: no clipping, and norms is None; inf: the
            norms are only measured.
        clip: "each" gradient by its own norm, or "all" by the global norm, as
            torch.nn.utils.clip_grad_norm_.
        teacher: a tensor or None for each parameter, in the order of the groups, or a mapping
            parameter -> tensor. Keys that are in no group (a frozen weight_g) are averaged too.
        momentum: of the teacher, in [0, 1]; the default of step().
        shadow, teacher_shadow: copies of parameters and of teachers, often in lower precision,
            given like teacher. Only step() rewrites them, so copy them too after loading weights.
        unit_rows: a parameter [K, D] whose teacher's copy gets rows of L2 norm 1; see
            adamw_ema_update_.
        skip_nonfinite: a step with a gradient that is not finite changes nothing, and is counted in
            refused_steps.
        impl: as in adamw_ema_update_.

    Attributes:
        norms: fp32 [n], of the last step's gradients before clipping, in the order of the groups, 0
            without a gradient; their global norm [] if clip is "all"; or None.
        refused_steps: int64 0-d, on the device; None unless skip_nonfinite. Reading it waits for
            the device, so do not read it in every step.

    Raises: ValueError, TypeError: as adamw_ema_update_; a list of another length.

    """

    _step_supports_amp_scaling = True  # for GradScaler, which sets grad_scale and found_inf

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip: str = "each",
        teacher: Belonging | None = None,
        momentum: float | Tensor = 0.996,
        shadow: Belonging | None = None,
        teacher_shadow: Belonging | None = None,
        unit_rows: Tensor | None = None,
        skip_nonfinite: bool = False,
        impl: str = "auto",
    ):
        if max_norm is not None:
            max_norm = check_max_norm(max_norm)
        is_each(clip)
        refused = {"amsgrad": amsgrad, "maximize": maximize, "differentiable": differentiable}
        _refuse(refused)
        given = {"teacher": teacher, "shadow": shadow, "teacher_shadow": teacher_shadow}
        self._given_as_list: list[str] = []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | _AS_ADAMW)
        parameters = self._parameters()
        if not parameters:
            raise ValueError("params must hold at least one parameter, got none")
        choose_impl(impl, parameters)
        check_hyperparameter("momentum", momentum, parameters[0].device, most=1)
        self.max_norm, self.clip, self.momentum = max_norm, clip, momentum
        self.skip_nonfinite, self.impl = skip_nonfinite, impl
        self._teachers, self._shadows, self._teacher_shadows = (
            _by_parameter(name, some, parameters) for name, some in given.items()
        )
        self._given_as_list = [name for name, some in given.items() if isinstance(some, Sequence)]
        if unit_rows is not None and unit_rows not in self._teacher_shadows:
            raise ValueError("unit_rows must be a parameter that has a teacher_shadow")
        self._unit_rows = unit_rows
        self.norms: Tensor | None = None
        self.refused_steps: Tensor | None = None
        self._arranged: _Arrangement | None = None

    @property
    def steps(self) -> Tensor:
        """Return AdamW's step counts, fp32 [n] in the order of the groups, 0 without a state."""
        parameters = self._parameters()
        zero = torch.zeros((), device=parameters[0].device)
        return torch.stack([self.state.get(p, {}).get("step", zero) for p in parameters])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch.optim.AdamW does; teachers given as a mapping apply to it too.

        Warns if teachers or copies were given as a list, which does not cover the new group.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _refuse(group)
            make_group(
                0, group, group["params"][0].device if group["params"] else torch.device("cpu")
            )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group.update(_AS_ADAMW)
        if self._given_as_list:
            warnings.warn(
                f"{' and '.join(self._given_as_list)} given as a list: expected a mapping from "
                "parameters to tensors, which applies to groups added later too; got a new group, "
                "which has none",
                stacklevel=2,
            )

    @torch.compiler.disable
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        momentum: float | Tensor | None = None,
        skip: Tensor | None = None,
    ) -> float | None:
        """Clip gradients, step AdamW, update the teacher and the copies.

        Args:
            closure: computes the loss anew, which is returned.
            momentum: of this step's EMA; by default the attribute.
            skip: 0-d, on the device; if it is not 0, nothing changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        gradients: list[Tensor | None] = list(map(_gradient_of, parameters))
        if (idle := self._without_gradient(gradients)) is not None:
            skip = idle if skip is None else idle.logical_or(skip)
        arranged = self._arrange(parameters, gradients)
        momentum = self.momentum if momentum is None else momentum
        call = self._call(arranged, gradients, momentum, skip)
        self.norms = update(call, self.impl, arranged.cache, arranged.keys(gradients))
        # Autograd sees neither the writes of a kernel nor those of PyTorch's fused AdamW.
        torch.autograd.graph.increment_version(arranged.written)
        return loss

    def _without_gradient(self, gradients: list[Tensor | None]) -> Tensor | None:
        """Return a flag [] that is not 0 if a first step with learning rate 0 has gradients of 0.

        None for other steps. Learning rates on an accelerator are not read.
        """
        some = present([gradients])
        if self.state or not some or not all(_is_zero(group["lr"]) for group in self.param_groups):
            return None
        norms = (gradient.norm() for gradient in some)  # of all shards, so that ranks agree
        whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
        return torch.stack(whole).any().logical_not()

    def _arrange(self, parameters: list[Tensor], gradients: list[Tensor | None]) -> _Arrangement:
        """Return the lists of all tensors, after creating missing states."""
        counts = [len(group["params"]) for group in self.param_groups]
        known = self._arranged
        if (
            known is not None
            and known.fits(parameters, counts, self.state.values())
            and all(gradients[i] is None for i in known.stateless)
        ):
            return known
        for parameter, gradient in zip(parameters, gradients):
            if gradient is not None and not self.state.get(parameter):
                self.state[parameter] = _new_state(parameter)
        given = (self._teachers, self._shadows, self._teacher_shadows)
        trained = set(parameters)
        averaged = dict.fromkeys(p for some in given for p in some if p not in trained)
        every = [*parameters, *averaged]
        unit_index = (i for i, parameter in enumerate(every) if parameter is self._unit_rows)
        self._arranged = _Arrangement(
            parameters,
            counts,
            list(self.state.values()),
            [self.state.get(parameter) or _NO_STATE for parameter in parameters],
            every,
            [[some.get(parameter) for parameter in every] for some in given],
            next(unit_index, None),
        )
        return self._arranged

    def _call(
        self,
        arranged: _Arrangement,
        gradients: list[Tensor | None],
        momentum: float | Tensor,
        skip: Tensor | None,
    ) -> Call:
        device = arranged.parameters[0].device
        refused = self.refused_steps
        if self.skip_nonfinite and (refused is None or refused.device != device):
            _refuse_capture(device)
            self.refused_steps = torch.zeros((), dtype=torch.int64, device=device)
        steps, exp_avgs, exp_avg_sqs = zip(*map(_state_of, arranged.states))
        none = (None,) * (len(arranged.every) - len(arranged.parameters))
        moments = exp_avgs + none, exp_avg_sqs + none
        lists = (arranged.every, *moments, *arranged.belonging, [*gradients, *none])
        groups = zip(arranged.counts, self.param_groups)
        overflow = getattr(self, "found_inf", None)  # an int if no parameter has a gradient
        return Call(
            dict(zip(LISTS, lists)),
            steps,
            [make_group(count, group, device) for count, group in groups],
            None if self.max_norm is None else check_max_norm(self.max_norm),
            is_each(self.clip),
            check_hyperparameter("momentum", momentum, device, most=1),
            skip=skip,
            found_inf=overflow if isinstance(overflow, Tensor) else None,
            grad_scale=getattr(self, "grad_scale", None),
            refused_steps=self.refused_steps,
            unit_rows=arranged.unit_index,
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" in state:  # a copy or a pickle
            super().__setstate__(state)
            self._arranged = None
            return
        # From load_state_dict, between its hooks. Nothing has changed if a check raises.
        for group in state["param_groups"]:
            _refuse(group)
        for loaded in state["state"].values():
            if not set(_STATE) <= loaded.keys():
                raise ValueError(f"expected the state of an AdamW, got one of {', '.join(loaded)}")
        for group, own in zip(state["param_groups"], self.param_groups):
            group.update(_AS_ADAMW)
            for name in ("lr", "weight_decay"):
                group[name] = _copied(own[name], group[name])
        for parameter, loaded in state["state"].items():
            count = torch.as_tensor(loaded["step"], dtype=torch.float32, device=parameter.device)
            loaded["step"] = count.clone()
            for name in _STATE:
                loaded[name] = _copied(self.state.get(parameter, {}).get(name), loaded[name])
        super().__setstate__(state)


def _copied(own: Any, loaded: Any) -> Any:
    """Return a loaded value, copied into the own tensor if there is one of its shape."""
    if isinstance(own, Tensor) and own.shape == torch.as_tensor(loaded).shape:
        with torch.no_grad():
            return own.copy_(torch.as_tensor(loaded))
    return loaded


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    _refuse_capture(parameter.device)
    moments = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
    count = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return dict(zip(_STATE, (count, *moments)))


def _refuse(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of torch.optim.AdamW that changes the result."""
    for name, reason in _REFUSED.items():
        if options.get(name):
            raise ValueError(f"{name}=True is not supported: {reason}")


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the state of a parameter is missing during CUDA-graph capture: step once, with the "
            "same gradients present, before capturing"
        )


def _by_parameter(
    name: str, given: Belonging | None, parameters: list[Tensor]
) -> dict[Tensor, Tensor]:
    """Map each parameter to its tensor."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    tensors = list(given)
    if len(tensors) != len(parameters):
        raise ValueError(
            f"{name} must have a tensor or None for each parameter of the groups, "
            f"expected {len(parameters)}, got {len(tensors)}"
        )
    return {p: t for p, t in zip(parameters, tensors) if t is not None}


def _is_zero(rate: object) -> bool:
    """Return True for a learning rate of 0 on the host; others are not read."""
    on_host = rate.is_cpu if isinstance(rate, Tensor) else is_number(rate)
    return on_host and float(rate) == 0  # type: ignore[arg-type]

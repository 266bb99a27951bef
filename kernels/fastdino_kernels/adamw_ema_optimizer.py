"""AdamWEMA: adamw_ema_update_ as a torch.optim.Optimizer that replaces clip, AdamW and EMA."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw_ema import update
from .adamw_ema_arguments import Call, Tensors, check_hyperparameter, make_group
from .clip import check_max_norm
from .dispatch import choose_impl

Belonging = Sequence["Tensor | None"] | Mapping[Tensor, Tensor]

# The other entries of a torch.optim.AdamW group, so that state_dicts are interchangeable.
_AS_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}
# Attributes that pickles and copies keep, in addition to those of any optimizer.
_KEPT = (
    "max_norm", "momentum", "skip_nonfinite", "impl", "norms", "steps", "refused_steps",
    "_teachers", "_shadows", "_teacher_shadows", "_unit_rows",
)  # fmt: skip


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

    Args:
        params: parameters, or groups of them, each with any of lr, betas, eps, weight_decay.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW.
        max_norm: clips each gradient by its own norm; None: no clipping, and norms is None; inf:
            the norms are only measured.
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
            without a gradient; or None.
        steps: fp32 [n]; the counts in `state` are views of it.
        refused_steps: int64 0-d, on the device; None unless skip_nonfinite. Reading it waits for
            the device, so do not read it in every step.

    Raises: ValueError, TypeError: as adamw_ema_update_; a list of another length.

    """

    _step_supports_amp_scaling = True  # for GradScaler, which sets grad_scale and found_inf

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        *,
        max_norm: float | None = None,
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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | _AS_ADAMW)
        parameters = self._parameters()
        if not parameters:
            raise ValueError("params must hold at least one parameter, got none")
        choose_impl(impl, parameters)
        check_hyperparameter("momentum", momentum, parameters[0].device, most=1)
        self.max_norm, self.momentum = max_norm, momentum
        self.skip_nonfinite, self.impl = skip_nonfinite, impl
        self._teachers = _by_parameter("teacher", teacher, parameters)
        self._shadows = _by_parameter("shadow", shadow, parameters)
        self._teacher_shadows = _by_parameter("teacher_shadow", teacher_shadow, parameters)
        if unit_rows is not None and unit_rows not in self._teacher_shadows:
            raise ValueError("unit_rows must be a parameter that has a teacher_shadow")
        self._unit_rows = unit_rows
        self._unit_index: int | None = None
        self.norms: Tensor | None = None
        self.steps: Tensor | None = None
        self.refused_steps: Tensor | None = None
        self._views: list[Tensor] = []
        self._arranged: list[Tensor] = []
        self._belonging: list[list[Tensor | None]] = []

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch.optim.AdamW does; teachers given as a mapping apply to it too."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("amsgrad", "maximize", "differentiable"):
            if group.get(name):
                raise ValueError(f"{name} is not supported, got {group[name]!r}")
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        make_group(0, 0, group, device)

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
        self.norms = update(self._call(momentum, skip), self.impl)
        return loss

    def _call(self, momentum: float | Tensor | None, skip: Tensor | None) -> Call:
        parameters = self._parameters()
        device = parameters[0].device
        self._make_counters(parameters, device)
        assert self.steps is not None
        groups, first = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            groups.append(make_group(first, count, group, device))
            first += count
        momentum = self.momentum if momentum is None else momentum
        overflow = getattr(self, "found_inf", None)  # an int if no parameter has a gradient
        return Call(
            self._tensors(parameters),
            groups,
            self.steps,
            None,
            self.max_norm,
            check_hyperparameter("momentum", momentum, device, most=1),
            skip,
            overflow if isinstance(overflow, Tensor) else None,
            getattr(self, "grad_scale", None),
            self.refused_steps,
            self._unit_index,
        )

    def _tensors(self, parameters: list[Tensor]) -> Tensors:
        """Collect the tensors of the groups' parameters, then those of averaged-only parameters."""
        known = self._arranged
        if len(known) < len(parameters) or not all(map(operator.is_, parameters, known)):
            self._arrange(parameters)
        gradients: list[Tensor | None] = []
        states: list[dict[str, Any]] = []
        for i, parameter in enumerate(parameters):
            gradient = parameter.grad
            state = self.state.get(parameter, {})
            if gradient is not None and state.get("step") is not self._views[i]:
                state = self._bind(i, parameter)
            gradients.append(gradient)
            states.append(state)
        untrained: list[Tensor | None] = [None] * (len(self._arranged) - len(parameters))
        return Tensors(
            self._arranged,
            gradients + untrained,
            [state.get("exp_avg") for state in states] + untrained,
            [state.get("exp_avg_sq") for state in states] + untrained,
            *self._belonging,
        )

    def _arrange(self, parameters: list[Tensor]) -> None:
        """Arrange teachers and copies in the order of the parameters.

        Dictionaries of tensors are slow: looking them up in every step would take as long as AdamW.
        """
        given = (self._teachers, self._shadows, self._teacher_shadows)
        trained = set(parameters)
        others = dict.fromkeys(p for some in given for p in some if p not in trained)
        self._arranged = [*parameters, *others]
        self._belonging = [[some.get(p) for p in self._arranged] for some in given]
        unit = (i for i, p in enumerate(self._arranged) if p is self._unit_rows)
        self._unit_index = next(unit, None)

    def _make_counters(self, parameters: list[Tensor], device: torch.device) -> None:
        """Make steps, its views and refused_steps if they are missing or on another device."""
        steps, refused = self.steps, self.refused_steps
        if steps is None or len(steps) != len(parameters) or steps.device != device:
            self._refuse_capture(device)
            self.steps = torch.zeros(len(parameters), dtype=torch.float32, device=device)
            self._bind_all(parameters)
        if self.skip_nonfinite and (refused is None or refused.device != device):
            self._refuse_capture(device)
            self.refused_steps = torch.zeros((), dtype=torch.int64, device=device)

    def _bind_all(self, parameters: list[Tensor]) -> None:
        """Copy all existing step counts into steps."""
        assert self.steps is not None
        self._views = list(self.steps.unbind())
        for i, parameter in enumerate(parameters):
            if self.state.get(parameter):
                self._bind(i, parameter)

    def _bind(self, index: int, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made if missing, with its count as a view of steps."""
        state: dict[str, Any] = self.state[parameter]
        count = self._views[index]
        if state.get("step") is count:
            return state
        self._refuse_capture(count.device)
        if not state:
            state["step"] = count.zero_()
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        else:  # loaded, or another optimizer's
            given = state["step"]
            state["step"] = count.copy_(given) if isinstance(given, Tensor) else count.fill_(given)
        return state

    @staticmethod
    def _refuse_capture(device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the state of a parameter is missing during CUDA-graph capture: step once, with "
                "the same gradients present, before capturing"
            )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an AdamWEMA or a torch.optim.AdamW.

        Values are copied into existing tensors: moments, counts, and lr and weight_decay if they
        are tensors. Missing moments are created, as by PyTorch.

        Raises: ValueError: groups or parameters that do not match, amsgrad, maximize, or another
            optimizer's state.
        """
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"expected a state_dict without {name}")
        for state in state_dict["state"].values():
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
                raise ValueError(f"expected the state of an AdamW, got one of {', '.join(state)}")
        moments = {p: dict(state) for p, state in self.state.items()}
        numbers = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, given in zip(self.param_groups, numbers, strict=True):
            group.update(_AS_ADAMW)
            for name, tensor in zip(("lr", "weight_decay"), given, strict=True):
                if isinstance(tensor, Tensor):
                    tensor.copy_(torch.as_tensor(group[name]))
                    group[name] = tensor
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                tensor = moments.get(parameter, {}).get(name)
                if tensor is not None and tensor.shape == state[name].shape:
                    state[name] = tensor.copy_(state[name])
        parameters = self._parameters()
        self._make_counters(parameters, parameters[0].device)
        self._bind_all(parameters)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "steps" in state:  # a copy or a pickle, not load_state_dict
            self._arranged, self._views = [], []
            if self.steps is not None:  # a pickled tensor and its views no longer share memory
                self._bind_all(self._parameters())


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
    return {p: t for p, t in zip(parameters, tensors, strict=True) if t is not None}

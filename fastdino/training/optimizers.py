"""Parameter groups and optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastdino_kernels import AdamWEMA
from torch import Tensor, nn

from fastdino.models.head import MultiCropWrapper


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two groups: with weight decay, and without (biases and 1-D tensors).

    So pos_embed, cls_token and a trained weight_g (K x 1) are decayed, as in the paper's code.
    """
    decayed: list[Tensor] = []
    not_decayed: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith(".bias") or parameter.ndim == 1
            (not_decayed if exempt else decayed).append(parameter)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


def build_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """adamw, sgd or lars over parameter_groups(module); lr and weight decay are set every step."""
    groups = parameter_groups(module)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    assert name == "lars", name
    return LARS(groups, momentum=0.9)


def build_fused_adamw(
    student: MultiCropWrapper, teacher: MultiCropWrapper, *, clip_grad: float, skip_nonfinite: bool
) -> AdamWEMA:
    """AdamW that clips each gradient by its norm and averages the teacher in the same pass.

    The teacher's head.last_layer.cached_weight is updated too, if it exists.

    Args:
        clip_grad: the largest norm of a gradient; 0: no clipping.
        skip_nonfinite: a step with a gradient that is not finite changes nothing.
    """
    prototypes, cached = student.head.last_layer.weight_v, teacher.head.last_layer.cached_weight
    return AdamWEMA(
        parameter_groups(student),
        lr=0.0,
        max_norm=clip_grad or math.inf,
        teacher=dict(zip(student.parameters(), teacher.parameters(), strict=True)),
        teacher_shadow=None if cached is None else {prototypes: cached},
        unit_rows=None if cached is None else prototypes,
        skip_nonfinite=skip_nonfinite,
    )


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled layer by layer (You et al. 2017, arXiv 1708.03888).

    g = grad + weight_decay * p;  g *= eta * ||p|| / ||g|| where neither norm is 0;
    mu = momentum * mu + g;  p -= lr * mu.  1-D tensors: neither decay nor scaling.

    Args:
        params: parameters or groups of them.
        lr, weight_decay, momentum: as above.
        eta: the trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        update = parameter.grad
        assert update is not None
        if parameter.ndim != 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            parameter_norm, update_norm = parameter.norm(), update.norm()
            trust = group["eta"] * parameter_norm / update_norm
            scaled = (parameter_norm > 0) & (update_norm > 0)
            update = update * torch.where(scaled, trust, torch.ones_like(trust))
        state = self.state[parameter]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(parameter)
        state["mu"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["mu"], alpha=-group["lr"])

"""Validation of the state of an optimizer in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdino.errors import CheckpointError

# What an optimizer keeps for each parameter.
_STATES = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "lars": ("mu",)}


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise CheckpointError unless `state` is of the same kind, number and sizes of parameters."""

    def describe(groups: list[dict[str, Any]]) -> str:
        kinds = {"betas": "adamw", "eta": "lars", "nesterov": "sgd"}
        kind = next((kinds[key] for key in kinds if key in groups[0]), "unknown")
        return f"{kind} over {' + '.join(str(len(group['params'])) for group in groups)} parameters"

    saved, own = describe(state["param_groups"]), describe(optimizer.param_groups)
    if saved != own:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved}, this run's is {own}: use the --optimizer and "
            "--norm_last_layer of the checkpoint's run"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = _STATES[own.split()[0]]
    for index, values in state["state"].items():
        for name in names:
            if name not in values:
                raise CheckpointError(f"the optimizer's parameter {index} has no {name}")
        _check_moments(parameters[index], {name: values[name] for name in names}, index)


def with_own_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with this optimizer's lr, betas and other settings instead of the saved."""
    pairs = zip(optimizer.param_groups, state["param_groups"], strict=True)
    groups = [{**own, "params": saved["params"]} for own, saved in pairs]
    return {"state": state["state"], "param_groups": groups}


def _check_moments(parameter: Tensor, values: dict[str, Any], index: int) -> None:
    """Raise CheckpointError unless the moments have the shape of their parameter.

    PyTorch's fused AdamW does not check it, and would read and write other memory.
    """
    for name, value in values.items():
        if value is None:  # SGD before the first step
            continue
        shape = torch.Size() if name == "step" else parameter.shape
        dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if name == "step" and isinstance(value, (int, float)):  # an older PyTorch's
            continue
        if not dense or value.shape != shape or value.is_complex():
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"{name} of the optimizer's parameter {index} is {found}, expected a dense tensor "
                f"{list(shape)} of real numbers"
            )

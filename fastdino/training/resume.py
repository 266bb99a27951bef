"""What a resumed run needs of a Trainer, under the keys of the paper's checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdino import distributed
from fastdino.checkpoint import check_shapes, strip_prefix
from fastdino.errors import CheckpointError
from fastdino.training.sharding import load_module, load_optimizer, whole

if TYPE_CHECKING:
    from fastdino.training.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Trainer.state_dict()."""
    state = {
        "student": whole(trainer.student.state_dict()),
        "teacher": whole(trainer.teacher.state_dict()),
        "optimizer": _optimizer_state(trainer.optimizer),
        "dino_loss": trainer.loss.state_dict(),
        "epoch": trainer.epoch,
        "iteration": trainer.iteration,
        "steps_per_epoch": trainer.steps_per_epoch,
        "generators": distributed.gather(_generators(trainer.device)),
    }
    if trainer.scaler.is_enabled():
        state["fp16_scaler"] = trainer.scaler.state_dict()
    return state


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict with whole tensors, and lr and weight decay as floats wherever they are."""
    state: dict[str, Any] = whole(optimizer.state_dict())
    state["param_groups"] = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    return state


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Trainer.load_state_dict(state)."""
    for key in ("student", "teacher", "optimizer", "dino_loss", "epoch"):
        if key not in state:
            raise CheckpointError(f"the checkpoint has no {key!r}: it has {', '.join(state)}")
    steps = state.get("steps_per_epoch", trainer.steps_per_epoch)
    if steps != trainer.steps_per_epoch:
        raise CheckpointError(
            f"the checkpoint's run had {steps} steps an epoch, this one has "
            f"{trainer.steps_per_epoch}: resume with the same images and the same global batch "
            "(--batch_size_per_gpu * --grad_accum * processes); with another number of "
            "processes, --last_batch drop or pad can be what gives as many"
        )
    networks = {name: strip_prefix(state[name], "module.") for name in ("student", "teacher")}
    networks["dino_loss"] = state["dino_loss"]
    modules = {"student": trainer.student, "teacher": trainer.teacher, "dino_loss": trainer.loss}
    for name, module in modules.items():
        try:
            check_shapes(module, networks[name], name)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; --arch, --patch_size, --out_dim, --use_bn_in_head and "
                "--global_crops_size must be those of the checkpoint's run"
            ) from error
    check_optimizer(trainer.optimizer, state["optimizer"])
    for name, module in modules.items():
        load_module(module, networks[name])
    load_optimizer(trainer.optimizer, state["optimizer"])
    if trainer.scaler.is_enabled() and "fp16_scaler" in state:
        trainer.scaler.load_state_dict(state["fp16_scaler"])
    trainer.iteration = state.get("iteration", state["epoch"] * trainer.steps_per_epoch)
    generators = state.get("generators", [])
    if len(generators) == distributed.world_size():
        _set_generators(generators[distributed.rank()], trainer.device)


def start_from(trainer: Trainer, backbone: dict[str, Tensor]) -> None:
    """Trainer.start_from(backbone)."""
    named = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    for network in (trainer.student, trainer.teacher):
        state = {k: v for k, v in network.state_dict().items() if not k.startswith("backbone.")}
        state = {**whole(state), **named}
        check_shapes(network, state, "the backbone to start from")
        load_module(network, state)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The random generators that stochastic depth draws from, in this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_generators(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises CheckpointError where `state` is of another optimizer, or of other parameters."""

    def describe(groups: list[dict[str, Any]]) -> str:
        kinds = {"betas": "adamw", "eta": "lars", "nesterov": "sgd"}
        kind = next((kinds[key] for key in kinds if key in groups[0]), "unknown")
        return f"{kind} over {' + '.join(str(len(group['params'])) for group in groups)} parameters"

    saved, own = describe(state["param_groups"]), describe(optimizer.param_groups)
    if saved != own:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved}, this run's is {own}: --optimizer and "
            "--norm_last_layer must be those of the checkpoint's run"
        )

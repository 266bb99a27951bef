"""Networks sharded over ranks with FSDP2 (torch.distributed.fsdp.fully_shard): --fsdp.

Each rank keeps a shard of every parameter, gradient and moment of student and teacher, and gathers
the weights of a block while it computes with them. Checkpoints can be resumed with or without
sharding, and with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from fastdino.errors import ConfigError
from fastdino.models.batch_norm import has_batch_norm
from fastdino.models.head import MultiCropWrapper
from fastdino.models.vit import VisionTransformer
from fastdino.optimizer_state import with_own_settings


def check_sharding(network: nn.Module) -> None:
    """Raise ConfigError unless --fsdp is supported for this network."""
    if has_batch_norm(network):
        raise ConfigError(
            "--fsdp true does not support batch norm, whose statistics are not sharded: remove "
            "--fsdp or --use_bn_in_head, or use a vit_* or xcit_* architecture"
        )


def shard(network: MultiCropWrapper, device: torch.device) -> None:
    """Shard a network over all ranks, in place: one group per block, the head, and the rest."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parts: list[nn.Module] = [network.head, network]
    if isinstance(network.backbone, VisionTransformer):
        parts = [*network.backbone.blocks, *parts]
    for part in parts:  # inner modules first
        # The teacher has no backward pass, after which FSDP would otherwise reshard.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


@contextmanager
def no_gradient_sync(network: nn.Module) -> Iterator[None]:
    """Accumulate the gradients of a sharded network locally, without reducing them."""
    assert isinstance(network, FSDPModule)
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def full_tensors(state: Any) -> Any:
    """Gather every sharded tensor in `state` on the CPU; all ranks must call it."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), state)


def empty_like_own(
    module_states: dict[str, dict[str, Tensor]], optimizer: torch.optim.Optimizer
) -> Callable[[tuple[Any, ...], torch.Size, torch.dtype], Tensor]:
    """Return a function that makes the tensor for a part of a checkpoint, sharded like a run's.

    Args: module_states: the tensors of a run by the keys of the checkpoint.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def make(place: tuple[Any, ...], size: torch.Size, dtype: torch.dtype) -> Tensor:
        own: Tensor | None = None
        if len(place) == 4 and place[:2] == ("optimizer", "state") and place[2] < len(parameters):
            own = parameters[place[2]]
        elif len(place) == 2:
            own = module_states.get(place[0], {}).get(place[1])
        if isinstance(own, DTensor) and own.shape == size:
            return torch.empty_like(own.detach(), dtype=dtype)
        return torch.empty(size, dtype=dtype)

    return make


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load full tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: _shard_like(own[name], t) for name, t in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load full tensors into an optimizer whose parameters may be sharded.

    Settings such as betas stay those of the optimizer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        index: {
            # Fused updates ignore strides, such as those of one number that was expanded.
            name: _shard_like(parameters[index], value.contiguous())
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict(with_own_settings(optimizer, {**state, "state": sharded}))


def _shard_like(own: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's shard of `tensor` if `own` is sharded, else `tensor`."""
    if not isinstance(own, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)

"""Networks sharded over the processes (FSDP2, torch.distributed.fsdp.fully_shard): --fsdp.

Each process keeps its share of every parameter, gradient and moment, of student and teacher alike,
and gathers a block's weights while it computes with them. Checkpoints hold whole tensors: one
process or many, sharded or not, can go on with them.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from fastdino.models.head import MultiCropWrapper
from fastdino.models.vit import VisionTransformer


def check_sharding(network: nn.Module) -> None:
    """Raises ConfigError where --fsdp cannot be."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ConfigError(
            "--fsdp true shards over processes, and there is one: start several with torchrun"
        )
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        raise ConfigError(
            "--fsdp true does not go with batch norm, whose statistics are not sharded: leave out "
            "--fsdp or --use_bn_in_head, or take a vit_* or xcit_* architecture"
        )


def shard(network: MultiCropWrapper, device: torch.device) -> None:
    """Shards a network's parameters over all processes, in place: by block, head, and the rest."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parts: list[nn.Module] = [network.head, network]
    if isinstance(network.backbone, VisionTransformer):
        parts = [*network.backbone.blocks, *parts]
    for part in parts:  # the inner ones first
        # The teacher has no backward pass after which its weights would be given back.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gradients_unreduced(network: nn.Module) -> Iterator[None]:
    """Within the block gradients of a sharded network are summed up here, and not exchanged."""
    assert isinstance(network, FSDPModule)
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def whole(state: Any) -> Any:
    """`state` with every sharded tensor gathered, on the CPU; all processes must call it."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), state)


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """module.load_state_dict with whole tensors, each process taking its share."""
    own = module.state_dict()
    module.load_state_dict({name: _like(own[name], tensor) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict with whole tensors, each process taking its share."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shared = {
        index: {
            name: _like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shared})


def _like(own: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself, or this process's share of it where `own` is sharded."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)

"""torch.compile over the blocks and the head of a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from fastdino_kernels.dispatch import toolchain_problem
from torch import Tensor

from fastdino.models.head import MultiCropWrapper
from fastdino.models.vit import Block, VisionTransformer

RECOMPILE_LIMIT = 64  # compilations of one function, after which PyTorch refuses more


def compile_problem(device: torch.device) -> str | None:
    """Return the reason why torch.compile cannot generate code for `device`; None if it can."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"Triton needs sm_70 or newer, this GPU is sm_{major}{minor}"
        return toolchain_problem()
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(shutil.which(compiler) for compiler in compilers):
        return None
    return f"it needs a C++ compiler on a CPU: install one of {', '.join(compilers)}"


def _recompute_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile with Inductor, allowed to recompute the inputs of matrix products in backward.

    By default Inductor keeps them (in the head, the normalised W), which would undo
    Block.recompute. The setting is patched only for these graphs, not for the whole process.
    """
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs)
    return compiled


def compile_network(network: MultiCropWrapper) -> None:
    """Compile the blocks of a vit_* backbone, which share their code, and the head; in place.

    The names in the state_dict stay the same. A new batch or crop size triggers a compilation.
    """
    # A block is compiled for student and teacher, first and last block, and each crop size.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)
    # Under DistributedDataParallel, PyTorch splits graphs where a gradient bucket is full, 1 MB at
    # first: inside each block. Older versions cannot split xformers' autograd.Function at all.
    # Blocks are small enough that their buckets are reduced while the next blocks run.
    torch._dynamo.config.optimize_ddp = False
    # Compile forward, not the module: FSDP's hooks, which gather the weights, cannot be compiled.
    blocks = []
    if isinstance(network.backbone, VisionTransformer):
        blocks = [block for block in network.backbone.blocks if isinstance(block, Block)]
    recompute = any(block.recompute for block in blocks)
    options: dict[str, Any] = {"backend": _recompute_backend} if recompute else {}
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, fullgraph=True, dynamic=False, **options
        )
    head = network.head
    head.forward = torch.compile(head.forward, dynamic=False, **options)  # type: ignore[method-assign]

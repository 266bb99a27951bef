"""torch.compile over the blocks and head of a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from fastdino_kernels.dispatch import triton_problem
from torch import Tensor

from fastdino.models.head import MultiCropWrapper
from fastdino.models.vit import Block, VisionTransformer

_COMPILATIONS = 64  # of one function, beyond which PyTorch would refuse


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for `device`; None where it can."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"Triton needs sm_70 or newer, this GPU is sm_{major}{minor}"
        return triton_problem(device.type)
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(shutil.which(compiler) for compiler in compilers):
        return None
    return f"a CPU needs a C++ compiler: none of {', '.join(compilers)} is there"


def _recomputing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Inductor, for what Block.recompute asks: else it keeps what backward products are to read.

    (Of the head that is the normalised W.) Only while these graphs are compiled: what others in the
    process keep is theirs to say.
    """
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs)
    return compiled


def compile_network(network: MultiCropWrapper) -> None:
    """Compiles a vit_* backbone's blocks, which share their compilations, and the head; in place.

    Names in the state_dict stay. Each new size of a batch or a crop is compiled anew.
    """
    # A block is compiled for student and teacher, first and last block, and each size of crops.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _COMPILATIONS)
    # Within DistributedDataParallel a graph would be split where a message is full, after 1 MB at
    # first: in the midst of each block. An autograd.Function, as xformers' is, older PyTorch cannot
    # split at all. Blocks are small enough for their messages to go while the next ones run.
    torch._dynamo.config.optimize_ddp = False
    # Not the modules: their hooks, with which FSDP gathers the weights, cannot be compiled.
    blocks = []
    if isinstance(network.backbone, VisionTransformer):
        blocks = [block for block in network.backbone.blocks if isinstance(block, Block)]
    recompute = any(block.recompute for block in blocks)
    options: dict[str, Any] = {"backend": _recomputing} if recompute else {}
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, fullgraph=True, dynamic=False, **options
        )
    head = network.head
    head.forward = torch.compile(head.forward, dynamic=False, **options)  # type: ignore[method-assign]

"""DistributedDataParallel with gradient buckets that stay the same from the first step on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastdino.models.head import MultiCropWrapper
from fastdino.models.vit import VisionTransformer


def data_parallel(
    network: MultiCropWrapper, device: torch.device, *, static: bool
) -> DistributedDataParallel:
    """Wrap a network; its parameters are those of rank 0 afterwards.

    PyTorch arranges the buckets anew after the first backward pass, or if it is static the second,
    in the order in which gradients became ready. The place of a gradient in its bucket decides in
    which order three or more ranks are added, so that a resumed run, which starts with other
    buckets, would have other bits. Here two passes of zeros come first, in the order of a real
    backward pass: from the last parameter to the first, and the embedding of the patches at the
    end. Not for other networks than a VisionTransformer: they may have parameters without a
    gradient, which the passes of zeros would not show.

    Args: static: every backward pass is reduced and uses the same parameters.
    """
    parallel = DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static,
    )
    if not isinstance(network.backbone, VisionTransformer):
        return parallel
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    trained.sort(key=lambda pair: "patch_embed." not in pair[0])

    def zero() -> Tensor:
        return torch.stack([0 * p.sum() for _, p in trained]).sum()

    setattr(network, "forward", zero)  # noqa: B010, mypy rejects the assignment
    try:
        for _ in range(2):
            parallel().backward()
            network.zero_grad()
    finally:
        del network.forward
    return parallel

"""The loader of a training run, chosen by --crops and --decode."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from fastdino.data.image_dataset import ImageDataset
from fastdino.data.loader_base import CropLoader

if TYPE_CHECKING:
    from fastdino.config import TrainConfig


def build_loader(
    config: TrainConfig,
    dataset: ImageDataset,
    *,
    crops: str,
    decode: str,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> CropLoader:
    """Build the loader of a crop backend.

    Args:
        crops: "fused", "dali" or "torchvision", as resolved by fastdino.runtime.
        decode: "cpu", "gpu" or "pillow", the decoder of the fused crops.

    Raises: DataError: fewer images than a batch.
    """
    options: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": device}
    if crops == "fused":
        fused = importlib.import_module("fastdino.data.loader_fused")
        return fused.FusedLoader(config, dataset, decode=decode, **options)
    if crops == "dali":
        return importlib.import_module("fastdino.data.loader_dali").DaliLoader(
            config, dataset, **options
        )
    chain = importlib.import_module("fastdino.data.loader_torchvision")
    return chain.TorchvisionLoader(config, dataset, **options)

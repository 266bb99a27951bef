"""The loader of a training run, chosen by --crops and --decode."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from fastdino.augmentation import dali_problem, fused_problem
from fastdino.data.decoding import dali_decode_problem
from fastdino.data.image_dataset import ImageDataset
from fastdino.data.loader_base import CropLoader
from fastdino.errors import ConfigError

if TYPE_CHECKING:
    from fastdino.config import TrainConfig


def build_loader(
    config: TrainConfig,
    source: ImageDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> CropLoader:
    """Build the loader of config.crops; choose_crops and choose_decode resolve "auto".

    Raises:
        ConfigError: --crops or --decode is unavailable.
        DataError: fewer images than a batch.
    """
    name, why = choose_crops(config.crops, device)
    decode, why_decode = choose_decode(config.decode, name, device)
    options: dict[str, Any] = {
        "rank": rank, "world_size": world_size, "device": device, "why": why
    }  # fmt: skip
    if name == "fused":
        fused = importlib.import_module("fastdino.data.loader_fused")
        return fused.FusedLoader(config, source, decode=decode, why_decode=why_decode, **options)
    if name == "dali":
        return importlib.import_module("fastdino.data.loader_dali").DaliLoader(
            config, source, **options
        )
    chain = importlib.import_module("fastdino.data.loader_torchvision")
    return chain.TorchvisionLoader(config, source, **options)


def choose_crops(asked: str, device: torch.device | str) -> tuple[str, str]:
    """Who makes the crops, and why: "auto" is fused where it works, then dali, then torchvision.

    Raises: ConfigError: fused or dali asked for where it cannot be.
    """
    about = {
        "fused": "the paper's crops, exact",
        "dali": "near PIL; --crops fused and --crops torchvision are exact",
        "torchvision": "the paper's chain, exact",
    }
    problems: list[str] = []
    for name, problem in (("fused", fused_problem), ("dali", dali_problem)):
        if asked not in ("auto", name):
            continue
        found = problem(device)
        if found is None:
            return name, "; ".join([about[name], *problems])
        if asked == name:
            raise ConfigError(f"--crops {name}: {found}")
        problems.append(found)
    return "torchvision", "; ".join([about["torchvision"], *problems])


def choose_decode(asked: str, crops: str, device: torch.device | str) -> tuple[str, str]:
    """Who decodes for these crops, "pillow", "dali" or "nvjpeg", and why.

    crops: what choose_crops chose.

    Raises: ConfigError: asked for what cannot be.
    """
    cuda = torch.device(device).type == "cuda"
    if crops != "fused":
        if asked != "auto":
            raise ConfigError(
                f"--decode {asked} is for --crops fused, and these crops are made by --crops "
                f"{crops}, which decodes by itself: leave --decode out"
            )
        decoder = "pillow" if crops == "torchvision" else "nvjpeg" if cuda else "dali"
        return decoder, f"as --crops {crops} does"
    if asked == "pillow":
        return "pillow", "asked for"
    if asked == "gpu" and not cuda:
        raise ConfigError(
            "--decode gpu is nvJPEG's, which needs a GPU, and this run is on the CPU: --decode cpu "
            "works, and is exact"
        )
    problem = dali_problem() if asked == "gpu" else dali_decode_problem()
    if problem is None:
        about = "near Pillow's pixels" if asked == "gpu" else "Pillow's pixels"
        return "nvjpeg" if asked == "gpu" else "dali", about
    if asked != "auto":
        raise ConfigError(
            f"--decode {asked}: {problem}; --decode pillow works without, and is exact"
        )
    return "pillow", problem

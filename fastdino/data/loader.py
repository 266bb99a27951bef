"""Who makes the crops: the one contract of the loaders, and the choice between them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from fastdino_kernels.dispatch import triton_problem
from torch import Tensor

from fastdino.data.image_dataset import ImageDataset
from fastdino.errors import ConfigError

if TYPE_CHECKING:
    from fastdino.config import TrainConfig


class CropLoader(Protocol):
    """Batches of crops, the same for the same (config, source, rank, world_size, epoch, step).

    B = batch_size_per_gpu * grad_accum; N = local_crops_number.
    """

    steps_per_epoch: int
    source: ImageDataset
    skipped: dict[str, str]
    """Files found broken while running, with the reason; the scan's are in source.skipped."""
    description: str
    """One phrase for the run's first line: which loader it is, and why."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Tensor]]:
        """The batches start_step, start_step + 1, ...: 2 + N tensors [B, 3, size, size], fp32.

        One epoch at a time: starting another ends the one before.
        """
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...


def build_loader(
    config: TrainConfig,
    source: ImageDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> CropLoader:
    """The loader that config.crops names; choose_crops and choose_decode say what "auto" is.

    Raises:
        ConfigError: --crops or --decode where it cannot be.
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


def fused_problem(device: torch.device | str) -> str | None:
    """Why the fused crops cannot be made for a run on this device; None where they can."""
    if torch.device(device).type == "cuda":
        problem = triton_problem("cuda")
        return problem and f"no fused crops on CUDA: {problem}"
    try:
        importlib.import_module("fastdino.augmentation.cpu")
    except Exception as error:  # Whatever a library that does not fit this machine raises.
        if _is_missing(error, "numba"):
            return 'Numba is not installed: pip install "fastdino[train]"'
        return f"Numba does not work here: {_first_line(error)}"
    return None


def dali_problem(device: torch.device | str = "cpu") -> str | None:
    """Why DALI cannot be used, and how to mend that; None where it can, whatever the device."""
    try:
        importlib.import_module("fastdino.data.loader_dali")
    except Exception as error:  # Whatever a library that does not fit this machine raises.
        if _is_missing(error, "nvidia"):
            return f"DALI is not installed: {_install()}"
        return f"DALI does not work here: {_first_line(error)}"
    return None


def dali_decode_problem() -> str | None:
    """Why DALI cannot decode in Pillow's place on the CPU; None where it can."""
    problem = dali_problem()
    if problem is not None:
        return problem
    try:
        found: str | None = importlib.import_module("fastdino.data.dali_decoding").cpu_problem()
    except Exception as error:  # Whatever a library that does not fit this machine raises.
        return f"DALI does not work here: {_first_line(error)}"
    return found


def _is_missing(error: Exception, package: str) -> bool:
    if not isinstance(error, ModuleNotFoundError):
        return False
    return (error.name or package).split(".")[0] == package


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _install() -> str:
    cuda = (torch.version.cuda or "13").split(".")[0]
    return f'pip install "fastdino[dali-cuda{"12" if cuda == "12" else "13"}]"'

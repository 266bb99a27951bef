"""Who makes the crops: the one contract of the loaders, and the choice between them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastdino.data.sources import ImageSource
from fastdino.errors import ConfigError

if TYPE_CHECKING:
    from fastdino.config import TrainConfig


class CropLoader(Protocol):
    """Batches of crops, the same for the same (config, source, rank, world_size, epoch, step).

    B = batch_size_per_gpu * grad_accum; N = local_crops_number.
    """

    steps_per_epoch: int
    source: ImageSource
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
    source: ImageSource,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> CropLoader:
    """The loader that config.crops names; "auto" is DALI where it works, else torchvision.

    Raises:
        ConfigError: --crops dali where DALI cannot be imported.
        DataError: fewer images than a batch.
    """
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": device}
    why = "the paper's chain, exact"
    if config.crops != "torchvision":
        problem = dali_problem()
        if problem is None:
            return importlib.import_module("fastdino.data.dali").DaliLoader(config, source, **place)
        if config.crops == "dali":
            raise ConfigError(f"--crops dali: {problem}")
        why = f"exact; {problem}"
    pil = importlib.import_module("fastdino.data.pil")
    return pil.TorchvisionLoader(config, source, why=why, **place)


def dali_problem() -> str | None:
    """Why DALI cannot be used, and how to mend that; None where it can."""
    try:
        importlib.import_module("fastdino.data.dali")
    except Exception as error:  # Whatever a library that does not fit this machine raises.
        name = error.name or "nvidia" if isinstance(error, ModuleNotFoundError) else ""
        if name.split(".")[0] == "nvidia":
            return f"DALI is not installed: {_install()}"
        first_line = str(error).partition("\n")[0] or type(error).__name__
        return f"DALI does not work here: {first_line}"
    return None


def _install() -> str:
    cuda = (torch.version.cuda or "13").split(".")[0]
    return f'pip install "fastdino[dali-cuda{"12" if cuda == "12" else "13"}]"'

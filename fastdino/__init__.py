"""fastdino: DINO self-supervised pretraining (Caron et al. 2021) as fast as the hardware allows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdino.config import TrainConfig as TrainConfig
    from fastdino.training.loop import train as train
    from fastdino.training.trainer import Trainer as Trainer

__version__ = "0.1.0"
__all__ = ["TrainConfig", "Trainer", "train"]

# Imported on first use, so that `fastdino --help` does not load torch.
_MODULES = {
    "TrainConfig": "fastdino.config",
    "Trainer": "fastdino.training.trainer",
    "train": "fastdino.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastdino' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

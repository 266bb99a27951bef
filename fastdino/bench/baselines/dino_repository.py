"""The training step of a facebookresearch/dino checkout."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.bench.baselines.paper_step import PaperStep
from fastdino.bench.baselines.training_step import StepSetup, vit_sizes
from fastdino.config import TrainConfig
from fastdino.errors import ConfigError

# The modules that the authors' training step consists of.
MODULES = ("utils", "vision_transformer", "main_dino")


class DinoRepositoryStep(PaperStep):
    """The authors' networks, loss, clip and parameter groups in the loop of PaperStep."""

    def __init__(self, setup: StepSetup):
        assert setup.dino_repo is not None
        self.repo = load_repository(setup.dino_repo)
        super().__init__(setup)

    def build(self, setup: StepSetup) -> tuple[nn.Module, nn.Module, Any]:
        config = setup.config
        student = self._network(config, config.drop_path_rate, config.norm_last_layer)
        teacher = self._network(config, 0.0, True)
        loss = self.repo.main_dino.DINOLoss(
            config.out_dim, config.ncrops, config.teacher_temp, config.teacher_temp, 0, 1
        )
        return student, teacher, loss

    def _network(self, config: TrainConfig, rate: float, norm_last_layer: bool) -> nn.Module:
        vit = self.repo.vision_transformer.VisionTransformer(
            img_size=[config.global_crops_size],
            patch_size=config.patch_size,
            qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            drop_path_rate=rate,
            **vit_sizes(config),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's weight_norm is deprecated
            head = self.repo.vision_transformer.DINOHead(
                vit.embed_dim, config.out_dim, norm_last_layer=norm_last_layer
            )
        network: nn.Module = self.repo.utils.MultiCropWrapper(vit, head)
        return network

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.repo.utils.get_params_groups(self.student))

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        teacher = self.teacher(list(crops[:2]))
        loss: Tensor = self.loss(self.student(list(crops)), teacher, 0)
        return loss

    def clip_gradients(self, max_norm: float) -> None:
        self.repo.utils.clip_gradients(self.student, max_norm)


def load_repository(folder: Path) -> Any:
    """Import the modules of a checkout without changing sys.modules and sys.path.

    Returns: a namespace with the modules of MODULES.

    Raises: ConfigError: the folder is no such checkout, or it cannot be imported.
    """
    missing = [name for name in MODULES if not (folder / f"{name}.py").is_file()]
    if missing:
        raise ConfigError(
            f"--dino_repo {folder} is not a checkout of facebookresearch/dino: "
            f"it has no {missing[0]}.py"
        )
    names = [file.stem for file in folder.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        modules = {name: importlib.import_module(name) for name in MODULES}
    except Exception as error:  # old code may raise anything in a new environment
        raise ConfigError(f"--dino_repo {folder} cannot be imported: {error!r}") from error
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
    # The loss expects a process group; the benchmark runs one process.
    modules["main_dino"].dist = types.SimpleNamespace(  # type: ignore[attr-defined]
        all_reduce=lambda tensor: None, get_world_size=lambda: 1
    )
    return types.SimpleNamespace(**modules)

"""The steps of others by their own code: lightly's, and that of a checkout of the paper's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.bench.step.arm import Setting, vit_sizes
from fastdino.bench.step.compiled import EINSUM_TOLERANCE
from fastdino.bench.step.paper import PaperArm
from fastdino.config import TrainConfig
from fastdino.errors import ConfigError

# The modules of a checkout of the authors' code that its training step is made of.
DINO_MODULES = ("utils", "vision_transformer", "main_dino")


class LightlyArm(PaperArm):
    """lightly's parts in the order of its own benchmark, with the paper's hyperparameters."""

    clip = "global"
    loss_tolerance = EINSUM_TOLERANCE

    def build(self, setting: Setting) -> tuple[nn.Module, nn.Module, Any]:
        from lightly.loss import DINOLoss

        config = setting.config
        student = LightlyNetwork(config, config.drop_path_rate, config.norm_last_layer)
        teacher = LightlyNetwork(config, 0.0, True)
        loss = DINOLoss(
            output_dim=config.out_dim,
            warmup_teacher_temp=config.teacher_temp,
            teacher_temp=config.teacher_temp,
            warmup_teacher_temp_epochs=0,
        )
        return student, teacher, loss

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        renamed = {"backbone.vit.": "backbone.", "head.layers.": "head.mlp."}
        found = {}
        for name, parameter in network.named_parameters():
            for theirs, papers in renamed.items():
                name = name.replace(theirs, papers)
            found[name] = parameter
        del found["backbone.mask_token"]  # for masked images, which DINO has not
        return found

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(torch.cat(tuple(crops[:2]))).chunk(2)
        student = [*self.student(torch.cat(tuple(crops[:2]))).chunk(2)]
        if len(crops) > 2:
            student += self.student(torch.cat(tuple(crops[2:]))).chunk(len(crops) - 2)
        loss: Tensor = self.loss(list(teacher), student)
        return loss

    def clip_gradients(self, max_norm: float) -> None:
        # What Lightning, which lightly's benchmark runs on, does.
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), max_norm)

    def move_teacher(self, momentum: float) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, m=momentum)


class LightlyNetwork(nn.Module):
    """timm's vision transformer and lightly's head; the crops of a call have one size."""

    def __init__(self, config: TrainConfig, drop_path_rate: float, norm_last_layer: bool):
        super().__init__()
        from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        vit = VisionTransformer(
            img_size=config.global_crops_size,
            patch_size=config.patch_size,
            num_classes=0,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
            **vit_sizes(config),
        )
        self.backbone = MaskedVisionTransformerTIMM(
            vit, weight_initialization="skip", pos_embed_initialization="skip", antialias=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's weight_norm
            self.head = DINOProjectionHead(
                vit.embed_dim, output_dim=config.out_dim, norm_last_layer=norm_last_layer
            )

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.head(self.backbone(images))
        return projections


class DinoRepoArm(PaperArm):
    """The authors' networks, loss, clip and parameter groups, in the loop of PaperArm."""

    def __init__(self, setting: Setting):
        assert setting.dino_repo is not None
        self.repo = load_dino_repo(setting.dino_repo)
        super().__init__(setting)

    def build(self, setting: Setting) -> tuple[nn.Module, nn.Module, Any]:
        config = setting.config
        networks = [
            self._network(config, config.drop_path_rate, config.norm_last_layer),
            self._network(config, 0.0, True),
        ]
        loss = self.repo.main_dino.DINOLoss(
            config.out_dim, config.ncrops, config.teacher_temp, config.teacher_temp, 0, 1
        )
        return networks[0], networks[1], loss

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
            warnings.simplefilter("ignore", FutureWarning)  # of torch's weight_norm
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


def load_dino_repo(folder: Path) -> Any:
    """The modules of a checkout, as attributes; sys.modules and sys.path stay as they were.

    Raises: ConfigError: no such checkout, or it cannot be imported.
    """
    missing = [name for name in DINO_MODULES if not (folder / f"{name}.py").is_file()]
    if missing:
        raise ConfigError(
            f"--dino_repo {folder} is no checkout of facebookresearch/dino: "
            f"it has no {missing[0]}.py"
        )
    names = [file.stem for file in folder.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        loaded = {name: importlib.import_module(name) for name in DINO_MODULES}
    except Exception as error:  # whatever old code raises in a new environment
        raise ConfigError(f"--dino_repo {folder} cannot be imported: {error!r}") from error
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
    # One process here: its loss would ask for a process group.
    loaded["main_dino"].dist = types.SimpleNamespace(  # type: ignore[attr-defined]
        all_reduce=lambda tensor: None, get_world_size=lambda: 1
    )
    return types.SimpleNamespace(**loaded)


def lightly_problem() -> str | None:
    """Why lightly's arm cannot run; None where it can."""
    if importlib.util.find_spec("lightly") is None:
        return 'lightly is not installed: pip install "lightly>=1.6,<1.7"'
    return None

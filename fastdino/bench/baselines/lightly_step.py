"""lightly's networks, loss and EMA in the order of lightly's own benchmark."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.bench.baselines.losses import EINSUM_TOLERANCE
from fastdino.bench.baselines.paper_step import GlobalClipStep
from fastdino.bench.baselines.training_step import StepSetup, vit_sizes
from fastdino.config import TrainConfig


class LightlyStep(GlobalClipStep):
    """lightly's step with the paper's hyperparameters; the clip is global, as in Lightning."""

    loss_tolerance = EINSUM_TOLERANCE

    def build(self, setup: StepSetup) -> tuple[nn.Module, nn.Module, Any]:
        from lightly.loss import DINOLoss

        config = setup.config
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
        parameters = {
            name.replace("backbone.vit.", "backbone.").replace("head.layers.", "head.mlp."): p
            for name, p in network.named_parameters()
        }
        del parameters["backbone.mask_token"]  # for masked images, which DINO does not use
        return parameters

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(torch.cat(tuple(crops[:2]))).chunk(2)
        student = [*self.student(torch.cat(tuple(crops[:2]))).chunk(2)]
        if len(crops) > 2:
            student += self.student(torch.cat(tuple(crops[2:]))).chunk(len(crops) - 2)
        loss: Tensor = self.loss(list(teacher), student)
        return loss

    def update_teacher(self, momentum: float) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, m=momentum)


class LightlyNetwork(nn.Module):
    """timm's vision transformer and lightly's head; the crops of one call have the same size."""

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
            warnings.simplefilter("ignore", FutureWarning)  # torch's weight_norm is deprecated
            self.head = DINOProjectionHead(
                vit.embed_dim, output_dim=config.out_dim, norm_last_layer=norm_last_layer
            )

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.head(self.backbone(images))
        return projections

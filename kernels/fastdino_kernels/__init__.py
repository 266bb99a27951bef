"""Fast kernels for DINO self-supervised pretraining. They depend on torch and, optionally, triton.

dino_loss.py            dino_loss, teacher_entropy; dino_module.py: DINOLoss
patch_loss.py           patch_loss, for masked patch tokens, rows paired one to one
soft_cross_entropy.py   soft_cross_entropy, for targets that are already probabilities
linear_dino_loss.py     linear_dino_loss, linear_patch_loss: the last layer and its loss, chunk by
                        chunk; linear_pairwise.py, row_chunks.py: their operator
linear_sinkhorn.py      linear_sinkhorn_center: Sinkhorn-Knopp targets for them
last_layer.py           last_layer_weight
pairwise*.py            the operators of these losses, in Triton and in PyTorch
sinkhorn*.py            sinkhorn_center, sinkhorn_knopp: Sinkhorn-Knopp targets
koleo.py, gram.py       koleo_loss, gram_loss: losses of features and patch tokens, in PyTorch
collectives.py          all-reduces of the losses that depend on all ranks' rows
ema.py                  ema_update_
clip.py                 clip_grad_norms_ (each by its own norm), clip_grad_norm_ (global norm)
norms.py                2-norms of tensors and DTensors, accurate for any number of elements
adamw_ema*.py           adamw_ema_update_ and AdamWEMA: clip, AdamW and EMA in one pass
multi_crop*.py          multi_crop, multi_crop_groups; crop_params.py: their parameters;
                        crop_table.py: what their kernels read
reference.py            the paper's equations, written plainly: the oracle of tests and benchmarks
dispatch.py             choice between Triton and PyTorch: impl=..., or FASTDINO_KERNELS
kernel_launch.py        launches of compiled kernels with little host time
"""

from .adamw_ema import adamw_ema_update_
from .adamw_ema_optimizer import AdamWEMA
from .clip import clip_grad_norm_, clip_grad_norms_
from .crop_params import Crop, CropParams
from .dino_loss import dino_loss, teacher_entropy
from .dino_module import DINOLoss
from .dispatch import chosen_impl
from .ema import ema_update_
from .gram import gram_loss
from .koleo import koleo_loss
from .last_layer import last_layer_weight
from .linear_dino_loss import linear_dino_loss, linear_patch_loss
from .linear_sinkhorn import linear_sinkhorn_center
from .multi_crop import multi_crop, multi_crop_groups
from .patch_loss import patch_loss
from .sinkhorn import sinkhorn_center, sinkhorn_knopp
from .soft_cross_entropy import soft_cross_entropy

__all__ = [
    "AdamWEMA",
    "Crop",
    "CropParams",
    "DINOLoss",
    "adamw_ema_update_",
    "chosen_impl",
    "clip_grad_norm_",
    "clip_grad_norms_",
    "dino_loss",
    "ema_update_",
    "gram_loss",
    "koleo_loss",
    "last_layer_weight",
    "linear_dino_loss",
    "linear_patch_loss",
    "linear_sinkhorn_center",
    "multi_crop",
    "multi_crop_groups",
    "patch_loss",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "soft_cross_entropy",
    "teacher_entropy",
]

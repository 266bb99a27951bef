"""Fast kernels for DINO self-supervised pretraining: torch (and triton, where it is) alone.

dino_loss.py   dino_loss, teacher_entropy; dino_module.py   DINOLoss
soft_cross_entropy.py   soft_cross_entropy, of targets that are probabilities already
pairwise*.py   the operators beneath them, in Triton and in PyTorch
ema.py         ema_update_
clip.py        clip_grad_norms_ (each by its own norm), clip_grad_norm_ (all by one)
reference.py   the paper's equations, plainly: the oracle of the tests
dispatch.py    which implementation runs: impl=..., or the environment variable FASTDINO_KERNELS
"""

from .clip import clip_grad_norm_, clip_grad_norms_
from .dino_loss import dino_loss, teacher_entropy
from .dino_module import DINOLoss
from .dispatch import chosen_impl
from .ema import ema_update_
from .soft_cross_entropy import soft_cross_entropy

__all__ = [
    "DINOLoss",
    "chosen_impl",
    "clip_grad_norm_",
    "clip_grad_norms_",
    "dino_loss",
    "ema_update_",
    "soft_cross_entropy",
    "teacher_entropy",
]

"""Fast kernels for DINO self-supervised pretraining: torch (and triton, where it is) alone.

dino_loss.py   dino_loss, DINOLoss, teacher_entropy
ema.py         ema_update_
clip.py        clip_grad_norms_
reference.py   the paper's equations, plainly: the oracle of the tests
dispatch.py    which implementation runs: impl=..., or the environment variable FASTDINO_KERNELS
"""

from .clip import clip_grad_norms_
from .dino_loss import DINOLoss, dino_loss, teacher_entropy
from .dispatch import chosen_impl
from .ema import ema_update_

__all__ = [
    "DINOLoss",
    "chosen_impl",
    "clip_grad_norms_",
    "dino_loss",
    "ema_update_",
    "teacher_entropy",
]

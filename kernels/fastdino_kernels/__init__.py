"""Fast kernels for DINO self-supervised pretraining: torch (and triton, where it is) alone.

dino_loss.py   dino_loss, DINOLoss, teacher_entropy
ema.py         ema_update_
clip.py        clip_grad_norms_
multi_crop.py  multi_crop; crop_params.py: CropParams, what was drawn
reference.py   the paper's equations, plainly: the oracle of the tests
dispatch.py    which implementation runs: impl=..., or the environment variable FASTDINO_KERNELS
"""

from .clip import clip_grad_norms_
from .crop_params import Crop, CropParams
from .dino_loss import DINOLoss, dino_loss, teacher_entropy
from .dispatch import chosen_impl
from .ema import ema_update_
from .multi_crop import multi_crop

__all__ = [
    "Crop",
    "CropParams",
    "DINOLoss",
    "chosen_impl",
    "clip_grad_norms_",
    "dino_loss",
    "ema_update_",
    "multi_crop",
    "teacher_entropy",
]

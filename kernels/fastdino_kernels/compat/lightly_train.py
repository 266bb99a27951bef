"""Drop-in for `lightly_train._methods.dinov2.dinov2_loss`: compat.dinov2's losses by those names.

lightly-train takes DINOv2's constructors and calls, so nothing but a name differs.
"""

from .dinov2 import DINOLoss
from .dinov2 import iBOTPatchLoss as IBOTPatchLoss

__all__ = ["DINOLoss", "IBOTPatchLoss"]

"""Drop-ins for `lightly.loss`, as of lightly 1.6.

lightly_dino.py     DINOLoss
lightly_ibot.py     IBOTPatchLoss, IBOTPlusPlusPatchLoss
lightly_koleo.py    KoLeoLoss
lightly_center.py   Center, the moving average of patch losses (lightly.models.modules.center)
rank_mean.py        the mean of a batch over the ranks

Constructors, forward methods, buffers and results are lightly's, except in these cases:

- Half precision is computed in fp32, the loss and the batch's mean for the center included.
- The teacher gets no gradient, even where its output requires one.
- With fp64 logits the center keeps its dtype (`.double()` makes it fp64), and a float temperature
  is not rounded to fp32.
- An empty batch (or no masked token) has loss 0 and does not change the center, instead of making
  both NaN. With several ranks, the center moves to the mean over the ranks that have rows.
- Shapes that match only by broadcasting, a negative epoch and temperatures <= 0 are errors.
"""

from .lightly_center import Center
from .lightly_dino import DINOLoss
from .lightly_ibot import IBOTPatchLoss, IBOTPlusPlusPatchLoss
from .lightly_koleo import KoLeoLoss

__all__ = ["Center", "DINOLoss", "IBOTPatchLoss", "IBOTPlusPlusPatchLoss", "KoLeoLoss"]

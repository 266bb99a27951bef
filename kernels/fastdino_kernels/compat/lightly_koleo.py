"""The KoLeo regularizer with lightly's constructor: `lightly.loss.KoLeoLoss`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_float_tensor, check_positive
from ..dispatch import compute_dtype, without_autocast
from ..koleo import neighbour_loss
from ..operators import ops

# Lightly's similarity of a row with itself: below all others, so that of two opposite rows each is
# the other's neighbour. koleo_loss has DINOv2's -1 there.
_OWN_SIMILARITY = -2.0


class KoLeoLoss(nn.Module):
    """Spread features over the sphere: -mean_i log(||x_i - x_n(i) + eps||_p + eps).

    x_n(i) is the row with the largest dot product with x_i, all rows with norm 1 (Sablayrolles et
    al. 2019, arXiv 1806.03198). It is computed in fp32 (fp64 for fp64 features), also under
    autocast, and no matrix [B, B] is made where B is large.

    Args:
        p: norm of the distance, > 0.
        eps: > 0; smallest norm of a row, and added to each difference and distance.

    Raises: ValueError: a number out of its range.

    """

    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__()
        self.p = check_positive("p", p)
        self.eps = check_positive("eps", eps)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the loss of one batch.

        Args:
            x: [B, D] features, fp16/bf16/fp32/fp64; receives the gradient.

        Returns: a fp32 scalar (fp64 for fp64 features); 0 for no rows.

        Raises:
            ValueError: another shape.
            TypeError: features that are not a floating-point tensor.

        """
        check_float_tensor("x", x)
        if x.dim() != 2 or x.shape[1] < 1:
            raise ValueError(f"x must be [B, D] with D >= 1, got shape {tuple(x.shape)}")
        with without_autocast(x.device):
            rows = F.normalize(x.to(compute_dtype(x)), dim=1, eps=self.eps)
            fixed = rows.detach()
            nearest = ops.nearest_rows(fixed, fixed, 0, 1, _OWN_SIMILARITY)
            return neighbour_loss(rows, rows[nearest], self.p, self.eps)

    def extra_repr(self) -> str:
        """Return the text that print(module) shows between the parentheses."""
        return f"p={self.p}, eps={self.eps}"

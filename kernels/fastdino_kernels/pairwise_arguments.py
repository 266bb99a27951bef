"""Arguments of the pairwise cross-entropy, shared by its implementations.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Crops(NamedTuple):
    """Student logits [S, B, K] and teacher outputs [T, B, K].

    With a center [K] the teacher's outputs are logits, without one they are probabilities.
    """

    student: Tensor
    teacher: Tensor
    center: Tensor | None
    weights: Tensor | None = None  # [S, B], of the compute dtype: factors of the rows

    def sizes(self) -> tuple[int, int, int, int]:
        """Return (S, T, B, K)."""
        S, B, K = self.student.shape
        return S, self.teacher.shape[0], B, K

    def returns_rows(self, options: PairwiseOptions) -> bool:
        """Return True if the result is rows [S, B], False if it is their sum over the divisor."""
        return options.rows or self.center is None

    def divisor(self, options: PairwiseOptions) -> float | Tensor:
        """Return what the sum of the rows is divided by; 1 if the result is the rows."""
        if self.returns_rows(options):
            return 1
        if options.divisor is not None:
            return options.divisor
        S, T, B, _ = self.sizes()
        return pair_count(S, T, options.ignore_diagonal) * B


class PairwiseOptions(NamedTuple):
    """Temperatures, the pairs to leave out, and the result: rows, or their sum over the divisor.

    Temperatures and divisor are floats, or 0-d tensors of the compute dtype on the device.
    """

    student_temp: float | Tensor
    teacher_temp: float | Tensor
    ignore_diagonal: bool  # leave out the pairs of a crop with itself
    rows: bool = False  # always so without a center
    divisor: float | Tensor | None = None  # None: the number of pairs times B


def pair_count(student_crops: int, teacher_crops: int, ignore_diagonal: bool) -> int:
    """Count pairs of a student and a teacher crop, optionally without pairs of the same crop."""
    own = min(student_crops, teacher_crops) if ignore_diagonal else 0
    return student_crops * teacher_crops - own

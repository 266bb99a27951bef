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

    def sizes(self) -> tuple[int, int, int, int]:
        """Return (S, T, B, K)."""
        S, B, K = self.student.shape
        return S, self.teacher.shape[0], B, K

    def terms(self, options: PairwiseOptions) -> int:
        """Return the number of cross-entropies whose mean is the loss; 1 without a center."""
        S, T, B, _ = self.sizes()
        return 1 if self.center is None else pair_count(S, T, options.ignore_diagonal) * B


class PairwiseOptions(NamedTuple):
    """Temperatures, each a float or a 0-d tensor on the device, and the pairs to leave out."""

    student_temp: float | Tensor
    teacher_temp: float | Tensor
    ignore_diagonal: bool  # leave out the pairs of a crop with itself


def pair_count(student_crops: int, teacher_crops: int, ignore_diagonal: bool) -> int:
    """Count pairs of a student and a teacher crop, optionally without pairs of the same crop."""
    own = min(student_crops, teacher_crops) if ignore_diagonal else 0
    return student_crops * teacher_crops - own

"""Memory of tensors: which are dense, and which share elements."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from torch import Tensor


def are_flat(tensors: Sequence[Tensor]) -> bool:
    """Return True if tensors of one shape can be treated as 1-D: dense, with equal strides."""
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    shape = tensors[0].shape
    strides = [
        [stride for stride, size in zip(tensor.stride(), shape) if size != 1] for tensor in tensors
    ]
    return tensors[0].numel() == 0 or (
        is_dense(tensors[0]) and all(other == strides[0] for other in strides)
    )


def is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill one range of memory, each once, in any dimension order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Return True if two elements may share memory, as in an expanded tensor.

    This is False for every view made by slicing, selecting, transposing or splitting a dimension.
    It can be True for an as_strided view with interleaved dimensions whose elements are distinct.
    """
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    extent = 1  # elements spanned by the dimensions so far, from the innermost
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


class Ranges:
    """The memory of tensors that share none with each other, to compare others with it.

    As in find_overlap, a tensor with gaps counts as its first element.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        ranges = sorted((t.data_ptr(), _extent(t)) for t in tensors if t.numel() and t.data_ptr())
        self._starts = [start for start, _ in ranges]
        self._ends = [start + extent for start, extent in ranges]

    def meet(self, tensor: Tensor) -> bool:
        """Return True if a tensor shares memory with one of these."""
        start = tensor.data_ptr()
        # The last one that starts before the tensor's end also ends last of them.
        last = bisect.bisect_left(self._starts, start + _extent(tensor)) - 1
        return last >= 0 and self._ends[last] > start


def _extent(tensor: Tensor) -> int:
    return tensor.nbytes if is_dense(tensor) else tensor.element_size()


def find_overlap(tensors: Sequence[Tensor], written: int) -> tuple[int, int] | None:
    """Return the indices of two tensors that share memory, one of the first `written`, or None.

    Exact for dense tensors. A tensor with gaps counts as its first element, so that interleaved
    views are accepted. Tensors on the device "meta" have no memory.
    """
    ranges = sorted(
        (tensor.data_ptr(), index, _extent(tensor))
        for index, tensor in enumerate(tensors)
        if tensor.data_ptr() != 0
    )
    end, other = -1, -1  # end and index of the range that reaches furthest so far
    for start, index, size in ranges:
        # If that one is only read, an overlap with a written range was already returned.
        if start < end and min(index, other) < written:
            return min(index, other), max(index, other)
        end, other = max((end, other), (start + size, index))
    return None

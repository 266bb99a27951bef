"""Stacking of a list of crops into one tensor, without a copy if they are views of one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..checks import check_float_tensor
from ..dispatch import without_autocast

# Nodes of the autograd graph whose forward pass only selects elements of a tensor.
_PIECE_NODES = frozenset(
    f"{name}Backward0"
    for name in ("AsStrided", "Select", "Slice", "Split", "SplitWithSizes", "Unbind", "View")
)


def stack_crops(name: str, crops: Iterable[Tensor] | Tensor) -> Tensor:
    """Stack S crops [B, K] into a tensor [S, B, K]; return a tensor [S, B, K] unchanged.

    Consecutive pieces of one tensor in memory, in order, are not copied. If they are the whole
    tensor and nothing lies between it and them in the autograd graph, as for `out.chunk(S)`, the
    gradient goes to that tensor directly, and `torch.autograd.grad` with respect to such a piece
    reports it as unused. Otherwise each piece receives its part. All other crops are copied, and
    so are all crops under torch.compile, which removes the copy if it can.

    Args:
        name: the argument's name in error messages.
        crops: S >= 1 tensors [B, K] of one shape and device, or one tensor [S, B, K];
            fp16/bf16/fp32/fp64.

    Raises:
        ValueError: no crop, a shape that is not [B, K], or shapes and devices that differ.
        TypeError: a crop that is not a floating-point tensor.

    """
    if isinstance(crops, Tensor):
        check_float_tensor(name, crops)
        if crops.dim() != 3 or crops.shape[0] < 1:
            raise ValueError(
                f"{name} must be a list of [B, K] tensors or one [S, B, K] tensor with S >= 1, "
                f"got shape {tuple(crops.shape)}"
            )
        return crops
    pieces = list(crops)
    if not pieces:
        raise ValueError(f"{name} must hold at least one [B, K] tensor, got none")
    for index, piece in enumerate(pieces):
        check_float_tensor(f"{name}[{index}]", piece)
        if piece.dim() != 2:
            raise ValueError(f"{name}[{index}] must be [B, K], got shape {tuple(piece.shape)}")
        if piece.shape != pieces[0].shape:
            raise ValueError(
                f"{name} must hold crops of one shape, got {tuple(pieces[0].shape)} "
                f"and, at index {index}, {tuple(piece.shape)}"
            )
        if piece.device != pieces[0].device:
            raise ValueError(
                f"{name} must hold crops on one device, got {pieces[0].device} "
                f"and, at index {index}, {piece.device}"
            )
    if len(pieces) == 1:
        return pieces[0].unsqueeze(0)
    if torch.compiler.is_compiling() or not _are_consecutive(pieces):
        with without_autocast(pieces[0].device):  # refuses fp16 on a CPU
            return torch.stack(pieces)
    base = pieces[0]._base
    if base is not None and _are_all_of(base, pieces):
        return base.view(len(pieces), *pieces[0].shape)
    joined: Tensor = _Joined.apply(*pieces)
    return joined


class _Joined(torch.autograd.Function):
    """Consecutive pieces [B, K] of one tensor as a view [S, B, K] of its memory."""

    @staticmethod
    def forward(ctx: Any, *pieces: Tensor) -> Tensor:
        first = pieces[0]
        shape = (len(pieces), *first.shape)
        # Detached, it is no view for autograd, but still notices changes of the pieces.
        return first.as_strided(shape, (first.numel(), *first.stride())).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind()


def _are_consecutive(pieces: Sequence[Tensor]) -> bool:
    """Return True if the pieces are views of one tensor, one after the other in memory."""
    first = pieces[0]
    if first._base is None and not first.is_inference():
        return False  # a change of one piece would not be noticed at the others
    memory, start, size = first.untyped_storage()._cdata, first.storage_offset(), first.numel()
    for index, piece in enumerate(pieces):
        if piece._base is not first._base or piece.dtype != first.dtype:
            return False
        if not piece.is_contiguous() or piece.storage_offset() != start + index * size:
            return False
        if piece.untyped_storage()._cdata != memory or piece.is_neg() != first.is_neg():
            return False
    return True


def _are_all_of(base: Tensor, pieces: Sequence[Tensor]) -> bool:
    """Return True if consecutive pieces are all of `base`, and it may get the gradient itself."""
    first = pieces[0]
    whole = base.is_contiguous() and base.numel() == len(pieces) * first.numel()
    if not whole or base.dtype != first.dtype or base.is_neg() != first.is_neg():
        return False
    if not base.requires_grad:
        return not any(piece.requires_grad for piece in pieces)
    node, output = torch.autograd.graph.get_gradient_edge(base)[:2]
    return all(_is_piece_of(node, output, piece) for piece in pieces)


def _is_piece_of(node: Node, output: int, piece: Tensor) -> bool:
    """Return True if the gradient of `piece`, which nothing observes, goes to this output only."""
    if piece.grad_fn is None or piece.retains_grad or piece._backward_hooks:
        return False
    plain = type(piece.grad_fn).__name__ in _PIECE_NODES
    return plain and piece.grad_fn.next_functions == ((node, output),)

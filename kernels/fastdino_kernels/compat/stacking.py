"""Stacking of a list of crops into one tensor, without a copy if they are views of one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import check_float_tensor


def stack_crops(name: str, crops: Iterable[Tensor] | Tensor) -> Tensor:
    """Stack S crops [B, K] into a tensor [S, B, K]; return a tensor [S, B, K] unchanged.

    Consecutive pieces of one contiguous tensor, all of them and in order, as `out.chunk(S)` or
    iteration returns them, are not copied: the result is a view of that tensor, and the gradient
    goes to it directly. `torch.autograd.grad` with respect to such a piece therefore reports it as
    unused. Pieces with a hook or `retain_grad()` are stacked, and so are all crops under
    torch.compile, which removes the copy if it can.

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
    whole = _whole(pieces)
    return torch.stack(pieces) if whole is None else whole


def _whole(pieces: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor whose consecutive pieces these are, as [S, B, K], or None."""
    if torch.compiler.is_compiling():
        return None
    base = pieces[0]._base
    size = pieces[0].numel()
    if base is None or not base.is_contiguous() or base.numel() != len(pieces) * size:
        return None
    for index, piece in enumerate(pieces):
        follows = piece.storage_offset() == base.storage_offset() + index * size
        if piece._base is not base or not follows or not piece.is_contiguous():
            return None
        if piece.dtype != base.dtype or not _same_gradient(piece, base):
            return None
    return base.view(len(pieces), *pieces[0].shape)


def _same_gradient(piece: Tensor, base: Tensor) -> bool:
    """Return True if the gradient can go to `base` because nothing observes it at `piece`."""
    if piece.requires_grad != base.requires_grad:
        return False
    if piece.retains_grad or piece._backward_hooks:
        return False
    # A piece made under no_grad is detached from its base, although requires_grad is True.
    return piece.grad_fn is not None or not base.requires_grad

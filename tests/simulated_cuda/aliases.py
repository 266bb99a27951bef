"""Tensors of type torch.Tensor on "cuda:<index>" whose memory is that of a CPU tensor."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

_CPU, _CUDA = 1, 2  # DLDeviceType
_DEVICE = 8  # byte offset of DLTensor.device = (type, index), after the pointer to the data

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def on_cuda(tensor: Tensor, index: int) -> Tensor:
    """Return a CUDA tensor over the memory of a CPU tensor."""
    return _relabelled(tensor, _CUDA, index)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a CUDA tensor."""
    return _relabelled(tensor, _CPU, 0)


def _relabelled(tensor: Tensor, kind: int, index: int) -> Tensor:
    capsule = to_dlpack(tensor)
    device = (ctypes.c_int32 * 2).from_address(_capsule_pointer(capsule, b"dltensor") + _DEVICE)
    device[0], device[1] = kind, index
    return torch._C._from_dlpack(capsule)

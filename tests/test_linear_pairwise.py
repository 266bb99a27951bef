"""Registration and memory of the operator of linear_dino_loss and linear_patch_loss."""

import importlib

import pytest
import torch
from fastdino_kernels.operators import ops
from torch.utils._python_dispatch import TorchDispatchMode

from tests.linear_layers import draw

linear_pairwise = importlib.import_module("fastdino_kernels.linear_pairwise")
BACKENDS = ("CPU", "CUDA", "HIP", "XLA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1", "Meta")


def arguments(impl, dtype=torch.bfloat16, B=5, K=40, weights=False, flags=(True, True), chunk=2):
    x, y, weight, other, center = draw((3, B), (2, B), K=K, dtype=dtype)
    factors = torch.rand(3, B) if weights else None
    options = (None, torch.tensor(0.04), 0.1, 0.0, True, impl, dtype, dtype, chunk, *flags)
    return (x, y, weight, other, center, factors, *options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_opcheck(impl, weights, flags):
    every = arguments(impl, weights=weights, flags=flags)
    torch.library.opcheck(ops.linear_pairwise.default, every)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck_of_an_empty_batch(impl):
    torch.library.opcheck(ops.linear_pairwise.default, arguments(impl, B=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_runs_on_every_backend(backend):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(
        "fastdino_kernels::linear_pairwise", backend
    )


class Allocations(TorchDispatchMode):
    """Record the number of elements of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.products += len(results) > 1  # not a sum of rows
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes() // result.element_size()
        return results


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_matrix_of_logits_is_made(impl, dtype):
    B, K = 12, 600
    with Allocations() as made:
        linear_pairwise._loss_and_gradients(*arguments(impl, dtype, B, K))
    largest = sorted(made.sizes.values())[-1]
    assert 3 * 2 * K <= largest < 3 * B * K / 2  # the logits of a chunk: 3 crops, 2 images
    assert made.products == 6 * 4  # chunks; two layers and two gradients

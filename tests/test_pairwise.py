"""Registration of the operators of dino_loss and soft_cross_entropy.

Legend: S crops of the student, T crops of the teacher, B images, K prototypes.
"""

import fastdino_kernels  # noqa: F401 (it defines the operators)
import pytest
import torch

BACKENDS = ("CPU", "CUDA", "HIP", "XLA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1", "Meta")
OPS = torch.ops.fastdino_kernels


def arguments(impl, centered, dtype=torch.bfloat16, S=4, T=2, B=3, K=40):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(S, B, K, generator=generator).to(dtype)
    teacher = torch.randn(T, B, K, generator=generator).to(dtype)
    center = torch.randn(K, generator=generator) if centered else None
    if not centered:
        teacher = teacher.float().softmax(-1)
    return (student, teacher, center), (0.1, 0.04, None, None, True, impl)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl, centered):
    tensors, options = arguments(impl, centered)
    torch.library.opcheck(OPS.pairwise_forward.default, (*tensors, *options))
    *_, center_used, stats = OPS.pairwise_forward(*tensors, *options)
    student, teacher, _ = tensors
    saved = (student, teacher, center_used if centered else None, stats)
    for grad_rows in (torch.rand(4, 3), torch.tensor(2.0).expand(4, 3)):
        torch.library.opcheck(OPS.pairwise_backward.default, (grad_rows, 0.5, *saved, *options))
        torch.library.opcheck(OPS.pairwise_backward_.default, (grad_rows, 0.5, *saved, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["pairwise_forward", "pairwise_backward", "pairwise_backward_"])
def test_operators_run_on_every_backend(name, backend):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(
        f"fastdino_kernels::{name}", backend
    )

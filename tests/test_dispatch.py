"""Selection between Triton and PyTorch, and the reasons why Triton cannot run."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from fastdino_kernels import (
    adamw_ema_update_,
    chosen_impl,
    clip_grad_norm_,
    clip_grad_norms_,
    dino_loss,
    dispatch,
    ema_update_,
    gram_loss,
    koleo_loss,
    sinkhorn_center,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from fastdino_kernels.dispatch import backend_options, choose_impl, explain_impl, triton_problem


@pytest.mark.parametrize(
    ("backend", "arch", "expected"), [("cuda", 90, {"maxnreg": 80}), ("hip", "gfx942", {})]
)
def test_backend_options_are_those_that_the_active_backend_has(
    monkeypatch, backend, arch, expected
):
    compiler = pytest.importorskip("triton.backends.compiler")
    runtime = pytest.importorskip("triton.runtime.driver")
    target = compiler.GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    monkeypatch.setattr(runtime.driver, "_active", Mock(get_current_target=lambda: target))
    monkeypatch.setattr(dispatch, "triton_interprets", lambda: False)
    assert backend_options(maxnreg=80) == expected


def test_interpreter_takes_no_compiler_options(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_options(maxnreg=80) == {}


def test_misspelled_compiler_option_is_an_error():
    with pytest.raises(TypeError, match="maxregs"):
        backend_options(maxregs=80)


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """A folder that is the whole PATH; CC is not set."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    dispatch._compiler_problem.cache_clear()
    yield tmp_path
    dispatch._compiler_problem.cache_clear()


def test_triton_on_a_gpu_needs_a_c_compiler(compilers):
    assert "a C compiler: install gcc or clang, or" in triton_problem("cuda")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_gcc_and_clang_are_accepted(compilers, name):
    (compilers / name).touch(mode=0o755)
    assert triton_problem("cuda") is None


def test_variable_cc_names_a_compiler(compilers, monkeypatch):
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton_problem("cuda") is None


def test_interpreter_needs_no_compiler(compilers, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_problem("cpu") is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "Triton needs CUDA tensors" in triton_problem("cpu")


def test_environment_variable_selects_the_implementation(monkeypatch):
    assert chosen_impl() == "torch"
    monkeypatch.setenv("FASTDINO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen_impl() == "triton"


def with_gradient() -> torch.Tensor:
    parameter = torch.zeros(2)
    parameter.grad = torch.ones(2)
    return parameter


X = torch.zeros(3, 2, 4)
CALLS = {
    "dino_loss": lambda: dino_loss(X, X[:2], X[0, 0], student_temp=0.1, teacher_temp=0.1),
    "soft_cross_entropy": lambda: soft_cross_entropy(X, X[:2], student_temp=0.1),
    "sinkhorn_center": lambda: sinkhorn_center(X[0], 0.1),
    "sinkhorn_knopp": lambda: sinkhorn_knopp(X[0], 0.1),
    "koleo_loss": lambda: koleo_loss(X[0]),
    "gram_loss": lambda: gram_loss(X, X),
    "ema_update_": lambda: ema_update_([X], [X.clone()], 0.9),
    "clip_grad_norms_": lambda: clip_grad_norms_(with_gradient(), 1.0),
    "clip_grad_norm_": lambda: clip_grad_norm_(with_gradient(), 1.0),
    "adamw_ema_update_": lambda: adamw_ema_update_([X], [None], [None], [None], X[0, 0, :1], lr=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_unknown_name_in_the_environment_variable_is_an_error(name, monkeypatch):
    monkeypatch.setenv("FASTDINO_KERNELS", "abacus")
    expected = r"FASTDINO_KERNELS must be one of 'auto', 'triton', 'torch', got 'abacus'"
    with pytest.raises(ValueError, match=expected):
        CALLS[name]()


@pytest.fixture
def gpu_of(monkeypatch):
    """A function that makes PyTorch report one GPU of a compute capability."""
    monkeypatch.setenv("CC", "cc")

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        dispatch._capability_problem.cache_clear()

    yield pretend
    dispatch._capability_problem.cache_clear()


def tensor_on(device: str, dtype=torch.float32) -> Mock:
    return Mock(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (7, 5)])
def test_gpu_that_triton_does_not_support_uses_pytorch(gpu_of, capability):
    gpu_of(*capability)
    reason = "8.0 or newer, this one has " + "{}.{}".format(*capability)
    assert choose_impl("auto", [tensor_on("cuda:0")]) == "torch"
    impl, why = explain_impl("cuda:0")
    assert impl == "torch"
    assert reason in why
    with pytest.raises(ValueError, match=rf"impl='triton': .*{reason}; use 'torch' or 'auto'"):
        choose_impl("triton", [tensor_on("cuda:0")])


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpu_that_triton_supports_uses_triton(gpu_of, capability):
    gpu_of(*capability)
    assert explain_impl("cuda:0") == ("triton", "the default on a GPU")
    assert choose_impl("auto", [tensor_on("cuda:0")]) == "triton"
    assert choose_impl("auto", [tensor_on("cuda:0", torch.float64)]) == "torch"


@pytest.mark.parametrize("other", [("cuda:0", torch.float64), ("cpu",), ("meta",)])
def test_one_tensor_that_triton_does_not_take_is_enough_for_pytorch(gpu_of, other, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    gpu_of(9, 0)
    tensors = [tensor_on("cuda:0"), tensor_on("cuda:0"), tensor_on(*other)]
    assert choose_impl("auto", tensors[:2]) == "triton"
    assert choose_impl("auto", tensors) == "torch"
    with pytest.raises(ValueError, match="impl='triton': "):
        choose_impl("triton", tensors)


def test_amd_gpus_have_no_compute_capability(gpu_of, monkeypatch):
    gpu_of(7, 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert explain_impl("cuda:0") == ("triton", "the default on a GPU")


@pytest.mark.parametrize("device", ["mps", "xpu", "privateuseone", "hpu", "meta"])
def test_other_devices_use_pytorch(device):
    impl, reason = explain_impl(device)
    assert (impl, chosen_impl(device)) == ("torch", "torch")
    assert reason.endswith(f"got {device}")
    assert choose_impl("auto", [tensor_on(device)]) == "torch"
    with pytest.raises(ValueError, match=f"Triton needs CUDA tensors .*, got {device}; use"):
        choose_impl("triton", [tensor_on(device)])


def test_variable_is_the_reason_if_it_selects_the_implementation(monkeypatch):
    assert explain_impl("cpu") == ("torch", "the default on a CPU")
    monkeypatch.setenv("FASTDINO_KERNELS", "torch")
    assert explain_impl("cuda") == ("torch", "FASTDINO_KERNELS=torch")

"""fastdino_kernels.kernel_launch: a compiled kernel is used again only for the same launch."""

import pytest
import torch
from fastdino_kernels import kernel_launch
from fastdino_kernels.kernel_launch import alignment, launch


class Kernel:
    """A kernel as triton.jit makes it: indexing it by a grid gives a function that compiles."""

    pre_run_hooks = ()
    arg_names = ["x", "SIZE"]

    def __init__(self, log):
        self.log, self.fn = log, object()

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            made = Compiled(self.log, (arguments, options))
            self.log.append(("compiled", grid, arguments, options))
            return made

        return compile_and_run


class Compiled:
    """A compiled kernel, which remembers what it was compiled for."""

    def __init__(self, log, made_for):
        self.log, self.made_for = log, made_for

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append(("run", grid, arguments, self.made_for))


@pytest.fixture
def device(monkeypatch):
    """Fake Triton's driver and kernels; returns the number of the current device in a list."""
    current = [0]

    class Active:
        @staticmethod
        def get_current_device():
            return current[0]

    class Driver:
        active = Active

    monkeypatch.setattr(kernel_launch, "driver", Driver)
    monkeypatch.setattr(kernel_launch, "JITFunction", Kernel)
    monkeypatch.setattr(kernel_launch, "_compiled", {})
    return current


def test_a_repeated_launch_runs_the_compiled_kernel(device):
    kernel = Kernel(log := [])
    launch(kernel, (4, 1, 1), "fp32", ("a",), {"SIZE": 16}, num_warps=4)
    launch(kernel, (9, 1, 1), "fp32", ("b",), {"SIZE": 16}, num_warps=4)
    options = {"SIZE": 16, "num_warps": 4}
    assert log == [
        ("compiled", (4, 1, 1), ("a",), options),
        ("run", (9, 1, 1), ("b", 16), (("a",), options)),
    ]


@pytest.mark.parametrize("change", ["kernel", "device", "signature", "constant", "option"])
def test_another_launch_is_compiled_for_itself(change, device):
    kernel = Kernel(log := [])
    other = Kernel(log) if change == "kernel" else kernel
    settings = {"signature": "fp32", "constant": 16, "option": 4}

    def run(which, signature, constant, option):
        launch(which, (1, 1, 1), signature, ("a",), {"SIZE": constant}, num_warps=option)

    run(kernel, **settings)
    device[0] = int(change == "device")
    run(other, **{name: 2 * x if name == change else x for name, x in settings.items()})
    assert [kind for kind, *_ in log] == ["compiled", "compiled"]
    run(other, **{name: 2 * x if name == change else x for name, x in settings.items()})
    assert log[-1][0] == "run"


def test_few_compiled_kernels_are_kept(device, monkeypatch):
    monkeypatch.setattr(kernel_launch, "_CACHED", 3)
    kernel = Kernel(log := [])
    for signature in range(10):
        launch(kernel, (1, 1, 1), signature, ("a",), {"SIZE": 16})
        assert len(kernel_launch._compiled) <= 3
    launch(kernel, (1, 1, 1), 9, ("a",), {"SIZE": 16})
    assert [kind for kind, *_ in log] == ["compiled"] * 10 + ["run"]


def test_parameters_out_of_order_are_an_error(device):
    with pytest.raises(AssertionError, match="out of order"):
        launch(Kernel([]), (1, 1, 1), "fp32", ("a",), {"COUNT": 16})


def test_alignment_is_the_address_modulo_16():
    room = torch.zeros(64, dtype=torch.uint8)
    offset = -room.data_ptr() % 16
    for start in range(16):
        assert alignment(room[offset + start :], 0.1, None) == (start, None, None)

"""Every public function can launch its kernels with every option, on every architecture.

Calls with every option are launched for sm_90, and for AMD every kernel as training in bf16 does;
the slow tests launch every option with every dtype and size for all architectures. Launches are
recorded by a driver that needs no GPU, on a device that stands for one, in processes without the
interpreter, which replaces the kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastdino_kernels
import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
KERNELS = Path(fastdino_kernels.__file__).parent
ARCHS = ("80", "90", "100", "gfx942")
# The calls of the tests that are not slow: with all options, and only those of training.
CALLS = ("90 without some combinations", "gfx942 as in training in bf16")

# Prints what went wrong, the kernels launched, and the public arguments that no call passes, for
# each architecture among its arguments, which a space and a key of LEFT_OUT may follow. Without
# some combinations: K of each class (1, odd, a multiple of 16) in fp32, one K in the other dtypes,
# pairs of dtypes without fp16, and soft_cross_entropy, which launches the kernels of dino_loss,
# with one layout and one number of crops.
LAUNCH_EVERYTHING = """
import functools
import inspect
import itertools
import json
import re
import sys

import fastdino_kernels
from fastdino_kernels.compat import dinov2

unused = set()

def watch(module, name):
    function = getattr(module, name)
    signature = inspect.signature(function)
    unused.update(f"{name}({parameter})" for parameter in signature.parameters)

    @functools.wraps(function)
    def watched(*arguments, **options):
        bound = signature.bind(*arguments, **options).arguments
        unused.difference_update(f"{name}({parameter})" for parameter in bound)
        return function(*arguments, **options)

    setattr(module, name, watched)

launch_nothing = {
    "Crop", "CropParams", "chosen_impl", "gram_loss", "koleo_loss", "last_layer_weight",
    "teacher_entropy",
}
for name in set(fastdino_kernels.__all__) - launch_nothing:
    watch(fastdino_kernels, name)
for name in ("cross_entropy", "dino_clstoken_loss", "dino_cross_entropy"):
    watch(dinov2, name)

from benchmarks.gpu.emulated_gpu import GPU, emulated_gpu
from benchmarks.gpu.kernel_calls import kernel_calls
from benchmarks.gpu.option_calls import option_calls
from benchmarks.gpu.recording_driver import ARCHS, record_launches

LEFT_OUT = {
    "": "^$",
    "without some combinations": (
        r" K (1|7|16|1000|65536|65537) (bf16|fp16)| K (16|1000|65536)\\b.* fp32"
        r"|^soft_cross_entropy K (16|1000|65536)$|^(fp16|fp32) S12$|fp16 and|and fp16"
        r"|^soft_cross_entropy (S (2 T 2|3|12)|rows apart|images first|prototypes apart)"
    ),
    "as in training in bf16": "^(fp16|fp32) (S|N|patches)| S12$| K (odd|1000)$|^(224|96) fp32$",
}

def launch(arch, which):
    problems, kernels = [], set()
    more = () if which == "as in training in bf16" else option_calls()
    left_out = LEFT_OUT[which]
    with record_launches(arch, compiles=False, device=GPU) as launches, emulated_gpu():
        for name, call in itertools.chain(kernel_calls(), more):
            if re.search(left_out, name):
                continue
            launches.clear()
            try:
                call(GPU)
            except Exception as error:
                problems.append(f"{name}: {type(error).__name__}: {error}")
            else:
                if not launches:
                    problems.append(f"{name}: no launch")
            kernels.update(launch.kernel for launch in launches)
    return {"problems": problems, "kernels": sorted(kernels)}

archs = {str(arch): arch for arch in ARCHS}
results = {}
for argument in sys.argv[1:]:
    arch, _, which = argument.partition(" ")
    results[argument] = launch(archs[arch], which)
print(json.dumps(results | {"unused": sorted(unused)}))
"""

# Prints the kernels that crops of one and of three sizes launch, and the number of programs.
LAUNCH_CROPS = """
import json
import torch
from fastdino_kernels import multi_crop_groups
from benchmarks.gpu.option_calls import crop_params
from benchmarks.gpu.recording_driver import record_launches

def launched(arch, *groups):
    images = [torch.zeros(37, 53, 3, dtype=torch.uint8)] * 2
    groups = [(crop_params([(37, 53)] * 2, n), size) for n, size in groups]
    with record_launches(arch, compiles=False) as launches:
        multi_crop_groups(images, groups, mean=(0, 0, 0), std=(1, 1, 1), impl="triton")
        return [(launch.kernel, launch.fp_fusion) for launch in launches]

print(json.dumps([
    launched(arch, *groups)
    for arch in (90, "gfx942") for groups in ([(2, 224)], [(2, 224), (8, 96), (1, 500)])
]))
"""

# Prints the error of each launch that must fail.
LAUNCH_BROKEN = """
import json

import torch
import triton
import triton.language as tl
from fastdino_kernels import kernel_launch
from fastdino_kernels.pointer_table import make_pointers
from benchmarks.gpu.emulated_gpu import GPU, emulated_gpu
from benchmarks.gpu.recording_driver import ARCHS, record_launches

@triton.jit
def kernel(x, y):
    tl.store(x, 1.0)

@triton.jit
def reserved_kernel(params):
    tl.store(params, 0)

@triton.jit
def undefined_kernel(x):
    tl.store(x, missing)

def again(x, y):
    kernel_launch.launch(kernel, (1, 1, 1), "signature", (x, y), {})

def broken(gpu):
    x, host = torch.zeros(16, device=gpu), torch.zeros(16)
    yield "good", lambda: kernel[(1,)](x, x[1:])
    yield "reserved name", lambda: reserved_kernel[(1,)](x)
    yield "register limit", lambda: kernel[(1,)](x, x, maxnreg=64)
    yield "misspelled option", lambda: kernel[(1,)](x, x, num_warp=4)
    yield "wrong device", lambda: kernel[(1,)](x, host)
    yield "wrong device again", lambda: [again(x, x), again(x, host)]
    yield "scalar on a wrong device", lambda: kernel[(1,)](x, torch.tensor(1.0))
    yield "address of a wrong device", lambda: make_pointers([[x], [host]], gpu)
    yield "dtype", lambda: kernel[(1,)](x, x.to(torch.complex64))
    yield "object", lambda: kernel[(1,)](x, object())
    yield "list", lambda: kernel[(1,)](x, [x])
    yield "missing argument", lambda: kernel[(1,)](x)
    yield "undefined name", lambda: undefined_kernel[(1,)](x)
    yield "read on the host", lambda: kernel[(1,)](x, x.sum().item())

def errors(arch):
    messages = {}
    with record_launches(arch, compiles=False, device=GPU), emulated_gpu():
        for name, launch in broken(GPU):
            try:
                launch()
            except Exception as error:
                messages[name] = f"{type(error).__name__}: {error}"
    return messages

print(json.dumps({str(arch): errors(arch) for arch in ARCHS}))
"""

# Each call twice, in an order that mixes the calls; every launch must use the specialisation that
# Triton itself selects for its arguments.
LAUNCH_AGAIN = """
import json
import random
import torch
from fastdino_kernels import dino_loss, kernel_launch, soft_cross_entropy
from benchmarks.gpu.recording_driver import record_launches

def crops(count, B, K, dtype, form):
    if form == "contiguous":
        return torch.zeros(count, B, K, dtype=dtype)
    if form == "unaligned":
        return torch.zeros(count * B * K + 1, dtype=dtype)[1:].view(count, B, K)
    return torch.zeros(count, B, K + 3, dtype=dtype)[..., :K]

def temperature(kind):
    if kind == "unaligned tensor":
        return torch.full((2,), 0.1)[1]
    return torch.tensor(0.1) if kind == "tensor" else kind

def call(B, K, dtype, form, kind, centered):
    student = crops(3, B, K, dtype, form).requires_grad_()
    options = {"student_temp": temperature(kind), "impl": "triton"}
    if centered:
        teacher = crops(2, B, K, torch.float32, form)
        center = crops(1, 1, K, torch.float32, form)[0]
        dino_loss(student, teacher, center, teacher_temp=temperature(kind), **options)[0].backward()
    else:
        soft_cross_entropy(student, crops(2, B, K, dtype, form), **options).sum().backward()

FORMS = ("contiguous", "unaligned", "padded")
KINDS = (1, 0.1, "tensor", "unaligned tensor")
SIZES = ((1, 40, torch.bfloat16), (16, 16, torch.float32))

def near(*base):  # a case, and all that differ from it in one property
    yield base
    for i, values in enumerate((SIZES, FORMS, KINDS, (True, False))):
        yield from ((*base[:i], value, *base[i + 1 :]) for value in values if value != base[i])

cases = [*near(SIZES[0], "contiguous", 0.1, True), *near(SIZES[1], "padded", "tensor", False)]
cases = [(*size, *rest) for size, *rest in cases]
random.Random(0).shuffle(cases)

def run(arch, cases, forget):
    codes = []
    for case in cases + cases[::-1]:
        if forget:
            kernel_launch._compiled.clear()
        with record_launches(arch, compiles=False) as launches:
            call(*case)
            codes.append([(x.kernel, x.binary) for x in launches])
    return codes

few = cases[:3]
for arch, cases_of in ((80, few), (90, cases)):
    expected = run(arch, cases_of, forget=True)
    kernel_launch._compiled.clear()
    if arch == 90:
        run(80, few, forget=False)
    assert run(arch, cases_of, forget=False) == expected, arch
assert kernel_launch._compiled
print(json.dumps([len(expected), len({code for codes in expected for code in codes})]))
"""


# Runs scripts one after the other, so that they share the imports; prints a list of their outputs.
RUN_ALL = """
import contextlib
import io
import json
import runpy
import sys

outputs = []
for file, *arguments in json.loads(sys.argv[1]):
    sys.argv = [file, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(file)
    outputs.append(json.loads(output.getvalue()))
print(json.dumps(outputs))
"""


def run_scripts(folder: Path, *scripts: tuple[str, ...]) -> list[Any]:
    """Return what each script prints for its arguments.

    They run from files, whose source Triton can read, in a process without the interpreter.
    """
    lines = []
    for i, (script, *arguments) in enumerate(scripts):
        file = folder / f"script{i}.py"
        file.write_text(script, encoding="utf-8")
        lines.append([str(file), *arguments])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "kernels", ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(lines)],
        env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[Any]:
    """The outputs of all scripts; the first wraps the functions that the calls then import."""
    return run_scripts(
        tmp_path_factory.mktemp("launches"),
        (LAUNCH_EVERYTHING, *CALLS), (LAUNCH_BROKEN,), (LAUNCH_AGAIN,), (LAUNCH_CROPS,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def launched(outputs) -> Any:
    return outputs[0]


@pytest.fixture(scope="module")
def errors(outputs) -> Any:
    return outputs[1]


def kernel_names() -> list[str]:
    sources = "".join(file.read_text("utf-8") for file in KERNELS.glob("*_triton.py"))
    return sorted(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


@pytest.mark.parametrize("calls", CALLS)
def test_every_call_launches(launched, calls):
    assert launched[calls]["problems"] == []


@pytest.mark.parametrize("calls", CALLS)
def test_every_kernel_is_launched(launched, calls):
    assert launched[calls]["kernels"] == kernel_names()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_option_launches_with_every_dtype(tmp_path, arch):
    (results,) = run_scripts(tmp_path, (LAUNCH_EVERYTHING, arch))
    assert results[arch] == {"problems": [], "kernels": kernel_names()}


def test_every_public_argument_is_passed_by_a_call(launched):
    assert launched["unused"] == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("reserved name", "failed to specialize argument of type: dict"),
        ("misspelled option", "Keyword argument num_warp was specified but unrecognised"),
        ("wrong device", "ValueError: a GPU cannot use the address of a tensor on cpu"),
        ("wrong device again", "ValueError: kernel: argument y is a tensor on cpu, not on meta"),
        ("scalar on a wrong device", "ValueError: a GPU cannot use the address of a tensor on cpu"),
        ("address of a wrong device", "ValueError: a GPU cannot use the address of a tensor"),
        ("dtype", "complex64"),
        ("object", "failed to specialize argument of type: object"),
        ("list", "failed to specialize argument of type: list"),
        ("missing argument", "missing 1 required positional argument: 'y'"),
        ("undefined name", "missing is not defined"),
        ("read on the host", "cannot be called on meta tensors"),
    ],
)
def test_launch_that_would_fail_on_a_gpu_is_an_error(errors, arch, case, message):
    assert message in errors[arch][case]


@pytest.mark.parametrize("arch", ARCHS)
def test_good_launch_is_no_error(errors, arch):
    assert "good" not in errors[arch]


def test_option_that_only_nvidia_has_is_an_error_elsewhere(errors):
    assert [arch for arch in ARCHS if "register limit" in errors[arch]] == ["gfx942"]
    assert "maxnreg was specified but unrecognised" in errors["gfx942"]["register limit"]


def test_crops_of_all_sizes_take_three_launches_without_fused_products(outputs):
    kernels = [f"multi_crop_{name}_kernel" for name in ("resize", "color", "blur")]
    expected = [[name, False] for name in kernels]
    assert outputs[3] == [expected] * 4


def test_repeated_launches_use_the_code_that_triton_selects(outputs):
    calls, kernels = outputs[2]
    assert calls == 2 * 16
    assert kernels > 15


def test_interpreted_kernels_cannot_be_recorded(monkeypatch):
    from benchmarks.gpu.recording_driver import record_launches

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), record_launches(90):
        pass


def test_emulated_gpu_is_restored(monkeypatch):
    from benchmarks.gpu.emulated_gpu import emulated_gpu

    monkeypatch.delenv("FASTDINO_KERNELS", raising=False)
    with emulated_gpu() as device:
        tensor = torch.zeros(8, device=device)
        assert tensor.data_ptr() % 16 == 0 < tensor.data_ptr()
        assert tensor[1:].data_ptr() == tensor.data_ptr() + 4
        assert torch.zeros(8, device=device).data_ptr() != tensor.data_ptr()
    assert tensor.data_ptr() == 0
    assert torch.zeros(8).data_ptr() > 0
    assert "FASTDINO_KERNELS" not in os.environ

"""Norms of long tensors against float64. Other tests do the same for what is computed from them."""

import math

import pytest
import torch
from fastdino_kernels import norms
from fastdino_kernels.dispatch import compute_dtype
from fastdino_kernels.norms import ROW, measure, norm
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.multi_tensor import FLOATS, LONG, long_normal


def truth(tensor):
    """Return the norm in float64, whose sum is a tree."""
    return tensor.double().square().sum().sqrt()


def assert_accurate(tensor, *, rtol=1e-6):
    value = norm(tensor)
    assert value.dtype == (torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), truth(tensor), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [65536 * 256, LONG, LONG - LONG % ROW, LONG - LONG % ROW - 1])
def test_norms_of_millions_of_elements_are_accurate(size):
    assert_accurate(long_normal(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accurate(dtype):
    assert_accurate(long_normal().to(dtype))


def test_double_precision_is_accurate():
    assert_accurate(long_normal(1 << 24).double(), rtol=1e-14)


def test_equal_elements_are_accurate():
    """All additions to a sum round in the same direction: the worst case of a row."""
    assert_accurate(torch.full((LONG,), 1 / 3), rtol=4e-6)


def layouts():
    """Make long tensors: transposed, permuted, expanded, and with gaps, in rows and in columns."""
    table = long_normal(1536 * 2050).view(1536, 2050)
    images = long_normal(1536 * 2050).view(64, 24, 41, 50)
    return {
        "transposed": table.T,
        "channels last": images.to(memory_format=torch.channels_last),
        "permuted": images.permute(2, 0, 3, 1),
        "rows with gaps": table[:, 1:],
        "every second column": table[:, ::2],
        "every second row, transposed": table[::2].T,
        "expanded": table[:, None].expand(-1, 3, -1),
    }


@pytest.mark.parametrize("layout", layouts())
def test_every_layout_is_accurate(layout):
    assert_accurate(layouts()[layout])


def test_dense_layouts_are_not_copied():
    dense = [tensor for name, tensor in layouts().items() if name in ("transposed", "permuted")]
    with Operations() as operations:
        for tensor in dense:
            norm(tensor)
    assert not {"clone", "copy_", "_to_copy", "_unsafe_view"} & set(operations.names)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 17, 63, 64, 65, 71, 72, 511, 512, 513, 580])
def test_lengths_around_a_row(size, dtype, monkeypatch):
    """512 rows of 8 take three levels."""
    monkeypatch.setattr(norms, "ROW", 8)
    x = long_normal(size).to(dtype)
    assert_accurate(x)
    assert norms._row_norms(x, compute_dtype(x)).numel() <= 8


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("index", [0, ROW, 5 * ROW + 2])
def test_infinity_and_nan_of_any_row_are_in_the_norm(value, index):
    x = torch.ones(5 * ROW + 3)
    x[index] = value
    assert_accurate(x)
    x[[1, 2 * ROW]] = torch.tensor([math.inf, math.nan])
    assert norm(x).isnan()


def test_norm_may_overflow_half_precision_but_not_fp32():
    x = torch.full((3 * ROW,), 6e4, dtype=torch.float16)
    assert norm(x).item() == pytest.approx(6e4 * (3 * ROW) ** 0.5, rel=1e-5)
    assert norm(torch.full((3 * ROW,), 1e20)).item() == math.inf


class Operations(TorchDispatchMode):
    """Record the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_short_tensors_take_one_operation_together():
    tensors = [torch.randn(ROW), None, torch.randn(3, 5), torch.zeros(0, 4)]
    with Operations() as operations:
        values = measure(tensors, "tensors")
    assert operations.names.count("_foreach_norm") == 1
    assert not {"linalg_vector_norm", "view", "slice"} & set(operations.names)
    expected = torch.stack([torch.zeros(()) if x is None else x.norm() for x in tensors])
    torch.testing.assert_close(values, expected)


def test_long_and_short_tensors_of_several_dtypes():
    draws = (long_normal(size) for size in (LONG, 5, 3 * ROW + 1, 0, ROW, 2 * ROW, ROW + 1))
    tensors = [x.to(FLOATS[i % 4]) for i, x in enumerate(draws)]
    tensors.insert(2, None)
    values = measure(tensors, "tensors")
    expected = torch.stack([truth(torch.zeros(0) if x is None else x) for x in tensors])
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


def test_compiled_norms_are_accurate():
    long = [long_normal(), long_normal(1536 * 2050).view(1536, 2050).T, torch.ones(3)]
    compiled = torch.compile(measure, backend="aot_eager", fullgraph=True)
    values = compiled(long, "tensors")
    expected = torch.stack(list(map(truth, long)))
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled_norms_of_every_layout_are_accurate(layout, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for tensor in (layouts()[layout], layouts()[layout][:-1]):
        expected = truth(tensor)
        torch.testing.assert_close(compiled(tensor).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiled_norms_are_not_specialised_to_sizes(device):
    """The meta device stands for accelerators, where no norm is measured in rows."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(norm, backend=counter, dynamic=True, fullgraph=True)
    for rows in (3, ROW, ROW + 1, 2 * ROW):
        compiled(torch.ones(rows, 5, device=device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    tensors = [long_normal(size).to(dtype) for size in (3 * ROW + 1, 5, 0)]
    tensors.append(long_normal(30_000).view(100, 300).to(dtype).T)
    torch.library.opcheck(torch.ops.fastdino_kernels.norms.default, (tensors,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [3, 3 * ROW])
def test_fake_tensors_have_fake_norms(size, dtype):
    with FakeTensorMode():
        value = norm(torch.empty(size, dtype=dtype))
    assert (value.shape, value.device.type) == ((), "cpu")
    assert value.dtype == compute_dtype(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("size", [3, 3 * ROW])
@pytest.mark.parametrize("compiled", [False, True])
def test_norms_have_no_gradient(size, compiled):
    measured = torch.compile(norm, backend="aot_eager") if compiled else norm
    assert not measured(torch.ones(size, requires_grad=True)).requires_grad


@pytest.mark.parametrize("tensors", [[], [None], [None, None]])
def test_at_least_one_tensor_is_needed(tensors):
    expected = f"gradients must have at least one tensor, got {len(tensors)} times None"
    with pytest.raises(ValueError, match=expected):
        measure(tensors, "gradients")

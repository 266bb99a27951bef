"""fastdino_kernels.tensor_lists: keys of caches, and the tensors that Triton takes."""

import sys
import threading
import weakref

import pytest
import torch
from fastdino_kernels import ema_update_
from fastdino_kernels.tensor_lists import are_plain, holes, key_of, triton_takes


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone(),
        lambda t: t.view(torch.int32),
        lambda t: t.t(),
        lambda t: t[:1],
        lambda t: t.as_strided((4, 4), (5, 1)),
        lambda t: torch._neg_view(t),  # the same address
        lambda t: torch._neg_view(t.t()),
        lambda t: t.as_strided((16, 1), (4, 1)),  # the same strides and number of elements
        lambda t: None,
    ],
)
def test_other_memory_or_layout_has_another_key(change):
    tensor = torch.zeros(64)[:16].view(4, 4)
    assert key_of([[tensor]]) != key_of([[change(tensor)]])


def test_key_has_the_order_of_tensors_and_lists():
    x, y = torch.zeros(2), torch.zeros(2)
    lists = [[[x, y]], [[y, x]], [[x], [y]], [[x, None, y]], [[x, y, None]], [[x, y], [None, None]]]
    lists += [[[x, y], [x]], [[x], [y, x]]]
    keys = [key_of(some) for some in lists]
    assert all(key not in keys[:i] for i, key in enumerate(keys))


def test_negative_view_of_strided_memory_has_another_key():
    strided = torch.zeros(4, 4).t()
    assert key_of([[strided]]) != key_of([[torch._neg_view(strided)]])


def test_new_objects_with_the_same_memory_have_the_same_key():
    tensor = torch.zeros(2, 3)
    expected = key_of([[tensor]])
    assert key_of([[tensor.detach()]]) == key_of([[torch.nn.Parameter(tensor)]]) == expected


def test_moved_storage_has_another_key():
    tensor = torch.zeros(4, 4)
    before = key_of([[tensor]])
    kept = tensor.data  # so that its address is not reused
    tensor.data = tensor.data.clone()
    assert key_of([[tensor]]) != before
    tensor.set_(kept)
    assert key_of([[tensor]]) == before


def test_tensors_without_an_address_have_no_key():
    assert key_of([[torch.zeros(2), torch.zeros(2).to_sparse()]]) is None


def test_cache_keeps_no_tensor_alive():
    tensors = [torch.zeros(3), torch.ones(3)]
    ema_update_(tensors[:1], tensors[1:], 0.5)
    dead = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    assert [ref() for ref in dead] == [None, None]


X = torch.zeros(2, 3, 4, 5)
COMPLEX = torch.zeros(3, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([[X, X[0]], [X, X[1]]], True),
        ([[X, None], [None, X]], True),
        ([[X.to(memory_format=torch.channels_last)], [X]], False),
        ([[X[:, ::2]], [X[:, ::2]]], False),
        ([[X, X.to("meta")]], False),
        ([[torch._neg_view(X)]], False),
        ([[COMPLEX.conj().imag]], False),
        ([[COMPLEX[:1].conj().imag]], False),
    ],
)
def test_triton_takes_dense_tensors_of_one_device_and_layout(lists, expected):
    assert triton_takes(lists) == expected


def test_holes_are_the_indices_of_none():
    assert holes([X, None, X, None]) == (1, 3)
    assert holes([X, X]) == holes([]) == ()


def test_only_tensors_and_parameters_are_plain():
    class Own(torch.Tensor):
        pass

    assert are_plain(
        [[torch.zeros(1), None, torch.nn.Parameter(torch.zeros(1)), torch.nn.Buffer()]]
    )
    assert not are_plain([[X], [X, X.as_subclass(Own)]])
    assert not are_plain([[1.0]])


def test_threads_may_update_different_lists():
    """Each alternates between more lists than a cache holds, and is interrupted often."""
    failures = []

    def work(value):
        lists = [[torch.full((n,), float(value)) for _ in range(2)] for n in range(1, 40)]
        try:
            for _ in range(40):
                for teacher, student in lists:
                    ema_update_([teacher], [student], 0.5)
        except KeyError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert failures == []

"""fastdino_kernels.pointer_table: contents of tables, and the lifetime of cached ones."""

import threading
import weakref

import pytest
import torch
from fastdino_kernels import pointer_table
from fastdino_kernels.memory import find_overlap
from fastdino_kernels.pointer_table import (
    BF16,
    FP16,
    FP32,
    MIXED,
    Cache,
    make_chunks,
    make_pointers,
    thread_cache,
    upload,
)

CPU = torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    """A switch that simulates CUDA-graph capture while it is [True]."""
    switch = [False]
    monkeypatch.setattr(pointer_table, "_is_capturing", lambda device: switch[0])
    monkeypatch.setattr(pointer_table, "_in_graphs", {})
    return switch


@pytest.fixture
def stream(monkeypatch):
    """The number of the current stream in a list."""
    number = [0]
    monkeypatch.setattr(pointer_table, "_current_stream", lambda device: number[0])
    return number


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    """The memory for capture, which is not pinned here."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(pointer_table, "_pinned", pointer_table._Pinned())
    return pointer_table._pinned


class Made:
    """A value of a cache."""


def test_chunks_number_every_tensor_even_an_empty_one():
    chunks = make_chunks([5, 0, 9], 4, CPU)
    assert chunks.rows.tolist() == [[0, 5], [2, 0], [3, 9]]
    assert chunks.owners.tolist() == [0, 0, 1, 2, 2, 2]


def test_words_hold_addresses_and_dtypes():
    x = [torch.zeros(5), torch.zeros(0, 3), torch.zeros(3, 3, dtype=torch.float16)]
    y = [torch.zeros(5).bfloat16(), None, torch.zeros(3, 3).bfloat16()]
    pointers = make_pointers([x, y, [None] * 3], CPU, [7, 8, 9])
    words = [
        [x[0].data_ptr() * 4 + FP32, y[0].data_ptr() * 4 + BF16, 0, 7],
        [FP32, 0, 0, 8],
        [x[2].data_ptr() * 4 + FP16, y[2].data_ptr() * 4 + BF16, 0, 9],
    ]
    assert pointers.words.tolist() == words
    assert pointers.codes == (MIXED, BF16, None)


def test_cache_is_bounded_and_keeps_recent_values():
    cache, made = Cache(), []

    def get(key):
        return cache.get(key, CPU, lambda: made.append(key) or len(made))

    for other in range(3 * pointer_table._CACHED):
        assert get("kept") == 1
        get(other)
    assert made == ["kept", *range(3 * pointer_table._CACHED)]
    get(0)
    assert made[-1] == 0


def test_failed_check_is_not_cached():
    cache = Cache()

    def refuse():
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            cache.get("key", CPU, refuse)


def test_table_belongs_to_the_stream_that_filled_it(stream):
    cache = Cache()
    stream[0] = 1
    first = cache.get("key", CPU, Made)
    assert cache.get("key", CPU, Made) is first
    stream[0] = 2
    second = cache.get("key", CPU, Made)
    assert second is not first
    assert cache.get("key", CPU, Made) is second
    stream[0] = 1
    assert cache.get("key", CPU, Made) is first


def test_table_made_during_capture_is_not_cached(capturing):
    cache = Cache()
    capturing[0] = True
    captured = cache.get("key", CPU, Made)
    capturing[0] = False
    assert cache.get("key", CPU, Made) is not captured


def test_table_used_by_a_graph_outlives_the_cache(capturing, stream):
    cache = Cache()
    used, forgotten = (weakref.ref(cache.get(key, CPU, Made)) for key in "ab")
    capturing[0], stream[0] = True, 5  # a capture has a stream of its own
    assert cache.get("a", CPU, Made) is used()
    capturing[0] = False
    del cache
    assert forgotten() is None
    assert used() is not None


def test_pinned_memory_is_reserved_before_capture_and_never_reused(capturing, stream, pinned):
    with pytest.raises(RuntimeError, match="for 8 words .*before capturing"):
        pinned.take(8)
    stream[0] = 1
    Cache().get("key", CPU, Made)
    half = pointer_table._PINNED_WORDS // 2
    taken = [pinned.take(half - 1), pinned.take(2)]
    capturing[0] = True
    Cache().get("key", CPU, Made)  # none can be had during capture
    taken.append(pinned.take(half - 2))
    with pytest.raises(RuntimeError, match="for 2 words"):
        pinned.take(2)  # one remains
    capturing[0] = False
    Cache().get("key", CPU, Made)
    taken.append(pinned.take(2 * half))
    assert [len(piece) for piece in taken] == [half - 1, 2, half - 2, 2 * half]
    assert find_overlap(taken, written=len(taken)) is None


def test_upload_keeps_numbers_exactly():
    assert upload([1, 2**62], CPU).tolist() == [1, 2**62]
    assert upload([0.1, -2.0], CPU, "d").tolist() == [0.1, -2.0]


def test_each_thread_has_a_cache_of_its_own():
    caches = []

    def note():
        caches.append(thread_cache("name"))

    for _ in range(2):
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()
    assert len({id(cache) for cache in (*caches, thread_cache("name"))}) == 3
    assert thread_cache("name") is thread_cache("name")
    assert thread_cache("other") is not thread_cache("name")

"""fastdino.data.loader_fused: exact crops for every decoder, and correct use of CUDA streams."""

from __future__ import annotations

import contextlib
import random
import types

import numpy as np
import pytest
import torch

from fastdino.augmentation.params import draw_crops
from fastdino.data import loader_fused
from fastdino.data.image_dataset import scan_images
from tests.loaders import (
    HAS_DALI,
    assert_same,
    break_files,
    build_loader,
    levels,
    make_config,
    needs_dali,
    odd_folder,
    photo,
    undrawn,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def test_fused_crops_equal_torchvisions_bit_for_bit(tmp_path, build):
    (odd_folder(tmp_path) / "huge.png").unlink()
    for n in range(19):
        photo(n, (100 + n, 75 + 3 * n)).save(tmp_path / "k" / f"{n:02}.jpg", quality=92)
    dataset = scan_images(tmp_path)
    options = {"global_crops_size": 96, "local_crops_size": 40, "local_crops_number": 4}
    options["batch_size_per_gpu"] = 6
    exact = build(dataset, crops="torchvision", **options)
    ours = [
        build(dataset, crops="fused", decode=decode, num_workers=workers, **options)
        for decode, workers in (("pillow", 1), *[("cpu", 1), ("cpu", 2)] * bool(HAS_DALI))
    ]
    break_files(dataset, [(4, "cut"), (9, "gone"), (30, "text")])
    for epoch, start in ((0, 0), (1, 0), (1, 4)):
        expected = list(exact.epoch(epoch, start))
        assert len(expected) == 6 - start
        for loader in ours:
            assert_same(loader.epoch(epoch, start), expected)
    for loader in ours:
        assert exact.skipped.keys() == loader.skipped.keys()
        assert len(loader.skipped) == 3


@pytest.mark.parametrize("decode", ["pillow", pytest.param("cpu", marks=needs_dali)])
def test_the_description_names_the_decoder(photos, build, decode):
    description = build(photos, crops="fused", decode=decode, num_workers=1).description
    decoder = {"pillow": "Pillow", "cpu": "DALI"}[decode]
    assert f"1 threads, decoded by {decoder}" in description


def test_invalid_crops_are_refused_before_the_kernel(ragged_images):
    image = ragged_images[-1]
    groups = draw_crops(make_config(), 0, [0], [image.shape[:2]])
    groups[1].left[0, 1] = image.shape[1]
    with pytest.raises(ValueError, match=r"must be inside its image.*crop 3 of images\[0\]"):
        loader_fused._crops([image], list(zip(groups, (8, 4), strict=True)))


class Event:
    """An event of a fake stream, which passes only when it is waited for."""

    def __init__(self, log, number):
        self.log, self.number = log, number

    def query(self):
        return ("waited", self.number) in self.log

    def synchronize(self):
        self.log.append(("waited", self.number))


@pytest.fixture
def slow_gpu(monkeypatch):
    """Fake CUDA on the CPU, with events that pass only when waited for; returns its log."""
    log = []

    def record_event():
        log.append(("recorded", sum(entry[0] == "recorded" for entry in log)))
        return Event(log, log[-1][1])

    stream = types.SimpleNamespace(record_event=record_event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    empty = torch.empty

    def pageable(*args, pin_memory=False, **options):
        if pin_memory:
            log.append(("pinned", args[0]))
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", pageable)
    monkeypatch.setattr(loader_fused, "_crops", crops_of_one_pixel)
    return log


def crops_of_one_pixel(pictures, drawn):
    first = torch.stack([picture[0, 0] for picture in pictures])[:, None, :, None, None]
    return [first.expand(-1, params.top.shape[1], 3, size, size).float() for params, size in drawn]


def make(backend, pictures):
    shapes = [tuple(picture.shape[:2]) for picture in pictures]
    params = draw_crops(make_config(), 0, range(len(pictures)), shapes)
    return backend.make(pictures, list(zip(params, (4, 2), strict=True))).crops


def test_pinned_memory_is_reused_after_its_copy_and_grows_with_room(slow_gpu):
    backend = loader_fused._CudaBackend(torch.device("cpu", 0))
    rng = np.random.default_rng(0)
    for height in (30, 31, 33, 32, 40, 44):
        pictures = [rng.integers(0, 256, (height, 40, 3), dtype=np.uint8) for _ in range(3)]
        started = len(slow_gpu)
        crops = make(backend, pictures)
        assert [tuple(crop.shape) for crop in crops] == [(3, 3, 4, 4)] * 2 + [(3, 3, 2, 2)] * 2
        for crop in crops:
            assert torch.equal(crop[:, :, 0, 0], torch.tensor([list(p[0, 0]) for p in pictures]))
        if started:  # The first of a batch's two events is the copy's.
            events = [number for kind, number in slow_gpu[:started] if kind == "recorded"]
            assert slow_gpu[started] == ("waited", events[-2])
    sizes = [size for kind, size in slow_gpu if kind == "pinned"]
    assert len(sizes) == 2
    assert sizes[0] >= 3 * 33 * 40 * 3 > 3 * 30 * 40 * 3


def test_images_on_the_gpu_are_held_until_their_crops_are_made(slow_gpu):
    backend = loader_fused._CudaBackend(torch.device("cpu", 0))
    freed, kept = [], loader_fused.AHEAD + 1
    for n in range(5):
        picture = torch.full((6, 5, 3), n, dtype=torch.uint8)
        weak = torch._C._WeakTensorRef(picture)
        freed.append(weak.expired)
        made = make(backend, [picture, np.full((4, 9, 3), 99, np.uint8)])
        assert made[0][:, 0, 0, 0].tolist() == [n, 99]
        del picture
        expected = [i < n + 1 - kept for i in range(n + 1)]
        assert [is_freed() for is_freed in freed] == expected
        waits = [number for kind, number in slow_gpu if kind == "waited"]
        assert all(2 * i + 1 in waits for i in range(n + 1) if expected[i])
    backend.close()
    assert all(is_freed() for is_freed in freed)
    assert slow_gpu[-1] == ("waited", 9)


def on_gpu(test):
    needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs_cuda(test))


by_each_decoder = pytest.mark.parametrize(
    "decode", ["pillow", *[pytest.param(name, marks=needs_dali) for name in ("cpu", "gpu")]]
)


@pytest.fixture
def on_cuda():
    """Build fused loaders for a GPU, closed at the end of the test."""
    built = []

    def build_one(dataset, **changes):
        built.append(build_loader(make_config(crops="fused", **changes), dataset, device="cuda"))
        return built[-1]

    yield build_one
    for loader in built:
        loader.close()


@pytest.fixture
def dawdling(monkeypatch):
    """Delay the loader's stream by up to about 2 ms before each crop."""
    real, rng = loader_fused._crops, random.Random(0)

    def slow(*args):
        torch.cuda._sleep(rng.randrange(4_000_000))
        return real(*args)

    monkeypatch.setattr(loader_fused, "_crops", slow)


def spoil(rng):
    """Overwrite recently freed memory, on the current stream and pinned."""
    for _ in range(4):
        size = rng.choice([1 << 10, 3 * 48 * 48 * 16, 120_000, 1 << 20])
        torch.full((size,), 255, dtype=torch.uint8, device="cuda")
        torch.empty(size, dtype=torch.uint8, pin_memory=True).fill_(255)


def copied_late(loader, epoch, rng):
    """Copy an epoch's crops on delayed streams while overwriting all freed memory."""
    kept = []
    streams = [torch.cuda.Stream() for _ in range(3)]
    for batch in loader.epoch(epoch):
        late = rng.choice(streams)
        late.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(late):
            torch.cuda._sleep(rng.randrange(2_000_000))
            for crop in batch:
                crop.record_stream(late)
            kept.append([crop.clone() for crop in batch])
            spoil(rng)
        with torch.cuda.stream(loader._backend.stream):
            spoil(rng)
        del batch, crop
        if rng.random() < 0.05:
            torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return [[crop.cpu() for crop in crops] for crops in kept]


@on_gpu
@by_each_decoder
def test_batches_are_correct_under_delayed_streams_and_reused_memory(
    photos, build, on_cuda, dawdling, monkeypatch, decode
):
    if decode == "gpu":  # Color operations would enlarge the differences of its pixels.
        undrawn(monkeypatch)
    rng = random.Random(1)
    exact = build(photos)
    loader = on_cuda(photos, decode=decode, num_workers=8)
    for epoch in range(60):  # of 4 batches
        expected, ours = list(exact.epoch(epoch)), copied_late(loader, epoch, rng)
        assert_decoded_alike(ours, expected, decode)
    assert loader.skipped == {}


def assert_decoded_alike(ours, expected, decode):
    """Compare batches: exactly, or approximately for --decode gpu."""
    if decode != "gpu":
        assert_same(ours, expected)
        return
    for batch, other in zip(ours, expected, strict=True):
        for crop, exact in zip(batch, other, strict=True):
            assert all(levels(a, b) < 2 for a, b in zip(crop, exact, strict=True))


@on_gpu
@by_each_decoder
def test_batches_are_correct_while_the_main_thread_captures_a_graph(
    photos, build, on_cuda, dawdling, monkeypatch, decode
):
    if decode == "gpu":
        undrawn(monkeypatch)
    expected = list(build(photos).epoch(0))
    loader = on_cuda(photos, decode=decode, num_workers=4)
    static = torch.ones(64, 64, device="cuda") * 1.0
    for _ in range(10):
        kept, graphs = [], []
        for batch in loader.epoch(0):
            kept.append([crop.clone() for crop in batch])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = static
                for _ in range(300):  # takes milliseconds, while the loader prepares batches
                    out = out * 1.0
            graphs.append((graph, out))
        for graph, out in graphs:
            graph.replay()
            assert torch.equal(out.cpu(), static.cpu())
        assert_decoded_alike([[c.cpu() for c in batch] for batch in kept], expected, decode)


@on_gpu
def test_crops_on_a_gpu_are_exact_for_unusual_and_broken_files(tmp_path, build, on_cuda):
    (odd_folder(tmp_path) / "huge.png").unlink()
    dataset = scan_images(tmp_path)
    exact = build(dataset, crops="torchvision", batch_size_per_gpu=4)
    loader = on_cuda(dataset, batch_size_per_gpu=4, num_workers=2)
    break_files(dataset, [(4, "cut"), (9, "gone")])
    for epoch in range(3):
        assert_same([[c.cpu() for c in batch] for batch in loader.epoch(epoch)], exact.epoch(epoch))
    assert exact.skipped.keys() == loader.skipped.keys()

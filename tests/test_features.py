from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastdino import distributed
from fastdino.data import scan_images
from fastdino.data.image_files import Conversion, read_headers
from fastdino.errors import DataError
from fastdino.evals.features import Extractor, ImageFiles, StoppedError, batches_by_size
from fastdino.evals.transforms import center_crop

SIZES = [0, 1, 0, 1, 0]  # of the images in `folder`: three batches of two or fewer


def mean_colour(images):
    return images.mean((2, 3))


def extractor(**settings):
    transform = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32)])
    defaults = {"model": mean_colour, "transform": transform, "batch_size": 2, "workers": 0}
    return Extractor(**({**defaults, "device": torch.device("cpu")} | settings))


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        Image.new("RGB", (8 + 4 * (i % 2), 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_batches_hold_one_size_and_each_index_once():
    assert batches_by_size(["a", "b", "a", "a", "b"], 2) == [[0, 2], [3], [1, 4]]


@pytest.mark.parametrize("workers", [0, 2])
def test_features_come_in_the_order_of_the_files(folder, pictures, workers):
    images = ImageFiles.in_folder(folder)
    features, unusable = extractor(workers=workers).extract(images, "", sizes=SIZES)
    assert features[:, 0].tolist() == [0, 50, 100, 150, 200]
    assert unusable == {}
    dataset, transform = scan_images(pictures), center_crop(16, 8)
    flat = extractor(model=torch.nn.Flatten(), transform=transform, batch_size=4, workers=workers)
    expected = torch.stack([transform(Image.open(path)).flatten() for path in dataset.paths])
    torch.testing.assert_close(flat.extract_usable(dataset, "")[0], expected)


class Signalled(torch.nn.Module):
    """A transform that gets a signal when it runs in a worker."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, image):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), self.number)
        return v2.functional.pil_to_tensor(image).float()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_workers_ignore_the_signals_that_stop_a_run(folder, monkeypatch, method, number):
    """A spawned worker inherits no handlers, nor does one of Python 3.14's default, forkserver."""
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    images = ImageFiles.in_folder(folder)
    stopped = extractor(workers=1, transform=Signalled(number))
    features, unusable = stopped.extract(images, "", sizes=SIZES)
    assert features[:, 0].tolist() == [0, 50, 100, 150, 200]
    assert unusable == {}


def test_reading_an_image_does_not_list_all_paths(pictures, monkeypatch):
    dataset = scan_images(pictures)
    listing = property(lambda _: pytest.fail("the time per image grows with the dataset"))
    monkeypatch.setattr(type(dataset), "paths", listing)
    extractor(transform=center_crop(16, 8)).extract_usable(dataset, "")


def test_shares_of_the_ranks_add_up_to_the_whole(folder, monkeypatch):
    (folder / "1.png").write_text("no picture")
    images = ImageFiles.in_folder(folder)
    whole, whole_unusable = extractor().extract(images, "", sizes=SIZES)
    monkeypatch.setattr(distributed, "total", lambda values: values)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    gathered, shares, others = [], [], (3, {}, False)
    monkeypatch.setattr(distributed, "gather", lambda own: gathered.append(own) or [own, others])
    monkeypatch.setattr(distributed, "fail_together", nullcontext)
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(extractor().extract(images, "", sizes=SIZES)[0])
    torch.testing.assert_close(sum(shares), whole)
    assert [int((share[:, 0] > 0).sum()) for share in shares] == [1, 1, 1, 0]
    assert [width for width, *_ in gathered] == [3, 3, 3, 0], "the last rank has no batch"
    assert {index for _, bad, _ in gathered for index in bad} == set(whole_unusable) == {1}


@pytest.mark.parametrize("own", [True, False])
def test_stop_on_one_rank_stops_all(folder, monkeypatch, own):
    asked, computed = [], []
    made = extractor(
        model=lambda x: computed.append(len(x)) or x.mean((2, 3)),
        should_stop=lambda: asked.append(own) or (own and len(asked) > 1),
    )
    other = (3, {}, not own)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, other])
    with pytest.raises(StoppedError):
        made.extract(ImageFiles.in_folder(folder), "", sizes=SIZES)
    assert len(computed) == (1 if own else len(asked))


def test_boxes_are_cut_out(folder):
    image = Image.new("RGB", (10, 10), "black")
    image.paste((100, 0, 0), (2, 3, 6, 9))
    image.save(folder / "box.png")
    images = ImageFiles([folder / "box.png"] * 2, [(2, 3, 6, 9), None])
    headers = read_headers(images.paths, 2)
    assert images.sizes(headers) == [(6, 4), (10, 10)]
    features, _ = extractor().extract_usable(images, "", sizes=images.sizes(headers))
    assert features[:, 0].tolist() == pytest.approx([100, 24])


def test_boxes_are_of_the_stored_pixels_and_rotated_afterwards(tmp_path):
    image = Image.new("RGB", (10, 6), "black")
    image.paste((100, 0, 0), (2, 3, 6, 5))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    for turned, shapes in ((False, [(2, 4), (6, 10)]), (True, [(4, 2), (10, 6)])):
        boxes = [(2, 3, 6, 5), None]
        images = ImageFiles([tmp_path / "turned.png"] * 2, boxes, Conversion(exif=turned))
        assert images.sizes(read_headers(images.paths, 2)) == shapes
        read = [images.read_rgb(i) for i in range(2)]
        assert [(one.height, one.width) for one in read] == shapes
        assert np.asarray(read[0])[..., 0].min() == 100


def test_sizes_of_unreadable_images_are_empty(folder):
    (folder / "1.png").write_text("no picture")
    images = ImageFiles.in_folder(folder)
    sizes = images.sizes(read_headers(images.paths, 2))
    assert sizes == [(8, 8), (), (8, 8), (8, 12), (8, 8)]


def test_unusable_images_have_a_reason_and_no_features(folder, capsys):
    (folder / "1.png").write_text("no picture")
    images = ImageFiles.in_folder(folder)
    for min_side in (1, 8):
        features, unusable = extractor(min_side=min_side).extract(images, "", sizes=SIZES)
        assert list(unusable) == [1]
        assert "1.png is not an image" in unusable[1]
        assert features[:, 0].tolist() == [0, 0, 100, 150, 200]
    (folder / "3.png").write_text("no picture")
    features, usable = extractor().extract_usable(images, "folder", skipped=3)
    assert usable.tolist() == [0, 2, 4]
    assert features[:, 0].tolist() == [0, 100, 200]
    reason = f"{folder / '1.png'} is not an image"
    assert capsys.readouterr().err == f"folder: 5 images left out: {reason}\n"
    with pytest.raises(DataError, match=r"none of the 5 images .* 8 x 8 px .* at least 9 px"):
        extractor(min_side=9).extract(images, "", sizes=SIZES)


def test_folders_without_images_are_errors(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        ImageFiles.in_folder(tmp_path / "none")
    with pytest.raises(DataError, match="no images in"):
        ImageFiles.in_folder(tmp_path)

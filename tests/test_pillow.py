"""fastdino.augmentation.pillow and its loader: the paper's chain of crops, bit for bit."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from fastdino.augmentation import pillow
from fastdino.augmentation.params import draw_crops
from fastdino.data import loader_torchvision
from fastdino.data.image_dataset import ImageDataset
from tests.loaders import assert_same, break_files, make_config, photo

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


class PaperBlur:
    """GaussianBlur of the paper's utils.py."""

    def __init__(self, p, radius_min, radius_max):
        self.prob, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, img):
        if random.random() > self.prob:
            return img
        radius = random.uniform(self.radius_min, self.radius_max)
        return img.filter(ImageFilter.GaussianBlur(radius=radius))


class PaperSolarization:
    """Solarization of the paper's utils.py."""

    def __init__(self, p):
        self.p = p

    def __call__(self, img):
        return ImageOps.solarize(img) if random.random() < self.p else img


def paper_chain(crop, size):
    """The paper's Compose, with probabilities 0 or 1 and get_params returning the drawn values."""
    resized_crop = transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC)
    resized_crop.get_params = lambda *_: (crop.top, crop.left, crop.height, crop.width)
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    jitter.get_params = lambda *_: (torch.tensor(crop.jitter_order), *crop.jitter_factor)
    return transforms.Compose(
        [
            resized_crop,
            transforms.RandomHorizontalFlip(p=float(crop.flip)),
            transforms.RandomApply([jitter], p=float(crop.jitter)),
            transforms.RandomGrayscale(p=float(crop.gray)),
            PaperBlur(float(crop.blur_radius > 0), crop.blur_radius, crop.blur_radius),
            PaperSolarization(float(crop.solarize)),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def test_crops_equal_the_papers_chain_bit_for_bit():
    image = photo(0, (300, 200))
    drawn = draw_crops(make_config(), 0, np.arange(20), np.tile([200, 300], (20, 1)))
    kinds = set()
    for params, size in zip(drawn, (224, 96), strict=True):
        for crop in itertools.chain.from_iterable(params.of_sample(b) for b in range(20)):
            ours = pillow.make_crop(image, crop, size)
            assert ours.shape == (3, size, size)
            assert ours.dtype == torch.float32
            assert torch.equal(ours, paper_chain(crop, size)(image)), crop
            kinds |= {("flip", crop.flip), ("jitter", crop.jitter), ("gray", crop.gray)}
            kinds |= {("blur", crop.blur_radius > 0), ("solarize", crop.solarize)}
    assert len(kinds) == 10, "not every branch was tested"


def test_torchvision_loader_makes_the_drawn_crops(photos, build):
    config = make_config()
    loader = build(photos)
    batch = next(iter(loader.epoch(3)))
    ids = loader._plan.batches(3, 0)[0]
    drawn = draw_crops(config, 3, ids, photos.sizes[ids])
    for b, index in enumerate(ids):
        image = Image.open(photos.paths[index]).convert("RGB")
        crops = drawn[0].of_sample(b) + drawn[1].of_sample(b)
        for n, (crop, size) in enumerate(zip(crops, (48, 48, 24, 24), strict=True)):
            assert torch.equal(batch[n][b], pillow.make_crop(image, crop, size))


def test_each_image_is_decoded_once(photos, build, monkeypatch):
    decoded = []
    real = ImageDataset.read_rgb

    def counting(self, i):
        decoded.append(i)
        return real(self, i)

    monkeypatch.setattr(ImageDataset, "read_rgb", counting)
    assert len(list(build(photos).epoch(0))) == 4
    assert len(decoded) == len(set(decoded)) == 16


def test_workers_ignore_sigterm(photos, build):
    loader = build(photos, num_workers=2)
    batches = loader.epoch(0)
    next(batches)
    workers = loader._loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 3
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_can_be_spawned(photos, build):
    dataset = loader_torchvision._CropDataset(make_config(), photos)
    assert len(pickle.loads(pickle.dumps(dataset))) == 18
    loader = build(photos, num_workers=1)
    loader._loader.multiprocessing_context = "spawn"
    assert_same(loader.epoch(0), build(photos).epoch(0))


def test_sample_reports_every_unreadable_file_it_replaces(breakable):
    dataset = loader_torchvision._CropDataset(make_config(), breakable)
    break_files(breakable, [(17, "text"), (0, "text")])
    for _ in range(2):  # Known ones again: an abandoned epoch may have lost the first report.
        assert [index for index, _ in dataset[0, 17][1]] == [17, 0]

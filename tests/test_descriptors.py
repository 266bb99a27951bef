from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

from fastdino import distributed
from fastdino.errors import DataError
from fastdino.evals.descriptors import (
    Picture,
    Whitening,
    batches_of,
    cls_and_gem,
    extract_descriptors,
    gem,
    multi_scale,
    pictures_in,
)
from fastdino.models.weights import load_backbone

CPU = torch.device("cpu")


def test_gem_is_the_fourth_root_of_the_mean_fourth_power():
    tokens = torch.tensor([[[1.0, -5.0], [2.0, 3.0]]])
    expected = [[(17 / 2) ** 0.25, (81 / 2) ** 0.25]]
    torch.testing.assert_close(gem(tokens), torch.tensor(expected))
    assert gem(-torch.ones(1, 3, 1)).item() == pytest.approx(1e-6), "nothing below the floor"


def test_a_copys_descriptor_is_cls_beside_gem():
    model = load_backbone("", checkpoint_key="teacher", arch="vit_nano", patch_size=8).module
    images = torch.randn(2, 3, 24, 16)
    with torch.no_grad():
        found = cls_and_gem(model)(images)
        tokens = model.get_intermediate_layers(images, 1)[0].double()
    assert found.shape == (2, 2 * 96)
    torch.testing.assert_close(found[:, :96].double(), tokens[:, 0])
    mean = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(1).pow(0.25)
    torch.testing.assert_close(found[:, 96:].double(), mean, rtol=1e-5, atol=1e-6)


def test_scales_are_averaged_as_they_are():
    sides = []

    def model(images):
        sides.append(tuple(images.shape[-2:]))
        return images.mean((2, 3)) * images.shape[-1]  # the larger the scale, the longer

    images = torch.randn(2, 3, 40, 20)
    found = multi_scale(model)(images)
    assert sides == [(40, 20), (28, 14), (20, 10)]
    expected = images.mean((2, 3)) * 20
    for height, width in sides[1:]:
        scale = (2**-0.5, 0.5)[width == 10]
        small = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        assert small.shape[-2:] == (height, width)
        expected = expected + small.mean((2, 3)) * width
    torch.testing.assert_close(found, expected / 3)


def test_whitened_features_have_the_identity_as_second_moment():
    torch.manual_seed(0)
    features = torch.randn(500, 6).double() @ torch.randn(6, 6).double() + 3
    whitening = Whitening.learn(features)
    # About zero, as the paper's code learns it, though it subtracts the mean where it applies it.
    turned = features @ whitening.projection.T
    torch.testing.assert_close(turned.T @ turned / 500, torch.eye(6).double())
    torch.testing.assert_close(whitening(features), turned - turned.mean(0))
    energy = whitening.projection.norm(dim=1)
    assert torch.equal(energy, energy.sort().values), "the strongest axis first"


def test_whitening_does_not_blow_up_axes_without_energy():
    features = torch.randn(50, 4).double()
    features[:, 3] = 0
    projection = Whitening.learn(features).projection
    largest = torch.linalg.eigvalsh(features.T @ features / 50).max()
    assert projection.abs().max().item() == pytest.approx((1e-5 * largest.item()) ** -0.5)


def test_batches_hold_one_kind_each_and_every_place_once():
    batches = batches_of(["a", "b", "a", "a", "b"], 2)
    assert batches == [[0, 2], [3], [1, 4]]


def write(path, size, colour):
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png", (8 + 4 * (i % 2), 8), (50 * i, 0, 0))
    return tmp_path


def extract(pictures, **overrides):
    transform = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32)])
    settings = {"batch_size": 2, "workers": 0, "device": CPU}
    return extract_descriptors(
        lambda images: images.mean((2, 3)), pictures, transform, **(settings | overrides)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_features_come_in_the_order_of_the_files(folder, workers):
    features, bad = extract(pictures_in(folder), kinds=[0, 1, 0, 1, 0], workers=workers)
    assert features[:, 0].tolist() == [0, 50, 100, 150, 200]
    assert bad == {}


def test_the_shares_of_processes_add_up_to_the_whole(folder, monkeypatch):
    (folder / "1.png").write_text("no picture")
    kinds = [0, 1, 0, 1, 0]  # three batches
    whole, whole_bad = extract(pictures_in(folder), kinds=kinds)
    monkeypatch.setattr(distributed, "total", lambda values: values)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    seen = []
    monkeypatch.setattr(distributed, "gather", lambda own: seen.append(own) or [own, (3, {})])
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(extract(pictures_in(folder), kinds=kinds)[0])
    torch.testing.assert_close(sum(shares), whole)
    assert [int((share[:, 0] > 0).sum()) for share in shares] == [1, 1, 1, 0]
    assert [width for width, _ in seen] == [3, 3, 3, 0], "the last has no batch"
    assert {place for _, bad in seen for place in bad} == set(whole_bad) == {1}


def test_boxes_are_cut_out(folder):
    image = Image.new("RGB", (10, 10), "black")
    image.paste((100, 0, 0), (2, 3, 6, 9))
    image.save(folder / "box.png")
    features, _ = extract([Picture(folder / "box.png", (2, 3, 6, 9))])
    assert features[0].tolist() == [100, 0, 0]


def test_bad_images_have_a_reason_and_no_features(folder):
    (folder / "1.png").write_text("no picture")
    features, bad = extract(pictures_in(folder), kinds=[0, 1, 0, 1, 0])
    assert list(bad) == [1]
    assert "is not an image" in bad[1]
    assert "1.png" in bad[1]
    assert features[:, 0].tolist() == [0, 0, 100, 150, 200]
    features, bad = extract(pictures_in(folder), kinds=[0, 1, 0, 1, 0], min_side=8)
    assert list(bad) == [1]
    with pytest.raises(DataError, match=r"none of the 5 images .* 8 x 8 px .* at least 9 px"):
        extract(pictures_in(folder), kinds=[0, 1, 0, 1, 0], min_side=9)


def test_folders_without_images_are_mistakes(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        pictures_in(tmp_path / "none")
    with pytest.raises(DataError, match="no images in"):
        pictures_in(tmp_path)

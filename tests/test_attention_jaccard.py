"""`fastdino attention --data_path`: reading images with masks, and the Jaccard scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.data.shapes import write_shapes
from fastdino.data.shapes_clips import davis_palette
from fastdino.evals import attention_jaccard
from fastdino.evals.attention_jaccard import find_masked, read_labels
from fastdino.evals.attention_maps import attention_maps, fit_to_patches
from fastdino.evals.transforms import to_input
from fastdino.models.backbones import build_backbone
from tests.commands import assert_images_scale

IMAGE, MASK = "JPEGImages/2007_000001.jpg", "SegmentationClass/2007_000002.png"
LISTING = "ImageSets/Segmentation/val.txt"


@pytest.fixture
def run(run_nano, tmp_path):
    """A function that runs the command; returns jaccard.json and stdout, or the error message."""

    def command(root, *words):
        paths = ["--data_path", root, "--output_dir", tmp_path / "out"]
        _, printed, err = run_nano("attention", "--num_workers", 0, *paths, *words)
        return err or (json.loads((tmp_path / "out/jaccard.json").read_text()), printed)

    return command


def save_voc_mask(labels, path):
    image = Image.fromarray(labels)
    image.putpalette(davis_palette())
    image.save(path)


@pytest.fixture
def voc(tmp_path, picture):
    """Three images of different sizes: an object with a void rim, two objects, and no object."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    masks = [np.zeros(size, np.uint8) for size in ((40, 56), (64, 48), (33, 35))]
    masks[0][5:30, 10:50] = 255
    masks[0][8:27, 13:47] = 15
    masks[1][:20, :20], masks[1][40:, 30:] = 3, 7
    for number, mask in enumerate(masks, start=1):
        image = tmp_path / f"voc/JPEGImages/2007_00000{number}.jpg"
        image.write_bytes(picture(number, mask.shape[::-1]))
        save_voc_mask(mask, tmp_path / f"voc/SegmentationClass/{image.stem}.png")
    (tmp_path / "voc" / LISTING).write_text("2007_000001\n2007_000002\n2007_000003\n")
    return tmp_path / "voc"


def reference_jaccard(model, root, name, size, threshold):
    """Caron et al. 2021, figure 4, in float64: the Jaccard index of each head."""
    with Image.open(root / f"JPEGImages/{name}.jpg") as image:
        picture = fit_to_patches(image.convert("RGB"), size, 8)
    with Image.open(root / f"SegmentationClass/{name}.png") as image:
        labels = np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST))
        labels = labels[: size[0] // 8 * 8, : size[1] // 8 * 8]
    object_, valid = labels > 0, labels != 255
    scores = []
    for map_ in attention_maps(model.double(), to_input(picture)[None].double())[0]:
        values = sorted(map_.flatten().tolist())
        cumulative, least = 0.0, values[-1]
        for value in values:
            cumulative += value / sum(values)
            if cumulative > 1 - threshold:
                least = value
                break
        kept = np.kron(map_ >= least, np.ones((8, 8), bool))
        scores.append(100 * (kept & object_)[valid].sum() / (kept | object_)[valid].sum())
    return scores


def test_scores_match_the_paper(voc, nano_model, nano_settings, run):
    scores, printed = run(voc, "--image_size", 44, 52, "--batch_size_per_gpu", 2)
    flags = {"data_path": str(voc), "split": "val", "image_size": [44, 52], "threshold": 0.6}
    assert scores["settings"] == nano_settings | flags
    torch.manual_seed(0)
    untrained = build_backbone("vit_nano", patch_size=8, img_size=32)[0].eval()
    names = ["2007_000001", "2007_000002"]
    for kind, model in (("trained", nano_model), ("untrained", untrained)):
        rows = np.array([reference_jaccard(model, voc, name, [44, 52], 0.6) for name in names])
        for name, row in zip(names, rows, strict=True):
            heads = scores["per_image"][f"JPEGImages/{name}.jpg"][kind]
            assert heads == pytest.approx(row, abs=1e-9)
        assert scores[kind]["best_head"] == pytest.approx(rows.max(1).mean())
        assert scores[kind]["heads"] == pytest.approx(rows.mean(0))
        best = rows.mean(0).argmax()
        fixed = {"head": best, "jaccard": pytest.approx(rows.mean(0)[best])}
        assert scores[kind]["fixed_head"] == fixed
    assert scores["images"] == len(scores["per_image"]) == 2
    assert scores["without_foreground"] == ["JPEGImages/2007_000003.jpg"]
    assert scores["layout"] == "PASCAL VOC"
    lines = [
        f"Jaccard of the best head, {kind} network: {scores[kind]['best_head']:.1f} %"
        for kind in ("trained", "untrained")
    ]
    assert printed.splitlines()[:2] == lines


def test_deep_images_are_scaled_on_request(voc, nano_weights, tmp_path, capsys):
    words = ["attention", "--data_path", voc, "--image_size", 16, 16, "--output_dir", tmp_path]
    words += ["--pretrained_weights", nano_weights, "--device", "cpu", "--baseline", "false"]

    def result():
        return json.loads((tmp_path / "jaccard.json").read_text())["per_image"]

    paths = sorted((voc / "JPEGImages").iterdir())

    def run(*more):
        return cli.main([*map(str, (*words, *more))])

    assert_images_scale(capsys, paths, run, result)


def test_object_masks_replace_missing_class_masks(voc):
    (voc / "SegmentationClass").rename(voc / "SegmentationObject")
    assert find_masked(voc, "val").masks[0] == voc / "SegmentationObject/2007_000001.png"


def test_head_that_equals_the_masks_scores_highest_on_the_shapes_dataset(
    tmp_path, monkeypatch, run
):
    root = tmp_path / "shapes"
    write_shapes(root, train_per_class=1, val_per_class=1, size=64, clips=0, workers=1)
    masked = find_masked(root, "val")
    assert (len(masked.images), masked.void, masked.layout) == (12, None, "class folders")
    for path, mask in zip(masked.images, masked.masks, strict=True):
        assert mask == root / "masks/val" / path.parent.name / f"{path.stem}.png"

    untrained, _ = run(root, "--image_size", 64, "--pretrained_weights", "")
    assert "trained" not in untrained
    assert untrained["images"] == 12

    # Three heads: everything, the background, and the objects.
    labels = iter([Image.fromarray(read_labels(path, None)) for path in masked.masks])

    def ideal(model, images):
        large = [next(labels).resize((256, 256), Image.Resampling.NEAREST) for _ in images]
        mask = torch.from_numpy(np.stack(large)).reshape(-1, 32, 8, 32, 8).double().mean((2, 4))
        return torch.stack((torch.ones_like(mask), 1 - mask, mask), dim=1)

    monkeypatch.setattr(attention_jaccard, "attention_maps", ideal)
    words = ["--pretrained_weights", "", "--image_size", 256, "--threshold", 0.9]
    scores = run(root, *words)[0]["untrained"]
    assert scores["fixed_head"]["head"] == 2
    assert scores["best_head"] > 75
    assert scores["heads"][1] < 15
    assert untrained["untrained"]["best_head"] < 50


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask,
        lambda mask: Image.fromarray(np.array(mask)),  # gray
        lambda mask: Image.fromarray(np.array(mask).astype(np.uint16)),
        lambda mask: mask.convert("RGB"),
    ],
)
def test_labels_are_the_same_in_every_image_mode(tmp_path, change):
    path = tmp_path / "mask.png"
    save_voc_mask(np.array([[0, 1, 20], [255, 255, 0]], np.uint8), path)
    change(Image.open(path)).save(path)
    assert read_labels(path, 255).tolist() == [[0, 1, 1], [2, 2, 0]]
    assert read_labels(path, None).tolist() == [[0, 1, 1], [1, 1, 0]]


def test_one_bit_mask_is_foreground_where_set(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "mask.png")
    assert read_labels(tmp_path / "mask.png", None).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda v: (v / IMAGE).write_text("no"), "2007_000001.jpg is not an image"),
        (lambda v: (v / MASK).write_text("no"), "2007_000002.png is not an image"),
        (
            lambda v: save_voc_mask(np.zeros((9, 9), np.uint8), v / MASK),
            "2007_000002.png is 9 x 9 px, but its image is 64 x 48 px",
        ),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_unusable_pair_is_left_out(voc, run_nano, tmp_path, damage, part, batch_size):
    words = ("attention", "--data_path", voc, "--image_size", 16, 16, "--output_dir", tmp_path)
    words += ("--batch_size_per_gpu", batch_size)
    assert run_nano(*words)[2] == ""
    whole = json.loads((tmp_path / "jaccard.json").read_text())
    damage(voc)
    status, _, err = run_nano(*words)
    assert status == 0
    assert err.startswith("1 images left out: ")
    assert part in err
    scores = json.loads((tmp_path / "jaccard.json").read_text())
    assert scores["images"] == len(scores["per_image"]) == 1
    assert len(scores["left_out"]) == 1
    for name, values in scores["per_image"].items():
        assert values["trained"] == pytest.approx(whole["per_image"][name]["trained"])


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda v: (v / MASK).unlink(), "2007_000002.png is missing"),
        (lambda v: (v / IMAGE).unlink(), "2007_000001.jpg is missing"),
        (lambda v: (v / LISTING).write_text(""), "val.txt lists no image"),
        (lambda v: (v / LISTING).unlink(), "val.txt cannot be read: No su"),
        (lambda v: (v / LISTING).write_text("2007_000003"), "has any foreground"),
        (lambda v: (v / "SegmentationClass").rename(v / "Masks"), "has neither SegmentationClass/"),
        (
            lambda v: (v / "JPEGImages").rename(v / "Images"),
            "has neither JPEGImages/ (PASCAL VOC) ",
        ),
    ],
)
def test_incomplete_dataset_is_reported_in_one_line(voc, run, damage, part):
    damage(voc)
    assert part in run(voc, "--image_size", 16, 16)

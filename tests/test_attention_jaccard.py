"""`fastdino attention --data_path`: reading images with masks, and the Jaccard scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.data.shapes import davis_palette, write_shapes
from fastdino.errors import DataError
from fastdino.evals import attention_jaccard
from fastdino.evals.attention_jaccard import find_masked, head_scores, read_labels, summary
from fastdino.evals.attention_maps import attention_maps, fit_to_patches
from fastdino.evals.options import weights_digest
from fastdino.evals.transforms import to_input
from fastdino.models.backbones import build_backbone

MODEL = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu", "--num_workers", "0"]


@pytest.fixture
def run(tmp_path):
    """A function that runs the command without weights and returns the exit status."""

    def command(root, *words):
        paths = ["--data_path", str(root), "--output_dir", str(tmp_path / "out")]
        return cli.main(["attention", *MODEL, *paths, *map(str, words)])

    return command


@pytest.fixture
def result(tmp_path):
    return lambda: json.loads((tmp_path / "out/jaccard.json").read_text())


def save_voc_mask(labels, path):
    image = Image.fromarray(labels)
    image.putpalette(davis_palette())
    image.save(path)


@pytest.fixture
def voc(tmp_path):
    """Three images of different sizes: an object with a void rim, two objects, and no object."""
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["2007_000001", "2007_000002", "2007_000003"]
    for name, (height, width) in zip(names, [(40, 56), (64, 48), (33, 35)], strict=True):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(root / f"JPEGImages/{name}.jpg")
        labels = np.zeros((height, width), np.uint8)
        if name == names[0]:
            labels[5:30, 10:50] = 255
            labels[8:27, 13:47] = 15
        elif name == names[1]:
            labels[:20, :20], labels[40:, 30:] = 3, 7
        save_voc_mask(labels, root / f"SegmentationClass/{name}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names) + "\n")
    return root


def reference_jaccard(model, root, name, size, threshold):
    """Caron et al. 2021, figure 4, per pixel in float64: the Jaccard index of each head."""
    with Image.open(root / f"JPEGImages/{name}.jpg") as image:
        picture = fit_to_patches(image.convert("RGB"), size, 8)
    with Image.open(root / f"SegmentationClass/{name}.png") as image:
        labels = np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST))
    scores = []
    for map_ in attention_maps(model.double(), to_input(picture)[None].double())[0]:
        values = sorted(map_.flatten().tolist())
        cumulative, least = 0.0, values[-1]
        for value in values:
            cumulative += value / sum(values)
            if cumulative > 1 - threshold:
                least = value
                break
        both = either = 0
        for y in range(map_.shape[0] * 8):
            for x in range(map_.shape[1] * 8):
                if labels[y, x] != 255:
                    kept, object_ = bool(map_[y // 8, x // 8] >= least), labels[y, x] > 0
                    both += kept and object_
                    either += kept or object_
        scores.append(100 * both / either)
    return scores


def test_scores_match_the_paper(voc, nano_weights, nano_model, run, result, capsys):
    words = ["--pretrained_weights", nano_weights, "--image_size", 44, 52]
    assert run(voc, *words, "--batch_size_per_gpu", 2) == 0
    scores = result()
    assert scores["settings"]["weights"] == weights_digest(nano_model)
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
    assert (scores["layout"], scores["settings"]["threshold"]) == ("PASCAL VOC", 0.6)
    printed = capsys.readouterr().out.splitlines()
    best = scores["trained"]["best_head"]
    assert printed[0] == f"Jaccard of the best head, trained network: {best:.1f} %"
    assert printed[1].startswith("Jaccard of the best head, untrained network: ")


def test_object_masks_replace_missing_class_masks(voc):
    (voc / "SegmentationClass").rename(voc / "SegmentationObject")
    assert find_masked(voc, "val").masks[0] == voc / "SegmentationObject/2007_000001.png"


def test_head_that_equals_the_masks_scores_highest_on_the_shapes_dataset(
    tmp_path, monkeypatch, run, result
):
    root = tmp_path / "shapes"
    write_shapes(root, train_per_class=1, val_per_class=1, size=64, clips=0, workers=1)
    masked = find_masked(root, "val")
    assert (len(masked.images), masked.void, masked.layout) == (12, None, "class folders")
    for path, mask in zip(masked.images, masked.masks, strict=True):
        assert mask == root / "masks/val" / path.parent.name / f"{path.stem}.png"

    assert run(root, "--image_size", 64) == 0
    untrained = result()
    assert "trained" not in untrained
    assert untrained["images"] == 12

    # Three heads: everything, the background, and the objects.
    labels = iter([Image.fromarray(read_labels(path, None)) for path in masked.masks])

    def ideal(model, images):
        large = [
            np.asarray(next(labels).resize((256, 256), Image.Resampling.NEAREST)) for _ in images
        ]
        mask = torch.from_numpy(np.stack(large)).reshape(-1, 32, 8, 32, 8).double().mean((2, 4))
        return torch.stack((torch.ones_like(mask), 1 - mask, mask), dim=1)

    monkeypatch.setattr(attention_jaccard, "attention_maps", ideal)
    assert run(root, "--image_size", 256, "--threshold", 0.9) == 0
    scores = result()["untrained"]
    assert scores["fixed_head"]["head"] == 2
    assert scores["best_head"] > 75
    assert scores["heads"][1] < 15
    assert untrained["untrained"]["best_head"] < 50


def test_summary_takes_the_best_head_of_each_image():
    scores = torch.tensor([[0.2, 0.5, 0.1], [0.6, 0.2, 0.4]], dtype=torch.float64)
    assert summary(scores) == {
        "best_head": pytest.approx(55),
        "fixed_head": {"head": 0, "jaccard": pytest.approx(40)},
        "heads": pytest.approx([40, 35, 25]),
    }


def test_image_without_foreground_has_no_score(nano_model):
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
    labels[1, :8] = attention_jaccard.FOREGROUND
    scores = head_scores(nano_model, torch.zeros(2, 3, 16, 16), labels, 0.6)
    assert scores[0].isnan().all()
    assert (scores[1] >= 0).all()


@pytest.mark.parametrize("form", ["palette", "gray", "colors", "wide"])
def test_labels_are_the_same_in_every_image_mode(tmp_path, form):
    labels = np.array([[0, 1, 20], [255, 255, 0]], np.uint8)
    path = tmp_path / "mask.png"
    save_voc_mask(labels, path)
    if form == "gray":
        Image.fromarray(labels).save(path)
    elif form == "wide":
        Image.fromarray(labels.astype(np.uint16)).save(path)
    elif form == "colors":
        Image.open(path).convert("RGB").save(path)
    assert read_labels(path, 255).tolist() == [[0, 1, 1], [2, 2, 0]]
    assert read_labels(path, None).tolist() == [[0, 1, 1], [1, 1, 0]]


def test_one_bit_mask_is_foreground_where_set(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "mask.png")
    assert read_labels(tmp_path / "mask.png", None).tolist() == [[1, 0]]


IMAGE, MASK = "JPEGImages/2007_000001.jpg", "SegmentationClass/2007_000002.png"
LISTING = "ImageSets/Segmentation/val.txt"


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda v: (v / MASK).unlink(), "2007_000002.png is missing"),
        (lambda v: (v / IMAGE).unlink(), "2007_000001.jpg is missing"),
        (lambda v: (v / IMAGE).write_text("no"), "2007_000001.jpg is not an image"),
        (lambda v: (v / MASK).write_text("no"), "2007_000002.png is not an image"),
        (lambda v: (v / LISTING).write_text(""), "val.txt lists no image"),
        (lambda v: (v / LISTING).unlink(), "val.txt cannot be read: No su"),
        (lambda v: (v / LISTING).write_text("2007_000003"), "has any foreground"),
        (
            lambda v: save_voc_mask(np.zeros((9, 9), np.uint8), v / MASK),
            "2007_000002.png is 9 x 9 px, but its image is 64 x 48 px",
        ),
        (lambda v: (v / "SegmentationClass").rename(v / "Masks"), "has neither SegmentationClass/"),
    ],
)
def test_incomplete_dataset_is_reported_in_one_line(voc, capsys, run, damage, part):
    damage(voc)
    assert run(voc, "--image_size", 16, 16) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def test_error_in_a_worker_is_reported_in_one_line(voc, capsys, run):
    (voc / IMAGE).write_text("no")
    assert run(voc, "--image_size", 16, 16, "--num_workers", "1") == 2
    assert capsys.readouterr().err == f"fastdino attention: error: {voc / IMAGE} is not an image\n"


def test_folder_of_unknown_layout_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"has neither JPEGImages/ .* nor masks/val/"):
        find_masked(tmp_path, "val")

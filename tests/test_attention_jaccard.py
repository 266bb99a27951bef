"""`fastdino attention --data_path`: masks as PASCAL VOC and the shapes set lay them, and scores."""

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
from fastdino.evals.attention_jaccard import find_masked, head_scores, read_mask, summary
from fastdino.evals.attention_maps import attention_maps, fit
from fastdino.evals.options import (
    weights_digest,
)
from fastdino.evals.transforms import (
    to_input,
)
from fastdino.models.backbones import build_backbone
from fastdino.models.weights import load_backbone

MODEL = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu", "--num_workers", "0"]


def voc_mask(labels, path):
    image = Image.fromarray(labels)
    image.putpalette(davis_palette())
    image.save(path)


@pytest.fixture
def voc(tmp_path):
    """Three images of unlike sizes, the last without an object; the first's object has a rim."""
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
        voc_mask(labels, root / f"SegmentationClass/{name}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names) + "\n")
    return root


def plain_jaccard(model, root, name, size, threshold):
    """Caron et al. 2021, figure 4, pixel by pixel in float64: each head's Jaccard index."""
    with Image.open(root / f"JPEGImages/{name}.jpg") as image:
        picture = fit(image.convert("RGB"), size, 8)
    with Image.open(root / f"SegmentationClass/{name}.png") as image:
        labels = np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST))
    scores = []
    for map_ in attention_maps(model.double(), to_input(picture)[None].double())[0]:
        values = sorted(map_.flatten().tolist())
        held, least = 0.0, values[-1]
        for value in values:
            held += value / sum(values)
            if held > 1 - threshold:
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


def test_the_command_computes_what_the_paper_says(voc, nano_weights, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--pretrained_weights", nano_weights, "--data_path", voc, "--output_dir", out]
    words += ["--image_size", 44, 52, "--batch_size_per_gpu", 2]
    assert cli.main(["attention", *MODEL, *map(str, words)]) == 0
    result = json.loads((out / "jaccard.json").read_text())
    trained = load_backbone(
        str(nano_weights), checkpoint_key="teacher", arch="vit_nano", patch_size=8
    ).module
    assert result["settings"]["weights"] == weights_digest(trained)
    torch.manual_seed(0)
    untrained = build_backbone("vit_nano", patch_size=8, img_size=32)[0].eval()
    names = ["2007_000001", "2007_000002"]
    for kind, model in (("trained", trained), ("untrained", untrained)):
        rows = np.array([plain_jaccard(model, voc, name, [44, 52], 0.6) for name in names])
        for name, row in zip(names, rows, strict=True):
            found = result["per_image"][f"JPEGImages/{name}.jpg"][kind]
            assert found == pytest.approx(row, abs=1e-9)
        assert result[kind]["best_head"] == pytest.approx(rows.max(1).mean())
        assert result[kind]["heads"] == pytest.approx(rows.mean(0))
        best = rows.mean(0).argmax()
        assert result[kind]["fixed_head"] == {
            "head": best,
            "jaccard": pytest.approx(rows.mean(0)[best]),
        }
    assert result["images"] == len(result["per_image"]) == 2
    assert result["without_foreground"] == ["JPEGImages/2007_000003.jpg"]
    assert (result["layout"], result["settings"]["threshold"]) == ("PASCAL VOC", 0.6)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        f"Jaccard of the best head, trained network: {result['trained']['best_head']:.1f} %"
    )
    assert printed[1].startswith("Jaccard of the best head, untrained network: ")


def test_objects_masks_serve_where_classes_have_none(voc):
    (voc / "SegmentationClass").rename(voc / "SegmentationObject")
    assert find_masked(voc, "val").masks[0] == voc / "SegmentationObject/2007_000001.png"


def test_the_shapes_set_is_measured_and_its_own_masks_score_highest(tmp_path, monkeypatch):
    root, out = tmp_path / "shapes", tmp_path / "out"
    write_shapes(root, train_per_class=1, val_per_class=1, size=64, clips=0, workers=1)
    found = find_masked(root, "val")
    assert (len(found.images), found.void, found.layout) == (12, None, "class folders")
    for path, mask in zip(found.images, found.masks, strict=True):
        assert mask == root / "masks/val" / path.parent.name / f"{path.stem}.png"

    words = ["--data_path", root, "--image_size", 64, "--output_dir", out]
    assert cli.main(["attention", *MODEL, *map(str, words)]) == 0
    result = json.loads((out / "jaccard.json").read_text())
    assert "trained" not in result  # without weights there is one network, the untrained one
    assert result["images"] == 12

    # Heads that look everywhere, everywhere but at the objects, and at the objects.
    masks = iter([Image.fromarray(read_mask(path, None)) for path in found.masks])

    def ideal(model, images):
        large = [
            np.asarray(next(masks).resize((256, 256), Image.Resampling.NEAREST)) for _ in images
        ]
        mask = torch.from_numpy(np.stack(large)).reshape(-1, 32, 8, 32, 8).double().mean((2, 4))
        return torch.stack((torch.ones_like(mask), 1 - mask, mask), dim=1)

    monkeypatch.setattr(attention_jaccard, "attention_maps", ideal)
    words = ["--data_path", root, "--image_size", 256, "--output_dir", out, "--threshold", 0.9]
    assert cli.main(["attention", *MODEL, *map(str, words)]) == 0
    ideal_result = json.loads((out / "jaccard.json").read_text())["untrained"]
    assert ideal_result["fixed_head"]["head"] == 2
    assert ideal_result["best_head"] > 75
    assert ideal_result["heads"][1] < 15
    assert result["untrained"]["best_head"] < 50


def test_the_best_head_is_chosen_for_each_image():
    scores = torch.tensor([[0.2, 0.5, 0.1], [0.6, 0.2, 0.4]], dtype=torch.float64)
    assert summary(scores) == {
        "best_head": pytest.approx(55),
        "fixed_head": {"head": 0, "jaccard": pytest.approx(40)},
        "heads": pytest.approx([40, 35, 25]),
    }


def test_an_image_without_foreground_has_no_score(nano_weights):
    model = load_backbone(
        str(nano_weights), checkpoint_key="teacher", arch="vit_nano", patch_size=8
    ).module
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
    labels[1, :8] = attention_jaccard.FOREGROUND
    scores = head_scores(model, torch.zeros(2, 3, 16, 16), labels, 0.6)
    assert scores[0].isnan().all()
    assert (scores[1] >= 0).all()


@pytest.mark.parametrize("form", ["palette", "gray", "colours", "wide"])
def test_masks_saved_in_other_ways_mean_the_same(tmp_path, form):
    labels = np.array([[0, 1, 20], [255, 255, 0]], np.uint8)
    path = tmp_path / "mask.png"
    if form == "palette":
        voc_mask(labels, path)
    elif form == "gray":
        Image.fromarray(labels).save(path)
    elif form == "wide":
        Image.fromarray(labels.astype(np.uint16)).save(path)
    else:
        image = Image.fromarray(labels)
        image.putpalette(davis_palette())
        image.convert("RGB").save(path)
    assert read_mask(path, 255).tolist() == [[0, 1, 1], [2, 2, 0]]
    if form != "colours":
        assert read_mask(path, None).tolist() == [[0, 1, 1], [1, 1, 0]]


def test_a_one_bit_mask_is_foreground_where_it_is_set(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", None).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (
            lambda v: (v / "SegmentationClass/2007_000002.png").unlink(),
            "2007_000002.png is missing",
        ),
        (lambda v: (v / "JPEGImages/2007_000001.jpg").unlink(), "2007_000001.jpg is missing"),
        (lambda v: (v / "JPEGImages/2007_000001.jpg").write_text("no"), "001.jpg is not an image"),
        (
            lambda v: (v / "SegmentationClass/2007_000001.png").write_text("no"),
            "png is not an image",
        ),
        (lambda v: (v / "ImageSets/Segmentation/val.txt").write_text(""), "val.txt names no image"),
        (
            lambda v: (v / "ImageSets/Segmentation/val.txt").unlink(),
            "val.txt cannot be read: No su",
        ),
        (
            lambda v: voc_mask(np.zeros((9, 9), np.uint8), v / "SegmentationClass/2007_000002.png"),
            "2007_000002.png is 9 x 9 px, its image 64 x 48",
        ),
        (
            lambda v: (v / "ImageSets/Segmentation/val.txt").write_text("2007_000003"),
            "has any foreground",
        ),
        (lambda v: (v / "SegmentationClass").rename(v / "Masks"), "has neither SegmentationClass/"),
    ],
)
def test_what_is_not_whole_is_named_in_one_line(voc, capsys, tmp_path, damage, part):
    damage(voc)
    words = ["--data_path", voc, "--image_size", 16, 16, "--output_dir", tmp_path / "out"]
    status = cli.main(["attention", *MODEL, *map(str, words)])
    err = capsys.readouterr().err
    assert status == 2
    assert part in err
    assert err.count("\n") == 1


def test_what_a_worker_finds_broken_is_told_in_one_line_too(voc, capsys, tmp_path):
    (voc / "JPEGImages/2007_000002.jpg").write_text("no")
    words = ["--data_path", voc, "--image_size", 16, 16, "--output_dir", tmp_path / "out"]
    assert cli.main(["attention", *MODEL, *map(str, words), "--num_workers", "1"]) == 2
    path = voc / "JPEGImages/2007_000002.jpg"
    assert capsys.readouterr().err == f"fastdino attention: error: {path} is not an image\n"


def test_a_folder_of_no_layout_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has neither JPEGImages/ .* nor masks/val/"):
        find_masked(tmp_path, "val")

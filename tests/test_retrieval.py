from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdino import cli
from fastdino.data.image_files import read_headers
from fastdino.evals import retrieval
from fastdino.evals.options import load_network, weights_digest
from fastdino.evals.ranking_metrics import Relevance, revisited_scores
from fastdino.evals.retrieval_dataset import read_dataset
from fastdino.evals.transforms import to_input
from tests.commands import assert_images_scale, error_of, flags_of, turn
from tests.processes import run_commands_in_two

CPU = torch.device("cpu")
SMALL = "--arch vit_nano --patch_size 8 --imsize 40 --num_workers 0 --device cpu"
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


@pytest.fixture
def folder(tmp_path):
    """Write 12 images of three colours in two sizes, and three queries with random relevance."""
    rng = np.random.default_rng(0)
    jpg = tmp_path / "rparis6k" / "jpg"
    jpg.mkdir(parents=True)
    names = [f"{i}" for i in range(12)]
    for i, name in enumerate([*names, "q0", "q1", "q2"]):
        size = (48, 64, 3) if i % 2 else (64, 48, 3)
        pixels = np.clip(rng.normal(COLOURS[i % 3], 40, size), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(jpg / f"{name}.jpg")
    marks = []
    for order in (rng.permutation(12).tolist() for _ in range(3)):
        marks.append({"easy": order[:2], "hard": order[2:4], "junk": order[4:6]})
        marks[-1]["bbx"] = [4.0, 4.0, 44.0, 36.0]
    truth = {"imlist": names, "qimlist": ["q0", "q1", "q2"], "gnd": marks}
    (tmp_path / "rparis6k" / "gnd_rparis6k.pkl").write_bytes(pickle.dumps(truth))
    return tmp_path


@pytest.fixture
def run(folder):
    def command(*words):
        line = ["retrieval", "--data_path", str(folder), "--dataset", "rparis6k", *SMALL.split()]
        return cli.main([*line, *map(str, words)])

    return command


def expected_scores(folder, *, multiscale, crop):
    """Compute features and scores like the paper's script, image by image."""
    args = flags_of(retrieval, *SMALL.split())
    model = load_network(args, CPU, size_flag="imsize")
    dataset = read_dataset(folder, "rparis6k", crop_queries=crop)

    def feature(images, index):
        image = Image.open(images.paths[index]).convert("RGB")
        if crop and images is dataset.queries:
            image = image.crop(images.boxes[index])
        image.thumbnail((40, 40), Image.LANCZOS)
        batch = to_input(image)[None]
        scales = [1, 2**-0.5, 0.5] if multiscale else [1]
        features = [
            model(F.interpolate(batch, scale_factor=s, mode="bilinear", align_corners=False))
            for s in scales
        ]
        return F.normalize(sum(features) / len(features), dim=1)

    with torch.no_grad():
        queries, database = (
            torch.cat([feature(images, index) for index in range(len(images))])
            for images in (dataset.queries, dataset.database)
        )
    return queries, database, revisited_scores(queries, database, dataset.relevance)


@pytest.mark.parametrize(("multiscale", "crop"), [(False, False), (True, True)])
def test_features_and_scores_match_the_papers(run, folder, tmp_path, capsys, multiscale, crop):
    queries, database, scores = expected_scores(folder, multiscale=multiscale, crop=crop)
    args = flags_of(retrieval, *SMALL.split())
    args.multiscale = multiscale
    dataset = read_dataset(folder, "rparis6k", crop_queries=crop)
    network = load_network(args, CPU, size_flag="imsize")
    extractor = retrieval.build_extractor(args, network, CPU)
    headers = [read_headers(images.paths, 1) for images in (dataset.queries, dataset.database)]
    own_queries, own_database, relevance = retrieval.compute_features(extractor, dataset, headers)
    for own, given in zip(relevance, dataset.relevance, strict=True):
        assert all(np.array_equal(getattr(own, n), getattr(given, n)) for n in ("easy", "junk"))
    torch.testing.assert_close(own_queries, queries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own_database, database, rtol=1e-4, atol=1e-5)
    output = tmp_path / "scores.json"
    flags = ("--multiscale", multiscale, "--crop_queries", crop, "--output", output)
    assert run(*flags, "--batch_size_per_gpu", 4) == 0
    result = json.loads(output.read_text())
    assert result["images"] == {"queries": 3, "database": 12}
    assert result["settings"] == {
        "pretrained_weights": "", "checkpoint_key": "teacher", "data_path": str(folder),
        "dataset": "rparis6k", "imsize": 40, "multiscale": multiscale, "crop_queries": crop,
        "weights": weights_digest(network), "exif_orientation": False, "image_range": "clip",
    }  # fmt: skip
    assert result["left_out"] == {"queries": 0, "database": 0}
    for name, values in scores.items():
        assert result[name] == pytest.approx(values)
    captured = capsys.readouterr()
    assert captured.err == "", "no progress bar without a terminal"
    medium = scores["medium"]["mAP"]
    assert f"rparis6k medium: mAP: {medium:.2f}, mP@1: " in captured.out
    assert 0 < scores["hard"]["mAP"] < 100


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--imsize 0", "--imsize must be at least 1, got 0"),
        ("--imsize 7", "cannot take --imsize 7 px images"),
        ("--dataset roxford5k", "there is no ground truth"),
        ("--imsize 20 --multiscale true", "expected sides of at least 16 px"),
        ("--output /dev/null/x.json", "cannot write /dev/null/x.json"),
    ],
)
def test_invalid_flags_are_errors(run, capsys, flags, part):
    assert run(*flags.split()) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("problem", ["is 3 x 40 px when resized", "is not an image"])
def test_unusable_images_are_left_out(run, folder, tmp_path, capsys, problem):
    """The scores are those of a dataset without these images."""
    queries, database, _ = expected_scores(folder, multiscale=False, crop=False)
    relevance = read_dataset(folder, "rparis6k", crop_queries=False).relevance
    jpg = folder / "rparis6k" / "jpg"
    for name in ("3", "7", "q1"):
        if "px" in problem:
            Image.new("RGB", (300, 20)).save(jpg / f"{name}.jpg")
        else:
            (jpg / f"{name}.jpg").write_text("no picture")
    assert run("--output", tmp_path / "out.json") == 0
    err = capsys.readouterr().err
    assert f"queries: 1 images left out: {jpg / 'q1.jpg'} {problem}" in err
    assert f"database: 2 images left out: {jpg / '3.jpg'} {problem}" in err
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["images"] == {"queries": 2, "database": 10}
    assert result["left_out"] == {"queries": 1, "database": 2}
    kept = [i for i in range(12) if i not in (3, 7)]

    def own(indices):
        return np.array([kept.index(i) for i in indices.tolist() if i in kept], np.int64)

    remaining = [
        Relevance(own(relevance[i].easy), own(relevance[i].hard), own(relevance[i].junk))
        for i in (0, 2)
    ]
    for name, values in revisited_scores(queries[[0, 2]], database[kept], remaining).items():
        assert result[name] == pytest.approx(values)


@pytest.mark.parametrize("change", ["rotation", "depth"])
def test_images_are_converted_as_requested(run, folder, tmp_path, capsys, change):
    paths = sorted((folder / "rparis6k" / "jpg").iterdir())
    output = ("--output", tmp_path / "out.json", "--crop_queries", "true")

    def result():
        scores = json.loads((tmp_path / "out.json").read_text())
        return {name: scores[name] for name in ("images", "easy", "medium", "hard")}

    if change == "depth":
        assert_images_scale(capsys, paths, lambda *words: run(*output, *words), result)
        return
    results = []
    whole = output[:2]
    for by_exif in (False, True):
        turn(*paths, by_exif=by_exif)
        assert run(*whole, "--exif_orientation", by_exif) == 0
        results.append(result())
    assert results[0] == results[1]
    turn(*paths[:8], by_exif=True)  # of some images only: the others are upright
    assert run(*whole) == 0
    assert result() != results[0]


def test_a_missing_image_is_an_error(run, folder, capsys):
    (folder / "rparis6k" / "jpg" / "3.jpg").unlink()
    assert run() == 2
    assert "1 images of" in error_of(capsys)


def test_two_processes_match_one(run, folder, tmp_path):
    line = ["retrieval", "--data_path", str(folder), "--dataset", "rparis6k", *SMALL.split()]
    run_commands_in_two([*line, "--output", str(tmp_path / "two.json")])
    assert run("--output", tmp_path / "one.json") == 0
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()

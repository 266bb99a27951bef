from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdino import cli
from fastdino.evals import copydays
from fastdino.evals.options import load_network, weights_digest
from fastdino.evals.transforms import square
from tests.commands import assert_images_scale, error_of, flags_of, turn

CPU = torch.device("cpu")
SMALL = "--arch vit_nano --patch_size 8 --imsize 24 --num_workers 0 --device cpu"


def write(path, seed, *, noise=0.0):
    """Write an image of a few random colours, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).uniform(100, 150, (3, 4, 3)).repeat(10, 0).repeat(10, 1)
    pixels = colours + noise * np.random.default_rng([seed, 1]).standard_normal(colours.shape)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=95)


@pytest.fixture
def folder(tmp_path):
    """Write six originals, nine strong copies, six crops, distractors and whitening images."""
    root = tmp_path / "copydays"
    for i in range(6):
        write(root / "original" / f"20{i:02}00.jpg", i)
        write(root / "crops" / "50" / f"20{i:02}00.jpg", i, noise=60)
        for j in range(1 + i % 2):
            write(root / "strong" / f"20{i:02}0{j + 1}.jpg", i, noise=120 + 60 * j)
    for i in range(5):
        write(tmp_path / "distractors" / f"{i}.jpg", 100 + i)
    for i in range(30):
        write(tmp_path / "whitening" / f"{i}.jpg", 200 + i)
    return tmp_path


@pytest.fixture
def run(folder):
    def command(*words):
        line = ["copydays", "--data_path", str(folder / "copydays"), *SMALL.split()]
        return cli.main([*line, *map(str, words)])

    return command


def network():
    """Return the untrained network of the command."""
    return load_network(flags_of(copydays, *SMALL.split()), CPU, size_flag="imsize")


@torch.no_grad()
def paper_map(folder, *, whiten):
    """Compute the mAP of strong/ like the paper's code: image by image, in float64."""
    model, transform = network(), square(24)

    def features(name):
        paths = sorted((folder / name).glob("*.jpg"))
        tokens = [
            model.get_intermediate_layers(transform(Image.open(p))[None], 1)[0][0].double()
            for p in paths
        ]
        pooled = [(t[1:].clamp(min=1e-6) ** 4).mean(0) ** 0.25 for t in tokens]
        rows = [torch.cat((t[0], g)) for t, g in zip(tokens, pooled, strict=True)]
        return torch.stack(rows), [p.name[:4] for p in paths]

    queries, query_names = features("copydays/strong")
    originals, names = features("copydays/original")
    database = torch.cat((originals, features("distractors")[0]))
    if whiten:
        learned = features("whitening")[0]
        values, vectors = np.linalg.eigh((learned.T @ learned / len(learned)).numpy())
        values = np.maximum(values, values.max() * 1e-5)
        projection = torch.from_numpy(np.diag(values**-0.5) @ vectors.T)
        queries, database = (
            (x - learned.mean(0)) @ projection.T for x in (queries, database)
        )  # fmt: skip
    similarity = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    total = 0.0
    for row, name in zip(similarity.tolist(), query_names, strict=True):
        order = sorted(range(len(row)), key=lambda i: -row[i])
        rank = order.index(names.index(name))  # there is one positive
        total += ((1.0 if rank == 0 else 0.0) + 1 / (rank + 1)) / 2
    return 100 * total / len(similarity)


@pytest.mark.parametrize("whiten", [False, True])
def test_map_matches_the_papers(run, folder, tmp_path, capsys, whiten):
    flags = ["--distractors_path", folder / "distractors", "--output", tmp_path / "out.json"]
    flags += ["--whitening_path", folder / "whitening"] if whiten else []
    assert run(*flags) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    blocks = result["blocks"]
    assert list(blocks) == ["strong", "crops/50", "all"]
    assert [block["copies"] for block in blocks.values()] == [9, 6, 15]
    assert blocks["strong"]["mAP"] == pytest.approx(paper_map(folder, whiten=whiten), abs=1e-6)
    assert blocks["strong"]["mAP"] < 100
    together = (9 * blocks["strong"]["mAP"] + 6 * blocks["crops/50"]["mAP"]) / 15
    assert blocks["all"]["mAP"] == pytest.approx(together)
    assert all(0 < block["micro_AP"] <= 100 for block in blocks.values())
    extra = {"whitening": 30} if whiten else {}
    settings = result["settings"]
    assert (settings["imsize"], settings["weights"]) == (24, weights_digest(network()))
    assert settings["whitening_path"] == (str(folder / "whitening") if whiten else "")
    assert result["images"] == {"original": 6, "distractors": 5, **extra}
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"strong: mAP: {blocks['strong']['mAP']:.2f}, micro-AP: ")


def test_broken_images_are_left_out(run, folder, tmp_path, capsys):
    (folder / "distractors" / "2.jpg").write_text("no picture")
    flags = ("--distractors_path", folder / "distractors", "--output", tmp_path / "out.json")
    assert run(*flags) == 0
    broken = folder / "distractors" / "2.jpg"
    assert capsys.readouterr().err == f"distractors: 1 images left out: {broken} is not an image\n"
    assert json.loads((tmp_path / "out.json").read_text())["images"]["distractors"] == 4
    # One copy, and one original with all of its copies.
    shutil.rmtree(folder / "smaller", ignore_errors=True)
    shutil.copytree(folder / "copydays", folder / "smaller")
    for root, change in ((folder / "copydays", break_image), (folder / "smaller", Path.unlink)):
        change(root / "strong" / "200001.jpg")
        for path in sorted(root.rglob("2003*")):
            if change is break_image and path.parent.name != "original":
                continue
            change(path)
    scores = []
    for root in (folder / "copydays", folder / "smaller"):
        assert run("--data_path", root, "--output", tmp_path / "out.json") == 0
        result = json.loads((tmp_path / "out.json").read_text())
        scores.append((result["images"], result["blocks"]))
    assert scores[0] == scores[1]
    err = capsys.readouterr().err
    assert "strong: 1 images left out: " in err
    assert "original: 1 images left out: " in err


def break_image(path):
    path.write_text("no picture")


@pytest.mark.parametrize("change", ["rotation", "depth"])
def test_images_are_converted_as_requested(run, folder, tmp_path, capsys, change):
    paths = sorted((folder / "copydays").rglob("*.jpg"))
    output = ("--output", tmp_path / "out.json")

    def result():
        scores = json.loads((tmp_path / "out.json").read_text())
        return {name: scores[name] for name in ("images", "blocks")}

    if change == "depth":
        assert_images_scale(capsys, paths, lambda *words: run(*output, *words), result)
        return
    results = []
    for by_exif in (False, True):
        turn(*paths, by_exif=by_exif)
        assert run(*output, "--exif_orientation", by_exif) == 0
        results.append(result())
    assert results[0] == results[1]
    turn(*paths[:8], by_exif=True)  # of some images only: the others are upright
    assert run(*output) == 0
    assert result() != results[0]


def test_missing_files_and_unsupported_networks_are_errors(run, folder, capsys):
    root = folder / "copydays"
    for flags, part in (
        (("--data_path", folder), f"there is no folder {folder}/original"),
        (("--whitening_path", folder / "none"), f"there is no folder {folder}/none"),
        (("--distractors_path", root), f"no images in {root}"),
        (("--imsize", 4), "cannot take --imsize 4 px images"),
        (("--arch", "resnet18"), "gives no patch tokens; expected one of vit_*"),
        (("--output", "/dev/null/x.json"), "cannot write /dev/null/x.json"),
    ):
        assert run(*flags) == 2, flags
        assert part in error_of(capsys, printed=True)
    (root / "original" / "200300.jpg").unlink()
    assert run() == 2
    assert "strong/200301.jpg has no original: there is no" in error_of(capsys)
    (root / "strong").rename(folder / "strong")
    (root / "crops").rename(folder / "crops")
    assert run() == 2
    assert "no copies in" in error_of(capsys)

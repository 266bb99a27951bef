"""Every flag of the evaluations by features reaches its effect: runs that differ in one flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdino import checkpoint
from fastdino.evals.transforms import center_crop
from tests.command_runs import Ran, same
from tests.flag_effects import (
    NANO,
    PROCESSES,
    Check,
    Command,
    Flag,
    cases,
    changed,
    extraction_flags,
    flags_of,
    in_batches_of,
    network_flags,
    takes_images_of,
    writes,
)  # fmt: skip

# knn


def knn_is(ks: tuple[int, ...], temperature: float) -> Check:
    """Check the accuracies of the second run against a plain k-NN, and that the first differs."""

    def check(first: Ran, second: Ran) -> None:
        scores = second.json("scores.json")
        folder = Path(second.places["features"])
        train, labels, test, truth = (
            torch.load(folder / f"{name}.pth", weights_only=True)
            for name in ("trainfeat", "trainlabels", "testfeat", "testlabels")
        )
        similarity = test.double() @ train.double().T
        assert {key for key in scores if key.isdigit()} == {str(k) for k in ks}
        for k in ks:
            near = similarity.topk(k, dim=1)
            votes = torch.zeros(len(test), 8, dtype=torch.float64)
            votes.scatter_add_(1, labels[near.indices], (near.values / temperature).exp())
            top1 = 100 * (votes.argmax(1) == truth).double().mean().item()
            assert scores[str(k)]["top1"] == pytest.approx(top1)
        changed(first, second)

    return check


def pixels_are_classified(_: Ran, second: Ran) -> None:
    assert not second.images
    features = second.answer["features/testfeat.pth"]
    paths = sorted((Path(second.places["colours"]) / "val").rglob("*.png"))
    images = torch.stack([center_crop(36, 32)(Image.open(path)) for path in paths])
    assert np.allclose(features, F.normalize(images.flatten(1), dim=1))


def features_are_loaded(_: Ran, second: Ran) -> None:
    assert not second.images
    assert second.answer["features/testfeat.pth"].shape == (60, 6)


KNN = {
    **network_flags("--data_path", "colours"),
    **extraction_flags(4),
    "data_path": Flag("--data_path {colours-moved}", changed),
    "resize": Flag("--resize 48", changed),
    "crop": Flag("--crop 24", takes_images_of((24, 24))),
    "raw_pixels": Flag("--raw_pixels", pixels_are_classified),
    "dump_features": Flag(
        "--dump_features {out}/more",
        writes(*(f"more/{n}.pth" for n in ("trainfeat", "testlabels"))),
    ),
    "load_features": Flag("--load_features {features}", features_are_loaded),
    "nb_knn": Flag("--nb_knn 1 40", knn_is((1, 40), 0.07), "--load_features {features}"),
    "temperature": Flag("--temperature 2", knn_is((3, 30), 2.0), "--load_features {features}"),
}

# linear


def cached(ran: Ran) -> Any:
    return ran.answer["val/val.npy"]


def features_are(blocks: int, *, avgpool: bool = False, resize: int = 36, crop: int = 32) -> Check:
    """Check the cached features against the paper's eval_linear.py."""

    def check(first: Ran, second: Ran) -> None:
        model = second.nano()
        paths = sorted((Path(second.places["colours"]) / "val").rglob("*.png"))
        images = torch.stack([center_crop(resize, crop)(Image.open(path)) for path in paths])
        with torch.no_grad():
            tokens = model.get_intermediate_layers(images, blocks)
        expected = torch.cat([block[:, 0] for block in tokens], dim=1)
        if avgpool:
            expected = torch.cat(
                (expected.unsqueeze(-1), tokens[-1][:, 1:].mean(1).unsqueeze(-1)), dim=-1
            ).reshape(len(images), -1)
        assert np.allclose(cached(second), expected, rtol=1e-3, atol=1e-4)
        assert not np.array_equal(cached(first), cached(second))

    return check


def first_rate(ran: Ran) -> float:
    return float(ran.answer["log.txt:0:train_lr"])


def rate_is(rate: float) -> Check:
    def check(first: Ran, second: Ran) -> None:
        assert first_rate(first) == pytest.approx(2 * 6 / 256)
        assert first_rate(second) == pytest.approx(rate)
        changed(first, second)

    return check


def log_has(epochs: int, validated: int) -> Check:
    def check(first: Ran, second: Ran) -> None:
        names = second.answer.keys()
        assert sum(name.endswith(":train_loss") for name in names) == epochs
        assert sum(name.endswith(":test_acc1") for name in names) == validated
        assert not same(first.answer, second.answer)

    return check


def classifier_has_rows(_: Ran, second: Ran) -> None:
    state = checkpoint.load(second.folder / "checkpoint.pth.tar")["state_dict"]
    assert state["module.linear.weight"].shape == (5, 96)


def only_validated(_: Ran, second: Ran) -> None:
    assert "log.txt" not in second.files
    assert second.json("evaluate.json")["images"] == 6


def passes_are_cached(first: Ran, second: Ran) -> None:
    counts = [sum("augmented" in name for name in one.files) for one in (first, second)]
    assert counts == [0, 2 * 3]  # features, labels and a lock of each pass


def features_are_not_cached(first: Ran, second: Ran) -> None:
    """Without --cache, each epoch computes the features of other crops."""
    assert any(name.endswith("val.npy") for name in second.files)
    assert not any(name.endswith(".npy") for name in first.files)
    assert sum(first.batch_sizes()) > sum(second.batch_sizes())


LINEAR = {
    **network_flags("--data_path", "colours"),
    **PROCESSES,
    "batch_size_per_gpu": Flag("--batch_size_per_gpu 4", rate_is(2 * 4 / 256)),
    "n_last_blocks": Flag("--n_last_blocks 3", features_are(3)),
    "avgpool_patchtokens": Flag("--avgpool_patchtokens true", features_are(1, avgpool=True)),
    "cache": Flag("--cache", features_are_not_cached, "{no cache}"),
    "cache_epochs": Flag("--cache_epochs 2", passes_are_cached),
    "data_path": Flag("--data_path {colours-moved}", changed),
    "resize": Flag("--resize 48", features_are(1, resize=48)),
    "crop": Flag("--crop 24", features_are(1, crop=24)),
    "epochs": Flag("--epochs 3", log_has(3, 3)),
    "lr": Flag("--lr 1", rate_is(1 * 6 / 256)),
    "val_freq": Flag("--val_freq 2", log_has(4, 3), "--epochs 4"),  # epochs 1, 3 and the last
    "num_labels": Flag("--num_labels 5", classifier_has_rows),
    "output_dir": Flag("--output_dir {out}/deeper", writes("deeper/linear.json")),
    "evaluate": Flag("--evaluate --linear_weights {classifier}", only_validated, "{no cache}"),
    "linear_weights": Flag(
        "--linear_weights {other classifier}", changed,
        "{no cache} --evaluate --linear_weights {classifier}",
    ),
}  # fmt: skip

# retrieval and copydays


def queries_are_cut_out(first: Ran, second: Ran) -> None:
    # The boxes are 32 x 24 px.
    assert [(24, 32) in {tuple(i.shape[-2:]) for i in one.images} for one in (first, second)] == [
        False,
        True,
    ]
    changed(first, second)


RETRIEVAL = {
    **network_flags("--data_path", "retrieval"),
    **extraction_flags(2),
    "data_path": Flag("--data_path {retrieval-moved}", changed),
    "dataset": Flag("--dataset roxford5k", changed),
    "imsize": Flag("--imsize 32", takes_images_of((32, 24), (24, 32))),
    "multiscale": Flag("--multiscale true", takes_images_of((28, 21), (20, 15)), "--imsize 40"),
    "crop_queries": Flag("--crop_queries true", queries_are_cut_out),
}


def database_grows(first: Ran, second: Ran) -> None:
    counts = [one.json("scores.json")["images"] for one in (first, second)]
    assert counts == [{"original": 6}, {"original": 6, "distractors": 12}]
    scores = [one.json("scores.json")["blocks"]["all"]["mAP"] for one in (first, second)]
    assert scores[1] < scores[0], "a distractor is nearer than an original"


COPYDAYS = {
    **network_flags("--data_path", "copydays"),
    **extraction_flags(4),
    "data_path": Flag("--data_path {copydays-moved}", changed),
    "whitening_path": Flag("--whitening_path {whitening}", changed),
    "distractors_path": Flag("--distractors_path {distractors}", database_grows),
    "imsize": Flag("--imsize 32", takes_images_of((32, 32))),
}


# embed


def tokens_are(blocks: int, *names: str, dtype: type = np.float32) -> Check:
    """Check the features in the file against the network's tokens."""

    def check(first: Ran, second: Ran) -> None:
        paths = sorted((Path(second.places["colours"]) / "train").rglob("*.png"))
        images = torch.stack([center_crop(36, 32)(Image.open(path)) for path in paths])
        with torch.no_grad():
            layers = second.nano().get_intermediate_layers(images, blocks)
        tokens = torch.cat(list(layers), dim=2)
        expected = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
        with np.load(second.folder / "x.npz") as file:
            for name in names:
                assert file[name].dtype == dtype
                assert np.allclose(file[name], expected[name], rtol=1e-2, atol=1e-3)
        assert not same(first.answer, second.answer)

    return check


def other_features_are_replaced(first: Ran, second: Ran) -> None:
    assert first.status == 2
    assert "is of other weights, images or settings: use another path, or --overwrite" in first.err
    assert second.status == 0, second.err


EMBED = {
    **network_flags("--data_path", "pictures"),
    **PROCESSES,
    "batch_size_per_gpu": Flag("--batch_size_per_gpu 4", in_batches_of(4)),
    "data_path": Flag("--data_path {colours-moved}/train", changed),
    "resize": Flag("--resize 48", changed),
    "crop": Flag("--crop 24", takes_images_of((24, 24))),
    "tokens": Flag("--tokens mean cls", tokens_are(1, "cls", "mean")),
    "n_last_blocks": Flag("--n_last_blocks 3", tokens_are(3, "cls")),
    "dtype": Flag("--dtype fp16", tokens_are(1, "cls", dtype=np.float16)),
    "output": Flag("--output {out}/y.npz", writes("y.npz")),
    "overwrite": Flag("--overwrite", other_features_are_replaced, "--output {old features}"),
}

SMALL = "--resize 36 --crop 32 --num_workers 0"
SCORES = "--output {out}/scores.json"
COMMANDS = {
    "knn": Command(
        f"knn {NANO} {SMALL} --data_path {{colours}} --nb_knn 3 30 --batch_size_per_gpu 7 "
        f"--dump_features {{out}}/features {SCORES}",
        KNN,
    ),
    "linear": Command(
        f"linear {NANO} {SMALL} --data_path {{colours}} --n_last_blocks 1 --epochs 2 --lr 2 "
        "--batch_size_per_gpu 6 --output_dir {out}",
        LINEAR,
        usual="--cache",
        mark="{no cache}",
    ),
    "embed": Command(
        f"embed {NANO} {SMALL} --data_path {{colours}}/train --batch_size_per_gpu 7 "
        "--output {out}/x.npz",
        EMBED,
    ),
    "retrieval": Command(
        f"retrieval {NANO} --data_path {{retrieval}} --dataset rparis6k --imsize 48 "
        f"--num_workers 0 --batch_size_per_gpu 5 {SCORES}",
        RETRIEVAL,
    ),
    "copydays": Command(
        f"copydays {NANO} --data_path {{copydays}} --imsize 24 --num_workers 0 "
        f"--batch_size_per_gpu 9 {SCORES}",
        COPYDAYS,
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_an_effect_in_the_table(command):
    assert sorted(COMMANDS[command].flags) == sorted(flags_of(command))


@pytest.mark.parametrize(("command", "name"), cases(COMMANDS))
def test_flag_reaches_its_effect(command, name, commands):
    commands.check(COMMANDS[command], COMMANDS[command].flags[name])

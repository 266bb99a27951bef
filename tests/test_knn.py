from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from contextlib import redirect_stderr

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdino import Trainer, checkpoint, cli, distributed
from fastdino.data import scan_images
from fastdino.evals import knn
from fastdino.evals.knn import dump_features, knn_accuracy
from fastdino.evals.transforms import center_crop
from tests.commands import break_pixels, error_of, make_gray, write_colours
from tests.processes import run_commands_in_two, run_two

CPU = torch.device("cpu")
SMALL = "--resize 36 --crop 32 --num_workers 0 --batch_size_per_gpu 5 --nb_knn 1 3 --device cpu"
NANO = ["--arch", "vit_nano", "--patch_size", "8"]


def clustered(n, classes, *, dim=6, seed=0):
    """Draw n unit vectors around one centre per class, wide enough to mix the classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    labels = rng.permutation(n) % classes
    features = torch.from_numpy(centres[labels] + 1.6 * rng.standard_normal((n, dim)))
    return F.normalize(features, dim=1), torch.from_numpy(labels)


@pytest.fixture
def sets():
    """Return features and labels of 150 training and 60 validation images in 8 classes."""
    return (*clustered(150, 8), *clustered(60, 8, seed=1))


def paper_knn(train, train_labels, val, val_labels, k, temperature):
    """Compute the k-NN accuracy of Caron et al. 2021 image by image, in float64.

    Class c has the weight sum_i a_i 1[c_i = c], a_i = exp(T_i x / tau), over the k nearest.
    """
    top1 = top5 = 0
    for x, label in zip(val.double().tolist(), val_labels.tolist(), strict=True):
        cosines = [math.fsum(map(float.__mul__, t, x)) for t in train.double().tolist()]
        nearest = sorted(range(len(cosines)), key=cosines.__getitem__, reverse=True)[:k]
        weights = defaultdict(float)
        for i in nearest:
            weights[int(train_labels[i])] += math.exp(cosines[i] / temperature)
        ranking = sorted(weights, key=weights.__getitem__, reverse=True)
        assert len(ranking) >= min(5, k, int(train_labels.max()) + 1), "else classes tie at 0"
        top1 += label == ranking[0]
        top5 += label in ranking[: min(5, k)]
    return 100 * top1 / len(val), 100 * top5 / len(val)


@pytest.mark.parametrize("temperature", [0.07, 0.005])  # the lower one could overflow in float32
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accuracies_match_the_papers(dtype, temperature, sets):
    train, train_labels, val, val_labels = sets
    train, val = train.to(dtype), val.to(dtype)
    ks = [1, 30, 60, 149, 150, 500]  # above 150: all images
    accuracy = knn_accuracy(train, train_labels, val, val_labels, ks=ks, temperature=temperature)
    for k in ks:
        expected = paper_knn(train, train_labels, val, val_labels, k, temperature)
        assert accuracy[k] == pytest.approx(expected, abs=1e-9)
    assert 20 < accuracy[30][0] < accuracy[30][1] < 100
    assert accuracy[1][0] == accuracy[1][1], "one neighbour votes for one class"


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_with_fewer_than_five_classes_top5_is_100(classes):
    train, train_labels = clustered(40, classes)
    val, val_labels = clustered(30, classes, seed=1)
    top1, top5 = knn_accuracy(train, train_labels, val, val_labels, ks=[40])[40]
    assert top5 == 100
    assert top1 == paper_knn(train, train_labels, val, val_labels, 40, 0.07)[0]


def test_numbers_of_neighbours_may_come_in_any_order(sets):
    rising, falling = (knn_accuracy(*sets, ks=ks) for ks in ((1, 5, 20), (20, 5, 1)))
    assert rising == falling
    assert list(falling) == [20, 5, 1]


def test_a_class_that_only_val_has_is_never_correct():
    train, train_labels = clustered(40, 7)
    val, _ = clustered(10, 7, seed=1)
    assert knn_accuracy(train, train_labels, val, torch.full((10,), 9), ks=[40])[40] == (0, 0)


def test_a_class_without_votes_is_not_in_the_top5():
    train = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-1, 0]])
    labels = torch.tensor([0, 0, 1, 2])
    val = torch.tensor([[1.0, 0]] * 3)
    accuracy = knn_accuracy(train, labels, val, torch.tensor([0, 1, 2]), ks=[2, 3, 4])
    assert [top5 for _, top5 in accuracy.values()] == pytest.approx([100 / 3, 200 / 3, 100])


@pytest.mark.parametrize(
    ("slice_rows", "chunk_rows"),
    [(150, 0), (150, 7), (150, 59), (1, 13), (7, 13), (75, 13), (149, 13), (150, 13)],
)
def test_slices_and_chunks_do_not_change_the_accuracy(sets, monkeypatch, slice_rows, chunk_rows):
    whole = knn_accuracy(*sets, ks=[5, 20, 500])
    monkeypatch.setattr(knn, "SLICE_ELEMENTS", 6 * slice_rows)
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", chunk_rows * slice_rows)
    assert knn_accuracy(*sets, ks=[5, 20, 500]) == whole


def test_training_features_are_moved_to_the_device_slice_by_slice(sets, monkeypatch):
    moved, to = [], torch.Tensor.to

    def record(tensor, device):
        moved.append(tuple(tensor.shape))
        return to(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", record)
    monkeypatch.setattr(knn, "SLICE_ELEMENTS", 6 * 100)
    knn_accuracy(*sets, ks=[5])
    assert moved == [(100, 6), (100,), (50, 6), (50,)]


@pytest.mark.gpu
def test_gpu_reads_training_features_from_the_host(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    train, labels = clustered(5000, 8)
    val, val_labels = clustered(600, 8, seed=1)
    expected = knn_accuracy(train, labels, val, val_labels, ks=[5, 200])
    for elements in (1 << 28, 6 * 700):
        monkeypatch.setattr(knn, "SLICE_ELEMENTS", elements)
        assert knn_accuracy(train, labels, val.cuda(), val_labels.cuda(), ks=[5, 200]) == expected


@pytest.fixture
def images(tmp_path):
    return write_colours(tmp_path / "images")


@pytest.fixture
def run(images):
    """Return a function that runs `fastdino knn` on `images` with more flags."""

    def command(*words):
        return cli.main(["knn", "--data_path", str(images), *SMALL.split(), *map(str, words)])

    return command


def dumped(folder):
    return {path.name: checkpoint.load_tensor(path) for path in folder.iterdir()}


def test_raw_pixels_classify_colours_and_the_json_matches_the_output(run, images, tmp_path, capsys):
    assert run("--raw_pixels", "--output", tmp_path / "knn.json") == 0
    perfect = {"top1": 100.0, "top5": 100.0}
    result = json.loads((tmp_path / "knn.json").read_text())
    assert (result["1"], result["3"]) == (perfect, perfect)
    assert result["images"] == {"train": 12, "val": 6}
    assert result["settings"] == {
        "pretrained_weights": "", "checkpoint_key": "teacher", "data_path": str(images),
        "load_features": None, "raw_pixels": True, "resize": 36, "crop": 32, "temperature": 0.07,
        "weights": None,
    }  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "1-NN classifier result: Top1: 100.00, Top5: 100.00",
        "3-NN classifier result: Top1: 100.00, Top5: 100.00",
    ]
    assert captured.err == "", "no progress bar without a terminal"


def test_features_come_from_the_network_of_checkpoint_key(run, images, tiny, tmp_path):
    config = tiny()
    trainer = Trainer(config, steps_per_epoch=1)
    for parameter in trainer.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    path = tmp_path / "checkpoint.pth"
    checkpoint.save({**trainer.state_dict(), "args": config.to_dict()}, path)
    flags = ["--pretrained_weights", path]
    assert run(*flags, "--dump_features", tmp_path / "teacher") == 0
    assert run(*flags, "--checkpoint_key", "student", "--dump_features", tmp_path / "student") == 0
    source, transform = scan_images(images / "train"), center_crop(36, 32)
    batch = torch.stack([transform(Image.open(path)) for path in source.paths])
    for key, network in (("teacher", trainer.teacher), ("student", trainer.student)):
        features = dumped(tmp_path / key)
        with torch.no_grad():
            expected = F.normalize(network.backbone(batch), dim=1)
        torch.testing.assert_close(features["trainfeat.pth"], expected, rtol=1e-4, atol=1e-5)
        assert features["trainlabels.pth"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert features["testlabels.pth"].tolist() == [0, 0, 1, 1, 2, 2]
        assert features["testfeat.pth"].shape == (6, 96)


def test_the_temperature_reaches_the_votes(run, tmp_path):
    """One near neighbour outvotes two far ones only at a low temperature."""
    angles = torch.tensor([0.0, 0.6, 0.6])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    tensors = {
        "trainfeat": train, "trainlabels": torch.tensor([0, 1, 1]),
        "testfeat": train[:1], "testlabels": torch.tensor([0]),
    }  # fmt: skip
    dump_features(tmp_path, tensors)
    accuracies = []
    for temperature in ("0.05", "10"):
        output = tmp_path / f"{temperature}.json"
        flags = ["--load_features", tmp_path, "--temperature", temperature, "--output", output]
        assert run(*flags) == 0
        accuracies.append(json.loads(output.read_text())["3"]["top1"])
    assert accuracies == [100, 0]


def test_loaded_features_give_the_same_accuracies(run, images, tmp_path, capsys):
    features = tmp_path / "a" / "b"
    assert run(*NANO, "--dump_features", features) == 0
    printed = capsys.readouterr().out
    assert printed
    for path in images.rglob("*.png"):
        path.unlink()
    assert run("--load_features", features) == 0
    assert capsys.readouterr().out == printed


def test_untrained_network_depends_on_the_seed(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(*NANO, "--dump_features", tmp_path / name, "--seed", seed) == 0
    a, b, c = (dumped(tmp_path / name)["testfeat.pth"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


@pytest.mark.parametrize("network", [["--raw_pixels"], NANO])
def test_deep_images_are_scaled_on_request(run, images, tmp_path, network):
    features = []
    for deep, words in ((False, []), (True, ["--image_range", "scale"]), (True, [])):
        make_gray(*images.rglob("*.png"), deep=deep)
        assert run(*network, *words, "--dump_features", tmp_path / "out") == 0
        features.append(dumped(tmp_path / "out")["trainfeat.pth"])
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])


def test_deep_images_are_warned_of_per_split(run, images, capsys):
    make_gray(*sorted((images / "val").rglob("*.png"))[:2], deep=True)
    assert run("--raw_pixels") == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: val: 2 of 6 images have 16-bit, 32-bit or float values")
    assert err.count("\n") == 1


def test_unreadable_images_are_left_out_and_counted(run, images, tmp_path, capsys):
    (images / "train" / "blue" / "text.png").write_text("no picture")
    break_pixels(images / "train" / "red" / "0.png")
    assert run("--raw_pixels", "--dump_features", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert err.startswith(f"train: 2 images left out: {images / 'train' / 'red' / '0.png'} cannot")
    assert err.count("\n") == 1
    features = dumped(tmp_path / "out")
    assert features["trainlabels.pth"].tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert features["trainfeat.pth"].norm(dim=1).tolist() == pytest.approx([1.0] * 11)


def test_different_classes_in_val_are_an_error_before_extraction(run, images, capsys, monkeypatch):
    (images / "val" / "green").rename(images / "val" / "violet")
    monkeypatch.setattr(knn, "Extractor", None)
    assert run("--raw_pixels") == 2
    assert "must have the same class folders; only one has ['green', 'violet']" in error_of(capsys)


def test_a_split_without_readable_images_is_an_error(run, images, capsys):
    break_pixels(*(images / "val").rglob("*.png"))
    assert run("--raw_pixels") == 2
    assert "none of the 6 images of val can be used: " in error_of(capsys)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--batch_size_per_gpu 0", "--batch_size_per_gpu must be at least 1, got 0"),
        ("--resize 0", "--resize must be at least 1"),
        ("--crop -3", "--crop must be at least 1, got -3"),
        ("--nb_knn 10 0", "--nb_knn must be numbers from 1, got [10, 0]"),
        ("--temperature 0", "--temperature must be above 0"),
        ("--temperature nan", "--temperature must be above 0"),
        ("--num_workers -1", "--num_workers must be at least 0, got -1"),
        ("--patch_size 0", "--patch_size must be at least 1, got 0"),
        ("--arch vit_nan", "did you mean vit_nano"),
        ("--arch vit_nano --patch_size 64", "--arch vit_nano cannot take --crop 32 px images"),
        ("--pretrained_weights /nowhere.pth", "there is no file /nowhere.pth"),
        ("--raw_pixels --data_path /nowhere", "there is no file or folder /nowhere/train"),
        ("--raw_pixels --data_path {empty}", "no images in {empty}/train"),
        ("--load_features {empty}", "there is no file {empty}/trainfeat.pth"),
        ("--raw_pixels --output /dev/null/x", "cannot write /dev/null/x"),
        ("--raw_pixels --dump_features /dev/null/x", "cannot write /dev/null/x"),
    ],
)
def test_invalid_flags_are_errors(run, tmp_path, capsys, flags, part):
    (tmp_path / "train" / "a").mkdir(parents=True)
    assert run(*flags.format(empty=tmp_path).split()) == 2
    assert part.format(empty=tmp_path) in error_of(capsys, printed="/dev/null" in flags)


@pytest.mark.parametrize(
    ("name", "shape"), [("trainlabels", (3,)), ("testfeat", (5, 7)), ("trainfeat", (4,))]
)
def test_feature_files_of_different_shapes_are_errors(run, tmp_path, capsys, name, shape):
    shapes = {"trainfeat": (4, 2), "trainlabels": (4,), "testfeat": (5, 2), "testlabels": (5,)}
    tensors = {key: torch.zeros(size) for key, size in shapes.items()}
    knn.dump_features(tmp_path, tensors)
    assert run("--load_features", tmp_path) == 0
    capsys.readouterr()
    knn.dump_features(tmp_path, {**tensors, name: torch.zeros(shape)})
    assert run("--load_features", tmp_path) == 2
    assert f"{name} is {shape}" in error_of(capsys)


def test_shares_of_the_ranks_add_up_to_the_accuracy(sets, monkeypatch):
    whole, shares = knn_accuracy(*sets, ks=[5, 20]), []
    monkeypatch.setattr(distributed, "total", lambda own: shares.append(own) or own)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        knn_accuracy(*sets, ks=[5, 20])
    assert all(share.max() <= 20 for share in shares), "a third of 60 images"
    percent = 100 * sum(shares).double() / 60
    assert percent.tolist() == [list(whole[5]), list(whole[20])]


def test_two_processes_match_one(images, run, tmp_path):
    (images / "train" / "red" / "3.png").unlink()  # 11 images: 2 batches and 1
    for path in sorted((images / "val").rglob("*.png"))[1:]:
        path.unlink()  # one image: the second rank has none
    line = ["knn", "--data_path", str(images), *SMALL.split(), *NANO]
    line += ["--dump_features", str(tmp_path / "two"), "--output", str(tmp_path / "two.json")]
    run_commands_in_two(line)
    assert distributed.world_size() == 1
    assert run(*NANO, "--dump_features", tmp_path / "one", "--output", tmp_path / "one.json") == 0
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    one, two = dumped(tmp_path / "one"), dumped(tmp_path / "two")
    assert one["trainfeat.pth"].shape == (11, 96)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_one_rank_reports_an_invalid_flag(images, tmp_path):
    line = ["knn", "--data_path", str(images), *SMALL.split(), "--arch", "vit_nan"]
    run_two(_fail, line, tmp_path)
    first, second = ((tmp_path / f"{rank}.err").read_text() for rank in (0, 1))
    assert "did you mean vit_nano" in first
    assert (first.count("\n"), second) == (1, "")


def _fail(line, folder):
    with open(folder / f"{os.environ['RANK']}.err", "w") as file, redirect_stderr(file):
        assert cli.main(line) == 2

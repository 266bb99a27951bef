"""`fastdino embed`: features, names and labels of the file, resuming, and error messages."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.data import scan_images
from fastdino.evals import embed, feature_parts
from fastdino.evals.feature_files import SUFFIXES
from fastdino.evals.transforms import center_crop
from tests.commands import assert_images_scale, break_pixels, error_of, write_colours
from tests.processes import end_ranks, locked_elsewhere, run_two, start_ranks
from tests.test_feature_files import load

SMALL = ["--resize", "36", "--crop", "32", "--num_workers", "0", "--batch_size_per_gpu", "2"]


@pytest.fixture
def folder(tmp_path):
    """12 images in 3 classes."""
    return write_colours(tmp_path / "set") / "train"


@pytest.fixture
def words(nano_weights, folder, tmp_path):
    """The words of the command."""
    network = ["--arch", "vit_nano", "--patch_size", "8", "--device", "cpu"]
    network += ["--pretrained_weights", str(nano_weights), "--data_path", str(folder)]
    return ["embed", *network, *SMALL, "--output", str(tmp_path / "out/x.npz")]


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 4 images."""
    monkeypatch.setattr(feature_parts, "PART_IMAGES", 4)


def features_of(model, paths, blocks=1):
    """Compute the tokens of images one by one."""
    transform, rows = center_crop(36, 32), []
    for path in paths:
        with Image.open(path) as image, torch.no_grad():
            layers = model.get_intermediate_layers(transform(image.convert("RGB"))[None], blocks)
        rows.append(torch.cat(list(layers), dim=2)[0])
    tokens = torch.stack(rows)
    patches = tokens[:, 1:].unflatten(1, (4, 4))
    return {"cls": tokens[:, 0], "mean": patches.mean((1, 2)), "patch": patches}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_has_features_names_labels_and_classes(
    words, folder, tmp_path, nano_model, nano_settings, suffix, blocks, capsys
):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"x{suffix}"
    more = ["--tokens", "patch", "cls", "mean", "--n_last_blocks", str(blocks)]
    assert cli.main([*words, *more, "--output", str(path)]) == 0
    dim = 96 * blocks
    shapes = {"cls": [dim], "mean": [dim], "patch": [4, 4, dim]}
    found = load(path, shapes)
    names = [f"{name}/{i}.png" for name in ("blue", "green", "red") for i in range(4)]
    assert found["names"] == names
    assert found["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = features_of(nano_model, [folder / name for name in names], blocks)
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        torch.testing.assert_close(
            torch.from_numpy(found[name].copy()), values, rtol=1e-4, atol=1e-4
        )
    metadata = json.loads(found["metadata"])
    assert len(metadata.pop("key")) == 16
    assert metadata == {
        "format": "fastdino features 1",
        "settings": nano_settings
        | {"data_path": str(folder), "tokens": ["cls", "mean", "patch"], "n_last_blocks": blocks}
        | {"dtype": "fp32", "resize": 36, "crop": 32, "batch_size_per_gpu": 2},
        "classes": ["blue", "green", "red"],
        "shapes": shapes,
        "left_out": 0,
    }
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        f"12 images by vit_nano ({nano_settings['pretrained_weights']}) on cpu, 1 process(es): "
        f"cls {dim}, mean {dim}, patch 4x4x{dim} fp32 per image, "
        f"{12 * 72 * dim / 1e6:.3g} MB in all",
        f"{path}: features of 12 images, 3 classes",
    ]
    assert sorted(file.name for file in path.parent.iterdir()) == ["set", path.name]


def test_fp16_rounds_the_features(words, tmp_path):
    for dtype in ("fp32", "fp16"):
        assert cli.main([*words, "--dtype", dtype, "--output", str(tmp_path / f"{dtype}.npz")]) == 0
    full, half = (load(tmp_path / f"{dtype}.npz")["cls"] for dtype in ("fp32", "fp16"))
    assert half.dtype == np.float16
    assert np.array_equal(half, full.astype(np.float16))


def test_features_beyond_fp16_are_an_error(words, tmp_path, nano_weights, capsys):
    state = torch.load(nano_weights, weights_only=True)
    state["norm.weight"] = state["norm.weight"] * 1e6
    torch.save(state, tmp_path / "large.pth")
    more = ["--pretrained_weights", str(tmp_path / "large.pth"), "--dtype", "fp16"]
    assert cli.main([*words, *more]) == 2
    assert "--dtype fp16 holds at most 65504, got" in error_of(capsys, printed=True)


def test_features_of_a_network_without_cls_are_its_output(words, tmp_path):
    """A network of torchvision, untrained."""
    more = ["--arch", "resnet18", "--pretrained_weights", "", "--output", str(tmp_path / "r.npz")]
    assert cli.main([*words, *more]) == 0
    assert load(tmp_path / "r.npz")["cls"].shape == (12, 512)


def test_images_without_labels_have_minus_one(words, folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        path.rename(flat / f"{i:02}.png")
    assert cli.main([*words, "--data_path", str(flat)]) == 0
    found = load(tmp_path / "out/x.npz")
    assert found["labels"].tolist() == [-1] * 12
    assert json.loads(found["metadata"])["classes"] == []
    assert capsys.readouterr().out.endswith("x.npz: features of 12 images, no labels\n")


def test_some_images_without_labels_have_minus_one(words, folder, tmp_path, make_tar):
    """A webdataset shard in which some samples have a label."""
    members = {}
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        members[f"{i:02}.png"] = path.read_bytes()
        if i % 4:
            members[f"{i:02}.cls"] = b"zebra" if i % 2 else b"unlabelled"
    shard = make_tar(tmp_path / "shard-000000.tar", members)
    assert cli.main([*words, "--data_path", str(shard)]) == 0
    found = load(tmp_path / "out/x.npz")
    assert json.loads(found["metadata"])["classes"] == ["unlabelled", "zebra"]
    assert found["labels"].tolist() == [-1, 1, 0, 1] * 3
    assert found["names"][1] == "shard-000000.tar/01.png"


def test_any_dataset_of_training_is_read(words, folder, tmp_path, monkeypatch):
    """A list of files, and a split of a folder."""
    monkeypatch.chdir(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))[::2]
    (tmp_path / "list.txt").write_text("".join(f"{folder}/{name}\n" for name in names))
    assert cli.main([*words, "--data_path", str(tmp_path / "list.txt")]) == 0
    assert len(load(tmp_path / "out/x.npz")["names"]) == 6
    whole = f"{folder.parent}?split=val"
    assert cli.main([*words, "--data_path", whole, "--output", str(tmp_path / "v.npz")]) == 0
    assert load(tmp_path / "v.npz")["names"][0] == "blue/0.png"


def test_unreadable_images_are_left_out_and_counted(words, folder, tmp_path, small_parts, capsys):
    (folder / "blue/1.png").write_bytes(b"no image")  # its header
    broken = [folder / "blue/2.png", *(folder / f"green/{i}.png" for i in range(4))]
    break_pixels(*broken)  # green: all of a part
    assert cli.main([*words, "--tokens", "cls", "patch"]) == 0
    found = load(tmp_path / "out/x.npz")
    assert found["names"] == ["blue/0.png", "blue/3.png", *(f"red/{i}.png" for i in range(4))]
    assert found["labels"].tolist() == [0, 0, 2, 2, 2, 2]
    assert found["cls"].shape == (6, 96)
    assert found["patch"].shape == (6, 4, 4, 96)
    assert json.loads(found["metadata"])["left_out"] == 6
    assert f"6 images left out: {folder}/blue/2.png cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_run_continues_to_the_same_bits(
    words, tmp_path, small_parts, monkeypatch, capsys, suffix, after
):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    words += ["--tokens", "cls", "mean"]
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"x{suffix}"
    assert cli.main([*words, "--output", str(whole)]) == 0
    write, written = embed.Extraction._write, []

    def interrupted(extraction, part):
        if len(written) == after:
            raise KeyboardInterrupt
        write(extraction, part)
        written.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(embed.Extraction, "_write", interrupted)
        assert cli.main([*words, "--output", str(path)]) == 130
    assert not path.exists()
    monkeypatch.setattr(
        embed.Extraction, "_write", lambda self, part: (written.append(part), write(self, part))
    )
    capsys.readouterr()
    assert cli.main([*words, "--output", str(path)]) == 0
    assert written == [0, 1, 2], "a finished part is not computed again"
    resumed = f"resumed {path}.parts: {after} of 3 parts are done\n"
    assert (resumed in capsys.readouterr().out) == (after > 0)
    assert path.read_bytes() == whole.read_bytes()
    assert not Path(f"{path}.parts").exists()


def test_sigterm_keeps_the_finished_parts(words, tmp_path, small_parts, monkeypatch, capsys):
    write = embed.Extraction._write

    def stopped(extraction, part):
        write(extraction, part)
        os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "out/x.npz"
    with monkeypatch.context() as patch:
        patch.setattr(embed.Extraction, "_write", stopped)
        assert cli.main(words) == 75
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith(
        f"stopped by SIGTERM; finished parts are kept in {path}.parts: run the same command to "
        "continue\n"
    )
    assert cli.main(words) == 0
    assert "1 of 3 parts are done" in capsys.readouterr().out


def _killed_in_the_second_part(words):
    feature_parts.PART_IMAGES = 4
    write = embed.Extraction._write

    def killed(extraction, part):
        if part == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(extraction, part)

    embed.Extraction._write = killed
    cli.main(words)


def test_a_killed_run_continues_to_the_same_bits(words, tmp_path, small_parts, capsys):
    path = tmp_path / "out/x.npz"
    killed = start_ranks(1, _killed_in_the_second_part, words)
    assert end_ranks(killed, 120) == [-signal.SIGKILL]
    assert cli.main(words) == 0
    assert "1 of 3 parts are done" in capsys.readouterr().out
    assert cli.main([*words, "--output", str(tmp_path / "y.npz")]) == 0
    assert path.read_bytes() == (tmp_path / "y.npz").read_bytes()


def _in_two(words):
    feature_parts.PART_IMAGES = 4
    assert cli.main(words) == 0


def test_two_ranks_write_the_file_of_one(words, tmp_path, small_parts):
    """Three parts: one rank computes two of them."""
    two = [*words, "--output", str(tmp_path / "two.npz")]
    run_two(_in_two, two)
    assert cli.main(words) == 0
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "out/x.npz").read_bytes()


def test_the_same_command_again_does_nothing(words, tmp_path, capsys, monkeypatch):
    assert cli.main(words) == 0
    path = tmp_path / "out/x.npz"
    stamp = path.stat().st_mtime_ns
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(embed.Extraction, "run", None)
        assert cli.main(words) == 0
    again = f"{path} has these features already; --overwrite computes them again\n"
    assert capsys.readouterr() == (again, "")
    assert path.stat().st_mtime_ns == stamp
    assert cli.main([*words, "--overwrite"]) == 0
    assert path.stat().st_mtime_ns > stamp


OTHER = [["--dtype", "fp16"], ["--tokens", "mean"], ["--crop", "24"], ["--n_last_blocks", "2"],
         ["--resize", "40"], ["--pretrained_weights", ""], ["--batch_size_per_gpu", "3"],
         ["--exif_orientation", "true"], ["--image_range", "scale"]]  # fmt: skip


@pytest.mark.parametrize("other", OTHER, ids=lambda words: words[0][2:])
def test_a_file_of_other_settings_is_kept(words, tmp_path, capsys, other):
    assert cli.main(words) == 0
    data = (tmp_path / "out/x.npz").read_bytes()
    capsys.readouterr()
    assert cli.main([*words, *other]) == 2
    assert "exists and is of other weights, images or settings" in error_of(capsys)
    assert (tmp_path / "out/x.npz").read_bytes() == data
    assert cli.main([*words, *other, "--overwrite"]) == 0


@pytest.mark.parametrize("content", [b"", b"text"])
def test_another_file_is_not_overwritten(words, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.npz").write_bytes(content)
    assert cli.main(words) == 2
    assert "use another path, or --overwrite" in error_of(capsys)
    assert (tmp_path / "out/x.npz").read_bytes() == content


def test_two_runs_of_one_output_are_refused(words, tmp_path, capsys):
    (tmp_path / "out/x.npz.parts").mkdir(parents=True)
    with locked_elsewhere(tmp_path / "out/x.npz.parts/.embed.lock"):
        assert cli.main(words) == 2
    assert "x.npz.parts: another `fastdino embed` is writing there" in error_of(capsys)


def test_a_damaged_part_is_computed_again(words, tmp_path, small_parts, monkeypatch, capsys):
    monkeypatch.setattr(embed, "_join", lambda *_: 0)
    assert cli.main(words) == 0
    monkeypatch.undo()
    monkeypatch.setattr(feature_parts, "PART_IMAGES", 4)
    part = tmp_path / "out/x.npz.parts/part-000001.npz"
    part.write_bytes(part.read_bytes()[:-99])
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: {part} is damaged (")
    assert "2 of 3 parts are done" in out


def test_a_crop_off_the_patch_grid_is_cut(words, tmp_path, capsys):
    assert cli.main([*words, "--crop", "37", "--resize", "37", "--tokens", "patch"]) == 0
    err = capsys.readouterr().err
    assert err == (
        "--crop 37 is no multiple of the patch size 8: the network sees the upper left 32 x 32 px\n"
    )
    assert load(tmp_path / "out/x.npz", {})["patch"].shape == (12, 4, 4, 96)


BAD = {
    "no folder": (["--data_path", "missing"], "there is no file or folder missing"),
    "no images": (["--data_path", "empty"], "no images in empty"),
    "suffix": (["--output", "x.csv"], "expected a file that ends in .npz, .parquet, .safetensors"),
    "folder": (["--output", "folder.npz"], "--output folder.npz is not a file"),
    "unwritable": (["--output", "text.txt/x.npz"], "cannot write text.txt/x.npz.parts"),
    "patches": (
        ["--arch", "resnet18", "--pretrained_weights", "", "--tokens", "cls", "patch"],
        "--tokens cls patch: --arch resnet18 has no patch tokens; expected one of vit_nano, ",
    ),
    "blocks": (["--n_last_blocks", "7"], "--n_last_blocks 7: the network has 6 block(s)"),
    "no blocks": (["--n_last_blocks", "0"], "--n_last_blocks must be at least 1"),
    "crop": (["--crop", "7"], "--arch vit_nano cannot take --crop 7 px images: images of 7 x 7"),
    "no crop": (["--crop", "0"], "--crop must be at least 1"),
    "workers": (["--num_workers", "-1"], "--num_workers must be at least 0"),
    "weights": (["--pretrained_weights", "text.txt"], "text.txt"),
    "broken": (["--data_path", "broken"], "none of the 1 images can be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_line_and_writes_nothing(words, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    for name in ("empty", "folder.npz", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no")
    more, message = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*words, *more]) == 2
    assert message in error_of(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_any_image_that_can_be_decoded_nothing_remains(words, folder, tmp_path, capsys):
    break_pixels(*folder.rglob("*.png"))
    assert cli.main(words) == 2
    assert "none of the 12 images can be used: " in error_of(capsys, printed=True)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_one_line_and_keeps_the_parts(
    words, tmp_path, small_parts, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastdino.evals.feature_files.write_npz", full)
        assert cli.main(words) == 2
    assert "the disk is full" in error_of(capsys, printed=True)
    assert cli.main(words) == 0
    assert "3 of 3 parts are done" in capsys.readouterr().out


def test_deep_images_are_scaled_on_request(words, folder, tmp_path, capsys):
    paths = sorted(folder.rglob("*.png"))

    def result():
        return load(tmp_path / "out/x.npz")["cls"].tolist()

    def run(*more):
        return cli.main([*words, "--overwrite", *more])

    assert_images_scale(capsys, paths, run, result)


def test_known_labels_are_those_of_the_scan(folder):
    images = scan_images(folder)
    labels, classes = images.known_labels()
    assert np.array_equal(labels, images.labels)
    assert classes == images.classes
    assert [images.name(i) for i in (0, 11)] == ["blue/0.png", "red/3.png"]
    assert images.subset(np.array([11, 0])).known_labels()[0].tolist() == [2, 0]

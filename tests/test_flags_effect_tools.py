"""Every flag of `fastdino export`, `crops` and `shapes` reaches its effect."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fastdino import cli
from tests import test_flags_effect, test_flags_effect_maps
from tests.command_runs import Ran, same
from tests.flag_effects import (
    Check,
    Command,
    Flag,
    cases,
    changed,
    flags_of,
    refused_without_a_gpu,
    writes,
)
from tests.loaders import HAS_DALI


def refuses(part: str) -> Check:
    """Check that the second run ends with an error that a used flag explains."""

    def check(first: Ran, second: Ran) -> None:
        assert first.status == 0, first.err
        assert second.status == 2
        assert part in second.err

    return check


def has_positions(_: Ran, second: Ran) -> None:
    tensors = load_file(second.folder / "a.safetensors")
    assert tensors["pos_embed"].shape == (1, 1 + 6 * 6, 96)


def replaces(first: Ran, second: Ran) -> None:
    assert first.status == 2
    assert "exists: use another path, or --overwrite" in first.err
    assert second.status == 0, second.err


def card_has_accuracies(first: Ran, second: Ran) -> None:
    cards = [(one.folder / "a.md").read_text() for one in (first, second)]
    assert ["12.34" in card for card in cards] == [False, True]


EXPORT = {
    "pretrained_weights": Flag("--pretrained_weights {other}", changed),
    "checkpoint_key": Flag("--checkpoint_key student", changed, "--pretrained_weights {both}"),
    "arch": Flag("--arch vit_tiny", refuses("for --arch vit_tiny --patch_size 8")),
    "patch_size": Flag("--patch_size 16", refuses("for --arch vit_nano --patch_size 16")),
    "image_size": Flag("--image_size 48", has_positions),
    "to": Flag("--to torchscript --output {out}/b.pt", writes("b.pt")),
    "output": Flag("--output {out}/b.safetensors", writes("b.safetensors")),
    "overwrite": Flag("--overwrite", replaces, "--output {existing}"),
    "model_card": Flag("--model_card", writes("a.md")),
    "figures": Flag("--figures {accuracies}", card_has_accuracies, "--model_card"),
    "report": Flag("--report {out}/report.json", writes("report.json")),
}


def pixels(ran: Ran) -> np.ndarray:
    with Image.open(ran.folder / "crops.png") as image:
        return np.asarray(image.convert("RGB"))


def picture_changes(first: Ran, second: Ran) -> None:
    assert not np.array_equal(pixels(first), pixels(second))


def dali_is_compared(first: Ran, second: Ran) -> None:
    """Without DALI, the output says that it is left out."""
    assert ["dali" in one.out for one in (first, second)] == [False, True]


def differences_are_brighter(first: Ran, second: Ran) -> None:
    if not HAS_DALI:
        pytest.skip("DALI is not installed, and the other backends do not differ")
    assert (pixels(first) != pixels(second)).any(axis=2).mean() > 0.02  # not only the text


def palette_is_used(first: Ran, second: Ran) -> None:
    modes = []
    for ran in (first, second):
        with Image.open(ran.folder / "crops.png") as image:
            modes.append(image.mode)
    assert modes[0] != "P"
    assert modes[1] == "P"


CROPS = {
    "image": Flag("--image {picture}", picture_changes),
    "output": Flag("--output {out}/other.png", writes("other.png")),
    "executors": Flag("--executors dali", dali_is_compared),
    "epoch": Flag("--epoch 1", picture_changes),
    "amplify": Flag("--amplify 50", differences_are_brighter, "--executors dali"),
    "palette": Flag("--palette", palette_is_used),
    "seed": Flag("--seed 1", picture_changes),
    "global_crops_size": Flag("--global_crops_size 40", picture_changes),
    "local_crops_size": Flag("--local_crops_size 24", picture_changes),
    "local_crops_number": Flag("--local_crops_number 2", picture_changes),
    "global_crops_scale": Flag("--global_crops_scale 0.2 0.3", picture_changes),
    "local_crops_scale": Flag("--local_crops_scale 0.5 0.6", picture_changes),
    "exif_orientation": Flag(
        "--exif_orientation true", picture_changes, "--image {turned picture}"
    ),
    "image_range": Flag("--image_range scale", picture_changes, "--image {deep picture}"),
    "device": Flag("--device cuda", refused_without_a_gpu),
}


def has_files(folder: str, number: int) -> Check:
    """Check the number of files below a folder, which is another one in the first run."""

    def check(first: Ran, second: Ran) -> None:
        counts = [sum(n.startswith(f"{folder}/") for n in one.files) for one in (first, second)]
        assert counts[1] == number != counts[0]

    return check


def images_have_side(side: int) -> Check:
    def check(_: Ran, second: Ran) -> None:
        path = next((second.folder / "train").rglob("*.jpg"))
        with Image.open(path) as image:
            assert image.size == (side, side)

    return check


def pictures_change(first: Ran, second: Ran) -> None:
    assert first.files == second.files
    assert not same(first.answer, second.answer)


SHAPES = {
    "output_dir": Flag("--output_dir {out}/deeper", writes("deeper/davis/ImageSets/2017/val.txt")),
    "train_per_class": Flag("--train_per_class 2", has_files("train", 2 * 12)),
    "val_per_class": Flag("--val_per_class 2", has_files("val", 2 * 12)),
    "size": Flag("--size 40", images_have_side(40)),
    "clips": Flag("--clips 2", has_files("davis/JPEGImages", 2 * 2)),
    "frames": Flag("--frames 3", has_files("davis/Annotations", 3)),
    "seed": Flag("--seed 1", pictures_change),
}

COMMANDS = {
    "export": Command(
        "export --pretrained_weights {nano} --to safetensors --output {out}/a.safetensors", EXPORT
    ),
    "crops": Command(
        "crops --global_crops_size 32 --local_crops_size 16 --local_crops_number 1 --device cpu "
        "--executors torchvision --output {out}/crops.png",
        CROPS,
    ),
    "shapes": Command(
        "shapes --train_per_class 1 --val_per_class 1 --size 32 --clips 1 --frames 2 "
        "--output_dir {out}",
        SHAPES,
    ),
}
# train: test_settings_effect.py. submit: test_submit.py. bench: its results are times;
# test_bench_flags.py and the tests of its two benchmarks. info has no flags, and those of demo
# are in test_demo.py.
ELSEWHERE = {"train", "submit", "bench", "info", "demo"}


def test_every_command_has_a_table():
    tables = (test_flags_effect.COMMANDS, test_flags_effect_maps.COMMANDS, COMMANDS)
    assert sorted(name for table in tables for name in table) == sorted({*cli.COMMANDS} - ELSEWHERE)
    assert flags_of("info") == set()
    assert flags_of("demo") == {"output_dir", "seed"}


@pytest.fixture(scope="module")
def more(commands) -> None:
    """Add files to the data of commands."""
    places, root = commands.places, commands.root
    accuracies = {"settings": {"data_path": "/data"}, "20": {"top1": 12.34, "top5": 56.78}}
    (root / "accuracies.json").write_text(json.dumps(accuracies))
    (root / "existing.safetensors").write_text("an older file")
    places["accuracies"] = str(root / "accuracies.json")
    places["existing"] = str(root / "existing.safetensors")
    for name in ("", "-turned", "-deep"):
        folder = places[f"pictures{name}"]
        places[f"{name[1:]} picture".strip()] = f"{folder}/0.png"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_an_effect_in_the_table(command):
    assert sorted(COMMANDS[command].flags) == sorted(flags_of(command))


@pytest.mark.parametrize(("command", "name"), cases(COMMANDS))
def test_flag_reaches_its_effect(command, name, commands, more):
    commands.check(COMMANDS[command], COMMANDS[command].flags[name])

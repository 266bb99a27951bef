from __future__ import annotations

import json
import re

import pytest
import yaml

from fastdino.errors import ConfigError
from fastdino.export.model_card import model_card, read_figures
from fastdino.terminal import printable

SETTINGS = {
    "epochs": 7, "lr": 0.0005, "out_dim": 64, "dist_url": "tcp://a.machine:1",
    "data_path": "/home/someone/flowers/train", "output_dir": "/home/someone/runs",
}  # fmt: skip


def card(**changes):
    parts = {
        "title": "DINO vit_nano/8",
        "library": "timm",
        "facts": {"arch": "vit_nano", "dim": 96},
        "usage": "model = load()",
        "settings": SETTINGS,
        "epoch": 3,
        "figures": [],
    }
    return model_card(**(parts | changes))


def front(text):
    empty, yaml_part, _ = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(yaml_part)


def test_front_matter_names_the_library():
    assert front(card())["library_name"] == "timm"
    assert front(card())["pipeline_tag"] == "image-feature-extraction"
    assert "library_name" not in front(card(library=None))


def test_training_section_has_the_settings_but_no_local_paths():
    text = card()
    assert "| lr | 0.0005 |" in text
    assert "3 of 7 epochs are done." in text
    assert "Images: `flowers/train`." in text
    assert "someone" not in text
    assert "machine" not in text


def test_bare_weights_have_no_training_settings():
    text = card(settings={}, epoch=None)
    assert "does not record how it was trained" in text
    assert "epochs are done" not in text


def test_figures_are_read_from_json_reports(tmp_path):
    knn, linear = tmp_path / "knn.json", tmp_path / "linear.json"
    knn.write_text(
        json.dumps({"settings": {"crop": 224}, "10": {"top1": 68.219}, "20": {"top1": 68}})
    )
    linear.write_text(json.dumps({"acc1": 71.5, "acc5": 93.25, "best_acc1": 72.0, "epochs": 100}))
    figures = read_figures([str(knn), str(linear)])
    assert figures == [
        ("10-NN, top-1", "68.22"), ("20-NN, top-1", "68.00"),
        ("linear probe, top-1", "71.50"), ("linear probe, top-5", "93.25"),
    ]  # fmt: skip
    assert "| 10-NN, top-1 | 68.22 |" in card(figures=figures)
    assert "## Figures" not in card()


@pytest.mark.parametrize("content", ["{", "[1]", '{"J": 3}', '{"acc1": null, "acc5": 2}'])
def test_files_without_accuracies_are_errors(tmp_path, content):
    path = tmp_path / "it.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="it.json (cannot be read|has no accuracies)"):
        read_figures([str(path)])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_figures([str(tmp_path / "none.json")])


@pytest.mark.parametrize(
    "value",
    ["<script>alert(1)</script>", "a | b |", "x\n\n# heading", "[a](http://b)", "`c`", "\x1b[2J",
     "\u202e", "<!--", "**d**"],
)  # fmt: skip
def test_settings_of_a_checkpoint_are_literal_text(value):
    """They come from a file that others may have made."""
    text = card(settings=SETTINGS | {"optimizer": value, "epochs": value})
    rows = [line for line in text.splitlines() if line.startswith("| optimizer | ")]
    assert len(rows) == 1
    cells = re.split(r"(?<!\\)\|", rows[0])
    assert len(cells) == 4
    assert not re.search(r"<|(?<!\\)[*`\[\]]", cells[2])
    assert rows[0].isprintable()
    assert "\n# heading" not in text


@pytest.mark.parametrize("name", ["a`b", "``c", "<script>", "d\ne", "f|g"])
def test_names_of_images_are_code(name):
    text = card(settings=SETTINGS | {"data_path": f"/x/y/{name}"})
    line = next(line for line in text.splitlines() if line.startswith("Images: "))
    shown = printable(f"y/{name}")
    fence = re.search(r"Images: (`+)", line)[1]
    inside = line[len("Images: ") + len(fence) : -len(fence) - 1]
    assert inside.strip() == shown
    assert fence not in re.findall("`+", shown)

"""Helps tests of commands: a small labelled set, flags as parsed, the one line of a mistake."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}


def write_colours(root: Path) -> Path:
    """train/ with 4 pictures a class and val/ with 2; a class is a colour, with noise."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(rng.normal(colour, 50, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def flags_of(command: ModuleType, *words: str) -> argparse.Namespace:
    """The flags of a command's module, as its main takes them."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(words)


def error_of(capsys, *, printed: bool = False) -> str:
    """What a command said on stderr: one line, of a mistake.

    printed: whether it may have printed something before.
    """
    captured = capsys.readouterr()
    assert printed or captured.out == ""
    assert re.match(r"fastdino \w+: error: .", captured.err)
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err

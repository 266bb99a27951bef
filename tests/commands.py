"""Helpers for tests of commands: a small labelled dataset, parsed flags, error messages."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}


def write_colours(root: Path) -> Path:
    """Write train/ with 4 images per class and val/ with 2; a class is a colour with noise."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(rng.normal(colour, 50, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def break_pixels(*paths: Path) -> None:
    """Overwrite the pixels of PNG files, but keep the header and the end."""
    for path in paths:
        data = path.read_bytes()
        path.write_bytes(data[:60] + b"\0" * (len(data) - 80) + data[-20:])


def flags_of(command: ModuleType, *words: str) -> argparse.Namespace:
    """Parse the flags of a command's module."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(words)


def error_of(capsys, *, printed: bool = False) -> str:
    """Return the error message on stderr, after checking that it is one line.

    printed: allow output on stdout before the error.
    """
    captured = capsys.readouterr()
    assert printed or captured.out == ""
    assert re.match(r"fastdino \w+: error: .", captured.err)
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err

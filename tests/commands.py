"""Helpers for tests of commands: a small labelled dataset, parsed flags, error messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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


def rotate_names(folder: Path) -> None:
    """Give each folder in `folder` the name of the next one, which makes all labels wrong."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        (folder / name).rename(folder / f"{name}-old")
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        (folder / f"{name}-old").rename(folder / following)


def turn(*paths: Path, by_exif: bool) -> None:
    """Rewrite images by a quarter turn counterclockwise, which EXIF undoes if `by_exif`."""
    for path in paths:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        exif = Image.Exif()
        if by_exif:
            picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
        picture.save(path, format="PNG", exif=exif)  # lossless, whatever the name says


def make_gray(*paths: Path, deep: bool) -> None:
    """Rewrite images as gray PNGs of 8 bits, or of 16 bits with the same relative values."""
    for path in paths:
        with Image.open(path) as image:
            levels = np.asarray(image.convert("L"))
        pixels = levels.astype(np.uint16) * 257 if deep else levels
        Image.fromarray(pixels).save(path, format="PNG")


def assert_images_scale(
    capsys: Any, paths: list[Path], run: Callable[..., int], result: Callable[[], Any]
) -> None:
    """Check that --image_range scale gives 16-bit images the result of 8-bit ones.

    Args:
        run: runs a command with further flags.
        result: returns what it wrote, without the settings.
    """
    make_gray(*paths, deep=False)
    assert run() == 0
    expected = result()
    assert "image_range" not in capsys.readouterr().err
    make_gray(*paths, deep=True)
    assert run("--image_range", "scale") == 0
    assert result() == expected
    assert "image_range" not in capsys.readouterr().err
    assert run() == 0
    assert result() != expected
    err = capsys.readouterr().err
    assert err.count("--image_range scale keeps their range") >= 1
    assert f"{len(paths)} of {len(paths)} images" in err


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

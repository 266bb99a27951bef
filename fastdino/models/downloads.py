"""Weights that are not on this machine yet: the paper's, by name, and any by URL."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import shutil
import sys
import tempfile
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

from fastdino.errors import CheckpointError


@dataclass(frozen=True)
class Released:
    """A backbone that the paper's authors released: its file below BASE, and --arch."""

    file: str
    arch: str


# Seconds after which a server that sends nothing is given up; of many processes each tries in turn.
SILENCE = 20
BASE = "https://dl.fbaipublicfiles.com/dino/"
# By the names of the entry points in their hubconf.py. Their XCiTs are not among them: these have
# the names of a third repository's tensors.
RELEASED = {
    "dino_vits16": Released("dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", "vit_small"),
    "dino_vits8": Released("dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", "vit_small"),
    "dino_vitb16": Released("dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "vit_base"),
    "dino_vitb8": Released("dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", "vit_base"),
    "dino_resnet50": Released("dino_resnet50_pretrain/dino_resnet50_pretrain.pth", "resnet50"),
}


def local_file(place: str) -> Path:
    """The file that is meant by a path, a URL, or a name in RELEASED; a path that exists wins.

    A URL's is downloaded once, into torch.hub's folder (TORCH_HOME).

    Raises: CheckpointError: it cannot be downloaded; no such name.
    """
    if "://" in place:
        return _download(place)
    if not Path(place).exists() and place == PurePosixPath(place).stem:
        if place not in RELEASED:
            raise CheckpointError(
                f"there is no file {place}; expected a path, a URL or one of {', '.join(RELEASED)}"
            )
        return _download(BASE + RELEASED[place].file)
    return Path(place)


def _download(url: str) -> Path:
    """The file of a URL; of many runs' files, all of one name, each is kept."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = PurePosixPath(urlsplit(url).path).name
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{path.name}.lock", "w") as lock:
            # Of many processes one downloads and the others wait; where a file system has no
            # locks, each downloads.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _fetch(url, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"{url} cannot be downloaded ({error}): name a file instead"
        ) from error
    return path


def _fetch(url: str, path: Path) -> None:
    """Writes the file of a URL, whole or not at all.

    torch.hub's own function keeps what came of a download that was cut off, and waits for ever for
    a server that is silent.

    Raises: OSError, ValueError, HTTPException: it cannot be had whole.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "fastdino"})
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as scratch,
        urllib.request.urlopen(request, timeout=SILENCE) as answer,
    ):
        announced = answer.headers.get("Content-Length")
        size = None if announced is None else int(announced)
        part = Path(scratch) / path.name
        quiet = not sys.stderr.isatty()
        with (
            open(part, "wb") as file,
            tqdm.wrapattr(answer, "read", total=size, desc=path.name, disable=quiet) as source,
        ):
            shutil.copyfileobj(source, file)
        if size not in (None, part.stat().st_size):
            raise OSError(f"{part.stat().st_size} of {size} bytes came")
        os.replace(part, path)

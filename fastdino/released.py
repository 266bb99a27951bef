"""Weights that are not on this machine yet: the paper's, by name, and any by URL."""

from __future__ import annotations

import hashlib
import http.client
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch

from fastdino.errors import CheckpointError


@dataclass(frozen=True)
class Released:
    """A backbone that the paper's authors released: its file below BASE, and --arch."""

    file: str
    arch: str


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
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise CheckpointError(
                f"{url} cannot be downloaded ({error}): name a file instead"
            ) from error
    return path

"""Downloads of weights by URL, and of the paper's released weights by name."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

from fastdino.errors import CheckpointError
from fastdino.files import file_lock
from fastdino.terminal import print_err, printable
from fastdino.waiting import DaemonExecutor


@dataclass(frozen=True)
class ReleasedWeights:
    """A backbone released by the paper's authors: its file below BASE_URL, and its --arch."""

    file: str
    arch: str


TIMEOUT = 20  # seconds without data after which a download fails
# A download fails if it is slower than SLOWEST bytes per second after PATIENCE seconds, or larger.
PATIENCE, SLOWEST, LARGEST = 60, 1024, 32 << 30
_downloaded: set[Path] = set()  # by this process
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
BASE_URL = "https://dl.fbaipublicfiles.com/dino/"
# Named as in the authors' hubconf.py. Their XCiTs use tensor names that are not supported here.
RELEASED = {
    name: ReleasedWeights(f"{stem}_pretrain/{stem}_pretrain.pth", arch)
    for name, stem, arch in (
        ("dino_vits16", "dino_deitsmall16", "vit_small"),
        ("dino_vits8", "dino_deitsmall8", "vit_small"),
        ("dino_vitb16", "dino_vitbase16", "vit_base"),
        ("dino_vitb8", "dino_vitbase8", "vit_base"),
        ("dino_resnet50", "dino_resnet50", "resnet50"),
    )
}


def local_file(weights: str) -> Path:
    """Return the local file of a path, a URL or a name in RELEASED; existing paths come first.

    A URL is downloaded once, into torch.hub's folder (TORCH_HOME).

    Raises: CheckpointError: an unknown name, or a failed download.
    """
    if "://" in weights:
        return _download(weights)
    if not Path(weights).exists() and weights == PurePosixPath(weights).stem:
        if weights not in RELEASED:
            raise CheckpointError(
                f"there is no file {weights}; expected a path, a URL or one of "
                f"{', '.join(RELEASED)}"
            )
        return _download(BASE_URL + RELEASED[weights].file)
    return Path(weights)


def _download(url: str) -> Path:
    """Return the cached file of a URL; the file name contains a hash of the URL."""
    try:
        address = urlsplit(url)
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        name = PurePosixPath(address.path).name
        path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
        if path.exists():
            return path
        _warn_if_unencrypted(url)
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / f"{path.name}.lock", wait=True):  # one process downloads
            if not path.exists():
                _fetch(url, path)
                _downloaded.add(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"{url} cannot be downloaded ({error}): use a local file instead"
        ) from error
    return path


def discard_damaged(path: Path, error: Exception) -> bool:
    """Remove a file that an earlier run downloaded; return False if it is no download.

    Args: error: why it cannot be read.
    """
    if path.parent != Path(torch.hub.get_dir()) / "checkpoints" or path in _downloaded:
        return False
    print_err(f"warning: {error}; it is downloaded again")
    path.unlink(missing_ok=True)
    return True


def _warn_if_unencrypted(url: str) -> None:
    address = urlsplit(url)
    if address.scheme == "http" and address.hostname not in _LOCAL_HOSTS:
        advice = "is not encrypted: anyone in between can change it; use https"
        print_err(f"warning: {url} {advice}")


def _fetch(url: str, path: Path) -> None:
    """Download a URL to `path`, completely or not at all.

    torch.hub.download_url_to_file keeps truncated downloads and waits forever for a silent server.

    Raises: OSError, ValueError, HTTPException: the download failed, is too slow, or too large.
    """
    # In a folder of its own: without file locks, several processes may download at once.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        transfer = _Transfer(url, part)
        # In a thread, because a server can send its header, too, a byte a minute.
        with DaemonExecutor(1) as pool:
            transfer.watch(pool.submit(transfer.run))
        os.replace(part, path)


class _Transfer:
    """A download to a file.

    Attributes: received: bytes so far. size: bytes of the file, None until or unless it is known.
    """

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self.received = 0
        self.size: int | None = None

    def run(self) -> None:
        """Download the file; raise OSError if it ends early or is too large."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "fastdino"})
        with (
            open(self.path, "wb") as file,
            urllib.request.urlopen(request, timeout=TIMEOUT) as response,
        ):
            if response.url != self.url:
                _warn_if_unencrypted(response.url)
            length = response.headers.get("Content-Length")
            size = self.size = None if length is None else int(length)
            # Only these two show where the file ends.
            if size is None and response.headers.get("Transfer-Encoding") != "chunked":
                raise OSError("the server does not state the file's length")
            for received in _copy(response, file):
                self.received += received
                if max(self.received, size or 0) > LARGEST:
                    raise OSError(f"it is larger than {LARGEST >> 30} GiB")
        if size not in (None, self.received):
            raise OSError(f"received {self.received} of {size} bytes")

    def watch(self, running: Future[None]) -> None:
        """Show the progress until the end of `run`; raise OSError if it is too slow."""
        started, shown = time.monotonic(), 0
        hide = not sys.stderr.isatty()
        with tqdm(unit="B", unit_scale=True, desc=printable(self.path.name), disable=hide) as bar:
            while not wait([running], timeout=0.1).done:
                bar.total = self.size
                bar.update(self.received - shown)
                shown = self.received
                seconds = time.monotonic() - started
                if seconds > PATIENCE and shown < SLOWEST * seconds:
                    raise OSError(f"received only {shown} bytes in {seconds:.0f} s")
        running.result()


def _copy(source: IO[bytes], target: IO[bytes]) -> Iterator[int]:
    """Copy a file, yielding the number of bytes of each part."""
    # read1 returns what has arrived, so that the progress of a slow server is seen.
    while part := source.read1(1 << 20):  # type: ignore[attr-defined]
        target.write(part)
        yield len(part)

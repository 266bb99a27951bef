"""Weights by URL and by name, downloaded once."""

from __future__ import annotations

import http.server
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastdino.errors import CheckpointError
from fastdino.models import downloads
from fastdino.models.backbones import build_backbone
from fastdino.models.downloads import RELEASED, local_file
from fastdino.models.weights import load_backbone


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's folder, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder in the place of the authors' server."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setattr(downloads, "BASE", folder.as_uri() + "/")
    return folder


def test_a_url_is_downloaded_once_and_files_of_one_name_are_kept_apart(cache, tmp_path):
    urls = []
    for run in ("a", "b"):
        file = tmp_path / run / "checkpoint.pth"
        file.parent.mkdir()
        file.write_text(run)
        urls.append(file.as_uri())
    assert [local_file(url).read_text() for url in urls] == ["a", "b"]
    (tmp_path / "a" / "checkpoint.pth").unlink()
    assert local_file(urls[0]).read_text() == "a"
    assert {path.name.partition("-")[2] for path in cache.rglob("*.pth")} == {"checkpoint.pth"}


@pytest.fixture
def web():
    """A web server: its address, and what it was asked for."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"0123456789"[: 10 if self.path == "/whole.pth" else 5])
            self.wfile.flush()
            if self.path == "/silent.pth":
                over.wait(60)

        def log_message(self, *_):
            pass

    over = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_that_was_cut_off_or_fell_silent_is_not_kept(cache, web, monkeypatch):
    monkeypatch.setattr(downloads, "SILENCE", 0.2)
    address, _ = web
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be downloaded \(5 of 10 bytes"):
        local_file(f"{address}/cut.pth")
    with pytest.raises(CheckpointError, match=r"silent\.pth cannot be downloaded \(timed out\)"):
        local_file(f"{address}/silent.pth")
    assert local_file(f"{address}/whole.pth").read_text() == "0123456789"
    assert [path.name.partition("-")[2] for path in cache.rglob("*.pth")] == ["whole.pth"]


def test_of_those_that_want_a_file_at_once_one_downloads_it(cache, web):
    address, asked = web
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(local_file, [f"{address}/whole.pth"] * 4))
    assert [file.read_text() for file in files] == ["0123456789"]
    assert asked == ["/whole.pth"]


def test_a_path_is_itself_even_where_it_has_a_name_of_the_papers(tmp_path, monkeypatch):
    assert local_file("runs/s16/checkpoint.pth").parts == ("runs", "s16", "checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dino_vits16").write_text("mine")
    assert local_file("dino_vits16").read_text() == "mine"


def test_what_cannot_be_had_is_named(cache, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.pth cannot be downloaded .*name a file"):
        local_file((tmp_path / "none.pth").as_uri())
    with pytest.raises(CheckpointError, match=r"dino_vitbase8_pretrain\.pth cannot be downloaded"):
        local_file("dino_vitb8")
    with pytest.raises(CheckpointError, match=r"no file dino_vits32; expected .* dino_vits16, "):
        local_file("dino_vits32")
    assert not list(cache.rglob("*.pth"))


@pytest.mark.parametrize("name", ["dino_vits8", "dino_resnet50"])
def test_a_name_is_a_network_and_its_weights(cache, server, name):
    arch, patch_size = ("resnet50", 16) if name == "dino_resnet50" else ("vit_small", 8)
    model, _ = build_backbone(arch, patch_size=patch_size)
    file = server / RELEASED[name].file
    file.parent.mkdir()
    torch.save(model.state_dict(), file)
    backbone = load_backbone(name, checkpoint_key="teacher", arch=None, patch_size=None)
    assert (backbone.arch, backbone.patch_size) == (arch, patch_size)
    for key, tensor in model.state_dict().items():
        assert torch.equal(backbone.module.state_dict()[key], tensor), key

"""Downloads of weights by URL and by name."""

from __future__ import annotations

import contextlib
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
from tests.processes import run_two


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty torch.hub folder."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that replaces the authors' server."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setattr(downloads, "BASE_URL", folder.as_uri() + "/")
    return folder


def test_urls_are_downloaded_once_and_files_of_one_name_stay_apart(cache, tmp_path):
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
    """The address of a web server, and the paths of its requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path == "/dripping-header.pth":
                self.drip(b"HTTP/1.0 200 OK")
                return
            if self.path == "/elsewhere.pth":
                self.send_response(302)
                self.send_header("Location", "/whole.pth")
                self.end_headers()
                return
            self.send_response(200)
            if "chunk" in self.path:
                self.send_header("Transfer-Encoding", "chunked")
            elif self.path != "/unknown-length.pth":
                self.send_header("Content-Length", "10")
            self.end_headers()
            getattr(self, self.path[1:].removesuffix(".pth").replace("-", "_"))()

        def whole(self):
            self.wfile.write(b"0123456789")

        def cut(self):
            self.wfile.write(b"01234")

        unknown_length = cut

        def silent(self):
            self.cut()
            self.wfile.flush()
            stop.wait(60)

        def drip(self, content):
            with contextlib.suppress(OSError):
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    stop.wait(0.1)

        def dripping(self):
            self.drip(b"0123456789")

        def dripping_chunks(self):
            self.drip(b"00000000000000000000")

        def chunked(self):
            self.wfile.write(b"5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n")

        def chunked_cut(self):
            self.wfile.write(b"5\r\n01234\r\n5\r\n56")

        def log_message(self, *_):
            pass

    stop = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_truncated_and_stalled_downloads_are_not_kept(cache, web, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    address, _ = web
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be downloaded \(received 5 of 10"):
        local_file(f"{address}/cut.pth")
    with pytest.raises(CheckpointError, match=r"silent\.pth cannot be downloaded \(timed out\)"):
        local_file(f"{address}/silent.pth")
    assert local_file(f"{address}/whole.pth").read_text() == "0123456789"
    assert [path.name.partition("-")[2] for path in cache.rglob("*.pth")] == ["whole.pth"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("unknown-length", "does not state the file's length"),
        ("chunked-cut", "IncompleteRead"),
        ("dripping", "received only . bytes"),
        ("dripping-header", "received only 0 bytes"),
        ("dripping-chunks", "received only 0 bytes"),
    ],
)
def test_downloads_whose_end_is_unknown_are_not_kept(cache, web, monkeypatch, name, problem):
    monkeypatch.setattr(downloads, "PATIENCE", 0.2)
    address, _ = web
    with pytest.raises(CheckpointError, match=problem):
        local_file(f"{address}/{name}.pth")
    assert not list(cache.rglob("*.pth"))


def test_a_chunked_download_is_complete_and_a_large_one_is_refused(cache, web, monkeypatch):
    address, _ = web
    assert local_file(f"{address}/chunked.pth").read_text() == "0123456789"
    monkeypatch.setattr(downloads, "LARGEST", 9)
    with pytest.raises(CheckpointError, match="it is larger than"):
        local_file(f"{address}/whole.pth")


@pytest.mark.parametrize(
    "url", ["https://[::1", "nothing://x/y.pth", "http://a b/c.pth", "http://:x/y.pth", "http:///"]
)
def test_an_invalid_url_is_one_line(cache, url):
    with pytest.raises(CheckpointError, match="cannot be downloaded") as error:
        local_file(url)
    assert "\n" not in str(error.value)


def test_an_unencrypted_download_is_warned_of(cache, web, capsys, monkeypatch):
    address, _ = web
    local_file(f"{address}/whole.pth")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(downloads, "_LOCAL_HOSTS", ())
    local_file(f"{address}/chunked.pth")
    assert "is not encrypted" in capsys.readouterr().err


def test_a_redirection_to_an_unencrypted_address_is_warned_of(cache, web, capsys, monkeypatch):
    address, _ = web
    warned = downloads._warn_if_unencrypted
    monkeypatch.setattr(downloads, "_LOCAL_HOSTS", ())
    monkeypatch.setattr(  # stands for an https address
        downloads, "_warn_if_unencrypted", lambda url: None if "elsewhere" in url else warned(url)
    )
    local_file(f"{address}/elsewhere.pth")
    assert f"{address}/whole.pth is not encrypted" in capsys.readouterr().err


def test_one_of_several_processes_downloads_a_file(cache, web):
    address, requests = web
    run_two(_download_again, str(cache), f"{address}/whole.pth")
    assert requests == ["/whole.pth"]


def _download_again(cache, url):
    torch.hub.set_dir(cache)
    assert local_file(url).read_text() == "0123456789"


def test_processes_without_file_locks_do_not_share_a_partial_download(cache, web, monkeypatch):
    address, requests = web
    both, copy = threading.Barrier(2, timeout=20), downloads._copy

    def copy_at_once(*files):
        both.wait()
        yield from copy(*files)
        both.wait()

    monkeypatch.setattr(downloads, "file_lock", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(downloads, "_copy", copy_at_once)
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(local_file, [f"{address}/whole.pth"] * 2))
    assert [file.read_text() for file in files] == ["0123456789"] * 2
    assert len(requests) == 2
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".pth"]


def test_existing_paths_come_before_names_of_released_weights(tmp_path, monkeypatch):
    assert local_file("runs/s16/checkpoint.pth").parts == ("runs", "s16", "checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dino_vits16").write_text("mine")
    assert local_file("dino_vits16").read_text() == "mine"


def test_failed_downloads_and_unknown_names_are_errors(cache, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.pth cannot be downloaded .*use a local file"):
        local_file((tmp_path / "none.pth").as_uri())
    with pytest.raises(CheckpointError, match=r"dino_vitbase8_pretrain\.pth cannot be downloaded"):
        local_file("dino_vitb8")
    with pytest.raises(CheckpointError, match=r"no file dino_vits32; expected .* dino_vits16, "):
        local_file("dino_vits32")
    assert not list(cache.rglob("*.pth"))


@pytest.mark.parametrize("name", ["dino_vits8", "dino_resnet50"])
def test_released_weights_load_by_name(cache, server, name):
    arch, patch_size = ("resnet50", 16) if name == "dino_resnet50" else ("vit_small", 8)
    model, _ = build_backbone(arch, patch_size=patch_size)
    file = server / RELEASED[name].file
    file.parent.mkdir()
    torch.save(model.state_dict(), file)
    backbone = load_backbone(name, checkpoint_key="teacher", arch=None, patch_size=None)
    assert (backbone.arch, backbone.patch_size) == (arch, patch_size)
    for key, tensor in model.state_dict().items():
        assert torch.equal(backbone.module.state_dict()[key], tensor), key


def test_a_damaged_download_is_downloaded_again_with_a_warning(cache, tmp_path, capsys):
    model, _ = build_backbone("vit_nano", patch_size=8)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    url = (tmp_path / "x.pth").as_uri()
    options = {"checkpoint_key": None, "arch": None, "patch_size": None}
    load_backbone(url, **options)
    downloads._downloaded.clear()  # as in another process
    (cached,) = cache.rglob("*.pth")
    cached.write_bytes(cached.read_bytes()[:1000])
    backbone = load_backbone(url, **options)
    assert torch.equal(backbone.module.pos_embed, model.pos_embed)
    assert f"warning: {cached} cannot be read" in capsys.readouterr().err
    cached.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):  # it was downloaded just now
        load_backbone(url, **options)

"""fastdino.data.loader: the loader, crop backend and decoder of each choice and device."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from fastdino.data import loader_fused
from fastdino.data.loader import build_loader
from tests.loaders import make_config

CLASSES = {"fused": "FusedLoader", "dali": "DaliLoader", "torchvision": "TorchvisionLoader"}


@pytest.fixture
def built(monkeypatch) -> list:
    """Fake the three loaders' modules; returns what is built: class and options."""
    made: list = []

    def module_of(name):
        kind = name.removeprefix("fastdino.data.loader_")

        def make(config, dataset, **options):
            made.append((kind, config, dataset, options))

        return types.SimpleNamespace(**{CLASSES[kind]: make})

    monkeypatch.setattr(importlib, "import_module", module_of)
    return made


@pytest.mark.parametrize("crops", CLASSES)
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_each_crop_backend_has_its_loader_with_the_rank_and_device(crops, device, built):
    build_loader("config", "images", crops=crops, decode="cpu", rank=2, world_size=3, device=device)
    ((kind, config, dataset, options),) = built
    assert (kind, config, dataset) == (crops, "config", "images")
    expected = {"rank": 2, "world_size": 3, "device": device}
    assert options == (expected | {"decode": "cpu"} if crops == "fused" else expected)


class Backend:
    """A backend of the fused crops on a device that this machine may lack."""

    name = "a backend"

    def __init__(self, place):
        self.place, self.stream = place, None
        if isinstance(place, torch.device):
            self.stream = f"the stream of {place}"

    def close(self):
        pass


class Decoder:
    """A batch decoder that notes how it was made."""

    made: list = []
    name = "a decoder"

    def __init__(self, *args, **options):
        self.made.append((args, options))

    def close(self):
        pass


@pytest.fixture
def decoders(monkeypatch) -> list:
    """Fake the backends of the fused crops and DALI's decoder; returns how decoders are made."""
    monkeypatch.setattr(Decoder, "made", [])
    monkeypatch.setattr(loader_fused, "_CpuBackend", Backend)
    monkeypatch.setattr(loader_fused, "_CudaBackend", Backend)
    fake = types.SimpleNamespace(DaliDecoder=Decoder)
    monkeypatch.setitem(sys.modules, "fastdino.data.dali_decoding", fake)
    return Decoder.made


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("decode", ["pillow", "cpu", "gpu"])
def test_fused_crops_are_made_on_the_runs_device_and_decoded_as_chosen(
    photos, decode, device, decoders
):
    config = make_config(crops="fused", num_workers=1, grad_accum=3, hw_decoder_load=0.25)
    loader = loader_fused.FusedLoader(config, photos, decode=decode, device=device)
    try:
        place = loader._backend.place
        assert place == (torch.device(device) if device != "cpu" else loader._threads)
        assert loader.description.startswith("a backend, 1 threads, decoded by ")
        if decode == "pillow":
            assert decoders == []
            return
        ((args, options),) = decoders
        assert args == (12, 1)  # images per batch, threads
        # Only nvJPEG works on the backend's stream; the others decode on the CPU.
        on_stream = decode == "gpu" and device != "cpu"
        assert options["stream"] == (f"the stream of {device}" if on_stream else None)
        assert options["hw_decoder_load"] == 0.25
    finally:
        loader.close()

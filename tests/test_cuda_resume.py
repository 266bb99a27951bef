"""A resume on a GPU, which is simulated, restores the random streams of the device."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastdino import Trainer
from fastdino.models import attention

pytestmark = [
    pytest.mark.usefixtures("small_networks"),
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
        reason="simulates a GPU with Triton's interpreter, on machines without one",
    ),
]


def test_random_streams_of_the_device_are_restored(tiny):
    """Stochastic depth draws from the device's generator."""
    from tests.simulated_cuda.install import simulate_cuda

    config = tiny(device="cuda", compile="off", attention="sdpa", amp_dtype="bf16")
    with simulate_cuda():
        saved = Trainer(config, 3).state_dict()
        state = saved["generators"][0]["cuda"].clone()
        torch.cuda.set_rng_state(torch.Generator().manual_seed(7).get_state(), "cuda")
        assert not torch.equal(torch.cuda.get_rng_state("cuda"), state)
        Trainer(config, 3).load_state_dict(saved)
        assert torch.equal(torch.cuda.get_rng_state("cuda"), state)
    attention.token_layout.cache_clear()  # their tensors are on the simulated device

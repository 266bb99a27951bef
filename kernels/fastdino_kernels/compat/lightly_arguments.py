"""Arguments that lightly's losses have in common."""

from __future__ import annotations

from torch import Tensor


def check_center_mode(mode: str) -> None:
    """Raise ValueError for another mode than "mean", the only one of lightly."""
    if mode != "mean":
        raise ValueError(f"Unknown mode '{mode}'. Valid modes are ['mean'].")


def temperature_on_host(temp: float | Tensor) -> float | Tensor:
    """Return a CPU tensor of one element as a float; that needs no synchronisation."""
    if isinstance(temp, Tensor) and temp.numel() == 1 and temp.device.type == "cpu":
        return temp.item()
    return temp

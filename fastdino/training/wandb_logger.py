"""Metrics of a run in Weights & Biases, online or in an offline folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wandb

from fastdino.errors import ConfigError
from fastdino.training.metric_logger import Origin, Pixels, Position, new_values

PROJECT = "fastdino"  # unless WANDB_PROJECT names another


class WandbLogger:
    """A run of Weights & Biases; its files are in the folder wandb/ of the run.

    wandb's environment variables apply (WANDB_MODE=offline, WANDB_PROJECT, WANDB_NAME, ...). A
    resumed run continues the run of wandb.json; iterations that it has are not logged again.
    """

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self.problem = "Weights & Biases cannot log"
        self._position = Position(origin.folder / "wandb.json")
        self._run: Any = None

    def restart(self, iteration: int, *, new: bool) -> None:
        """Start the run, or continue that of wandb.json.

        Raises: ConfigError: wandb cannot start it.
        """
        if self._run is not None:
            return
        self._position.load()
        if new or not self._position.run_id:
            self._position.begin()
        folder = self._origin.folder
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=self._position.run_id,
                resume="allow",
                dir=str(folder),
                config=dict(self._origin.settings),
                allow_val_change=True,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"--logger wandb: the run cannot be started ({reason}): run `wandb login`, or set "
                "WANDB_MODE=offline and upload the run later with `wandb sync`"
            ) from error
        if self._run.offline:
            self._origin.info(f"wandb: offline, in {self._run.settings.sync_dir}")
        else:
            self._origin.info(f"wandb: {self._run.url}")

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Log the values, unless they were logged before."""
        values = new_values(self._position, values, iteration)
        if self._run is not None and values:
            self._run.log(values, step=iteration)

    def add_image(self, name: str, pixels: Pixels, iteration: int) -> None:
        """Log a picture [height, width, 3], unless it was logged before."""
        if self._run is not None and self._position.advance(name, iteration):
            self._run.log({name: wandb.Image(pixels)}, step=iteration)

    def flush(self, iteration: int) -> None:
        """Do nothing: wandb's own process writes the values."""

    def close(self) -> None:
        """End the run and wait until everything is written."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()

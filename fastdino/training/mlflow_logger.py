"""Metrics of a run in MLflow, on a server or in a database in the folder of the run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fastdino.training.metric_logger import Origin, Pixels, Position, new_values

EXPERIMENT = "fastdino"  # unless MLFLOW_EXPERIMENT_NAME names another
LONGEST_PARAM = 500  # characters; some stores accept no more


class MlflowLogger:
    """A run of MLflow, at MLFLOW_TRACKING_URI or else in mlflow.db in the folder of the run.

    A resumed run continues the run of mlflow.json; iterations that it has are not logged again.
    """

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        folder = origin.folder.resolve()
        self._own_store = not os.environ.get("MLFLOW_TRACKING_URI")
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self.problem = f"MLflow cannot log to {self._uri}"
        self._position = Position(origin.folder / "mlflow.json")
        self._client: Any = None

    def restart(self, iteration: int, *, new: bool) -> None:
        """Start the run, or continue that of mlflow.json."""
        if self._client is not None:
            return
        client = MlflowClient(tracking_uri=self._uri)
        self._position.load()
        if new or not self._continues(client):
            self._position.begin(self._create_run(client))
        client.log_dict(self._position.run_id, dict(self._origin.settings), "settings.json")
        self._client = client
        self._origin.info(f"mlflow: run {self._position.run_id} at {self._uri}")

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Log the values, unless they were logged before."""
        values = new_values(self._position, values, iteration)
        if self._client is not None and values:
            now = int(1000 * time.time())
            metrics = [Metric(name, value, now, iteration) for name, value in values.items()]
            self._client.log_batch(self._position.run_id, metrics=metrics)

    def add_image(self, name: str, pixels: Pixels, iteration: int) -> None:
        """Log a picture [height, width, 3], unless it was logged before."""
        if self._client is not None and self._position.advance(name, iteration):
            self._client.log_image(self._position.run_id, pixels, key=name, step=iteration)

    def flush(self, iteration: int) -> None:
        """Do nothing: values are written at once."""

    def close(self) -> None:
        """End the run."""
        client, self._client = self._client, None
        if client is not None:
            client.set_terminated(self._position.run_id)

    def _continues(self, client: MlflowClient) -> bool:
        """Return True if the run of mlflow.json exists; it is then running again."""
        if not self._position.run_id:
            return False
        try:
            client.update_run(self._position.run_id, status="RUNNING")
        except MlflowException:
            return False
        return True

    def _create_run(self, client: MlflowClient) -> str:
        """Create the run, and the experiment if it is missing; return the run's id."""
        folder, settings = self._origin.folder.resolve(), self._origin.settings
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = (folder / "mlartifacts").as_uri() if self._own_store else None
            experiment_id = client.create_experiment(name, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(
            experiment_id,
            run_name=folder.name,
            tags={"mlflow.source.git.commit": str(settings.get("commit", "unknown"))},
        )
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in settings.items()]
        client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

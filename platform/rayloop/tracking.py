"""Parameters and metrics of a run -> MLflow, in a database that is set up once.

Only drivers write here. Several processes that meet an empty database at the same time break
each other's set-up, so it is done under a file lock; MLflow itself is imported on first use, since
that takes a second. Nothing is written to the current folder.
"""

import fcntl
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.errors import ConfigError
from rayloop.storage import Storage

EXPERIMENT = "rayloop"
RUN_TAG = "rayloop.run_id"
QUIET_LOGGERS = ("mlflow", "alembic")
LONGEST_PARAMETER = 500
PARAMETERS_PER_CALL = 100


def tracking_uri_of(storage: Storage, configured: str) -> str:
    """The absolute address of the tracking server or database.

    Args:
        storage: The root; holds `mlflow.db` unless something else is configured.
        configured: `registry.tracking_uri`; may be empty.

    Raises:
        ConfigError: Nothing is configured and the root is not a local folder.
    """
    if configured:
        return configured
    if not storage.is_local:
        raise ConfigError(
            f"RAYLOOP_HOME={storage.root} is not a local folder, and a SQLite database needs one. "
            "Set --registry.tracking_uri to an MLflow server or another database."
        )
    return f"sqlite:///{storage.path('mlflow.db')}"


@contextmanager
def exclusive(storage: Storage, name: str) -> Iterator[None]:
    """Hold a file lock under a local root, among all processes of this machine.

    A remote root has no lock: there a tracking server orders the writers.
    """
    folder = storage.local_path()
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_client(storage: Storage, configured: str) -> Any:
    """An `mlflow.MlflowClient` whose database is ready.

    Args:
        storage: The root.
        configured: `registry.tracking_uri`; may be empty.

    Raises:
        ConfigError: As `tracking_uri_of`.
    """
    uri = tracking_uri_of(storage, configured)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient  # noqa: PLC0415  takes a second

        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        with exclusive(storage, "mlflow"):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            if client.get_experiment_by_name(EXPERIMENT) is None:
                artifacts = storage.path("mlartifacts")
                location = Path(artifacts).as_uri() if storage.is_local else artifacts
                client.create_experiment(EXPERIMENT, artifact_location=location)
    return client


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.field` and text."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = str(value)[:LONGEST_PARAMETER]
    return flat


class Tracker:
    """Runs in the tracking database; for drivers, never for Ray workers.

    Args:
        storage: The root.
        tracking_uri: `registry.tracking_uri`; empty means `mlflow.db` under the root.
        clock: Stamps the metrics.
    """

    def __init__(
        self, storage: Storage, tracking_uri: str = "", clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._configured = tracking_uri

    @cached_property
    def _client(self) -> Any:
        return open_client(self._storage, self._configured)

    def start_run(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Begin a run, or go on with the one of the same name.

        Args:
            name: rayloop's run id; a resumed run is the same MLflow run.
            params: Settings, nested or flat; those already recorded are kept as they are.
            tags: Further tags.

        Returns:
            MLflow's run id.
        """
        from mlflow.entities import Param  # noqa: PLC0415

        experiment = self._client.get_experiment_by_name(EXPERIMENT).experiment_id
        found = self._client.search_runs(
            [experiment], filter_string=f"tags.`{RUN_TAG}` = '{name}'", max_results=1
        )
        if found:
            run = found[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(experiment, run_name=name, tags={RUN_TAG: name})
        run_id = str(run.info.run_id)
        fresh = [
            Param(key, value)
            for key, value in flatten(params).items()
            if key not in run.data.params
        ]
        for at in range(0, len(fresh), PARAMETERS_PER_CALL):
            self._client.log_batch(run_id, params=fresh[at : at + PARAMETERS_PER_CALL])
        for key, tag in (tags or {}).items():
            self._client.set_tag(run_id, key, tag)
        return run_id

    def log_metrics(self, run_id: str, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Record the finite numbers among `metrics` at a step; anything else is left out.

        Args:
            run_id: MLflow's, from `start_run`.
            metrics: Values by name.
            step: Training step they belong to.
        """
        from mlflow.entities import Metric  # noqa: PLC0415

        now_ms = int(self._clock.now() * 1000)
        records = [
            Metric(name, float(value), now_ms, step)
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        if records:
            self._client.log_batch(run_id, metrics=records)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run.

        Args:
            run_id: MLflow's, from `start_run`.
            status: `FINISHED`, `FAILED` or `KILLED`.
        """
        self._client.set_terminated(run_id, status=status)

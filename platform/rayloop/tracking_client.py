"""The address of a tracking server or database -> an MLflow client whose database is ready.

Several processes that meet an empty database at the same time break each other's set-up, so it is
done under a file lock. MLflow itself is imported on first use, since that takes a second.
"""

import http.client
import logging
import os
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

from rayloop.credentials import without_credentials
from rayloop.errors import ConfigError, Corrupt, StorageUnreachable
from rayloop.locks import exclusive
from rayloop.storage import Storage

EXPERIMENT = "rayloop"
KIND_TAG = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then speak of training runs, and not of prompts and traces."""
QUIET_LOGGERS = ("mlflow", "alembic")
ANSWER_TIMEOUT_S = 10.0
"""Longest wait for a tracking server's first word."""


def configured_uri(setting: str) -> str:
    """`registry.tracking_uri`, else MLFLOW_TRACKING_URI; empty where neither is set."""
    return setting or os.environ.get("MLFLOW_TRACKING_URI", "")


def tracking_uri_of(storage: Storage, configured: str) -> str:
    """The absolute address of the tracking server or database.

    Args:
        storage: The root; holds `mlflow.db` unless something else is configured.
        configured: `registry.tracking_uri`; empty for MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: Nothing is configured and the root is not a local folder.
    """
    uri = configured_uri(configured)
    if uri:
        return uri
    if not storage.is_local:
        raise ConfigError(
            f"RAYLOOP_HOME={storage.root} is not a local folder, and a SQLite database needs one. "
            "Set MLFLOW_TRACKING_URI, or --registry.tracking_uri, to an MLflow server or another "
            "database."
        )
    return f"sqlite:///{storage.path('mlflow.db')}"


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def refuse_silence(storage: Storage, configured: str) -> None:
    """Refuse a tracking server that does not answer; MLflow itself would try for minutes.

    Args:
        storage: The root.
        configured: `registry.tracking_uri`; may be empty.

    Raises:
        ConfigError: As `tracking_uri_of`.
        StorageUnreachable: It does not answer. A database in a file is not asked.
    """
    uri = tracking_uri_of(storage, configured)
    if not _is_server(uri):
        return
    shown = without_credentials(uri)
    try:
        urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=ANSWER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in is for MLflow to say
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise StorageUnreachable(
            f"The MLflow server at {shown} does not answer ({reason}). Start it, or correct "
            "MLFLOW_TRACKING_URI or registry.tracking_uri, and run the same command again."
        ) from None


def open_client(storage: Storage, configured: str) -> Any:
    """An `mlflow.MlflowClient` whose database is ready.

    Args:
        storage: The root.
        configured: `registry.tracking_uri`; may be empty.

    Raises:
        ConfigError: As `tracking_uri_of`.
        StorageUnreachable: The server does not answer.
        Corrupt: The database is damaged, or another version of MLflow made it.
    """
    uri = tracking_uri_of(storage, configured)
    refuse_silence(storage, configured)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient, MlflowException  # noqa: PLC0415  takes a second
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            with exclusive(storage, "mlflow"):
                client = MlflowClient(tracking_uri=uri, registry_uri=uri)
                if client.get_experiment_by_name(EXPERIMENT) is None:
                    # A server knows best where it can show pictures from.
                    place = None if _is_server(uri) else artifacts_of(storage)
                    client.create_experiment(EXPERIMENT, artifact_location=place, tags=KIND_TAG)
        except (MlflowException, SQLAlchemyError) as error:
            where = uri if configured_uri(configured) else storage.path("mlflow.db")
            reason = str(error).splitlines()[0]
            told = (
                f"The runs' database, {where}, does not open: it is damaged, another version of "
                "MLflow made it, or its server does not let us in. Bring back a copy of it, or ask "
                f"with the MLflow that made it. MLflow says: {reason}"
            )
            raise Corrupt(without_credentials(told)) from error
    return client


def artifacts_of(storage: Storage) -> str:
    """Address of the folder under a root that holds the runs' pictures."""
    folder = storage.path("mlartifacts")
    return Path(folder).as_uri() if storage.is_local else folder
